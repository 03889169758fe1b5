"""`python -m benchmarks.precompute.peer JOB.json`: what else one would do, one run of one kind.

`bare` is the least that anybody can do with vLLM: rows enter by a window, and are dropped as they leave. `usual` is
what is usually written: everything handed over at once, everything kept, log-probs as dicts, one file at the end.
`forward` is transformers alone, on padded batches.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.precompute.events import note
from benchmarks.precompute.work import Request, read_requests
from precompute.config import Engine, Sampling
from precompute.engine.vllm_settings import import_vllm, settings, usual_window

Job = dict[str, Any]
Found = dict[str, float]


def bare(job: Job) -> Found:
    """Rows enter as others leave; nothing is done with what vLLM returns."""
    vllm, config = import_vllm(), Engine(**job["engine"])
    llm = vllm.LLM(**_settings(vllm, job))
    params = _bare_params(vllm, job, llm.llm_engine.vllm_config.use_v2_model_runner)
    source, inside = read_requests(Path(job["requests"])), 0
    while True:
        for request in islice(source, usual_window(config) - inside):
            llm.enqueue([_prompt(request)], [params(request)], use_tqdm=False)
            inside += 1
        if not inside:
            return {}
        inside -= sum(output.finished for output in llm.llm_engine.step())


def usual(job: Job) -> Found:
    """`LLM.generate` with a dict a token, as its examples show it, and `to_parquet`."""
    import pandas

    vllm, requests = import_vllm(), list(read_requests(Path(job["requests"])))
    llm = vllm.LLM(**_settings(vllm, job) | {"skip_tokenizer_init": False})
    scoring = job["sampling"] is None
    if scoring:
        params = [vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1) for _ in requests]
    else:
        params = [vllm.SamplingParams(**_sampling(job), seed=request.seed, logprobs=1) for request in requests]
    outputs = llm.generate([_prompt(request) for request in requests], params)
    rows = [(_scored if scoring else _sampled)(*pair) for pair in zip(requests, outputs, strict=True)]
    pandas.DataFrame(rows).to_parquet(job["output"])
    return {"logprob_sum": sum(sum(row["logprobs"]) for row in rows)}


def forward(job: Job) -> Found:
    """Whole sequences in padded batches, shortest first; the log-softmax of all positions, gathered."""
    import pandas
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).eval()
    model.to(torch.device(device))  # pyright: ignore
    requests = sorted(read_requests(Path(job["requests"])), key=lambda row: len(_prompt(row)["prompt_token_ids"]))
    rows: list[dict[str, Any]] = []
    for _ in requests:
        note("given")
    for batch in _batches(requests, job["batch"]):
        whole = [torch.tensor(_prompt(request)["prompt_token_ids"]) for request in batch]
        ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True).to(device)  # (batch, longest)
        lengths = torch.tensor([len(row) for row in whole], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        with torch.inference_mode():
            logits = model(ids, attention_mask=mask.long(), use_cache=False).logits[:, :-1]
            logprobs = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].cpu()
        for request, row in zip(batch, logprobs, strict=True):
            start, tokens = len(request.prompt_ids) - 1, len(request.completion_ids)
            rows.append({**asdict(request), "logprobs": row[start : start + tokens].tolist()})
            note("finished", start + 1 + tokens)
    pandas.DataFrame(rows).to_parquet(job["output"])
    return {"logprob_sum": sum(sum(row["logprobs"]) for row in rows)}


KINDS: dict[str, Callable[[Job], Found]] = {"bare": bare, "usual": usual, "forward": forward}


def _settings(vllm: Any, job: Job) -> dict[str, Any]:
    """The very settings of our own engine."""
    config = Engine(**job["engine"])
    return settings(
        Path(job["model"]),
        config,
        cpu=vllm.platforms.current_platform.is_cpu(),
        max_model_len=job["max_model_len"],
        window=usual_window(config),
        sampling=Sampling(**job["sampling"]) if job["sampling"] else None,
        topk=0,
    )


def _sampling(job: Job) -> dict[str, Any]:
    """The model's own distribution, until one of the stop ids."""
    sampling = Sampling(**job["sampling"])
    stop_ids = list(sampling.stop_ids or ())
    return {"temperature": 1.0, "max_tokens": sampling.max_tokens, "stop_token_ids": stop_ids, "ignore_eos": True}


def _bare_params(vllm: Any, job: Job, by_id: bool) -> Callable[[Request], Any]:
    """The least that still returns the log-probs that are wanted; `by_id` where the engine scores given ids."""
    import numpy as np

    least: dict[str, Any] = {"detokenize": False}
    if job["sampling"] is not None:
        least |= {**_sampling(job), "logprobs": 0, "flat_logprobs": True}
        return lambda request: vllm.SamplingParams(**least, seed=request.seed)
    least |= {"temperature": 0.0, "max_tokens": 1}
    if not by_id:
        return lambda request: vllm.SamplingParams(**least, prompt_logprobs=0, flat_logprobs=True)
    return lambda request: vllm.SamplingParams(
        **least,
        prompt_logprob_token_ids=np.asarray(request.completion_ids, np.int32)[:, None],
        prompt_logprob_start=len(request.prompt_ids) - 1,
    )


def _prompt(request: Request) -> dict[str, list[int]]:
    return {"prompt_token_ids": [*request.prompt_ids, *request.completion_ids]}


def _sampled(request: Request, output: Any) -> dict[str, Any]:
    (completion,) = output.outputs
    ids = list(completion.token_ids)
    logprobs = [entry[token].logprob for entry, token in zip(completion.logprobs, ids, strict=True)]
    return {"prompt_ids": request.prompt_ids, "ids": ids, "logprobs": logprobs, "text": completion.text}


def _scored(request: Request, output: Any) -> dict[str, Any]:
    entries = output.prompt_logprobs[len(request.prompt_ids) :]
    logprobs = [entry[token].logprob for entry, token in zip(entries, request.completion_ids, strict=True)]
    return {**asdict(request), "logprobs": logprobs}


def _batches(requests: list[Request], size: int) -> Iterator[list[Request]]:
    for first in range(0, len(requests), size):
        yield requests[first : first + size]


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job["found"]).write_text(json.dumps(KINDS[job["kind"]](job)))
