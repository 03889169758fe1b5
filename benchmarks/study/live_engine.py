"""One vLLM engine in a process of its own, whose weights are replaced at every step of live distillation.

    python -m benchmarks.study.live_engine FOLDER {sample,score} [TOPK]

Takes a JSON object a line and answers each with one: {"load": FOLDER} puts the weights of that folder in place of its
own; {"sample": [[prompt ids, seed], ...]} and {"score": [[prompt ids, completion ids], ...]} give rows in that order.
It is our own engine door, so that sampling and scoring cost live distillation what they cost Lightning.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.setting.networks import CONTEXT, IDS, MAX_TOKENS
from benchmarks.study.setting.task import END
from precompute.config import Engine as EngineConfig
from precompute.config import Sampling
from precompute.engine.door import Engine
from precompute.engine.requests import GenerateRequest, ScoreRequest

ENGINE = EngineConfig(dtype="float32", max_num_seqs=256, cpu_kv_gib=0.25)
"""As in the study's own precompute."""


class LiveEngine(Engine):
    """An engine whose weights can be replaced."""

    def load(self, folder: str) -> None:
        """Put the weights in `folder` in place of its own; what was computed with those is forgotten."""
        self._llm.llm_engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        self._llm.reset_prefix_cache()


def answer(engine: LiveEngine, asked: dict[str, Any]) -> dict[str, Any]:
    """The answer to one line."""
    [(what, given)] = asked.items()
    if what == "load":
        engine.load(given)
        return {}
    return {"rows": sample(engine, given) if what == "sample" else score(engine, given)}


def sample(engine: Engine, asked: Sequence[tuple[list[int], int]]) -> list[dict[str, Any]]:
    """Completion ids and their log-probs under the distribution that sampled."""
    requests = [GenerateRequest(row, prompt, seed, str(row)) for row, (prompt, seed) in enumerate(asked)]
    found = {one.key: one for one in engine.generate(requests)}
    return [
        {"ids": found[row].completion_ids.tolist(), "logps": found[row].logprobs.tolist()} for row in range(len(asked))
    ]


def score(engine: Engine, asked: Sequence[tuple[list[int], list[int]]]) -> list[dict[str, Any]]:
    """The log-probs of these completions, and of the most likely tokens if the engine was made for those."""
    requests = [
        ScoreRequest(row, np.asarray(prompt, np.int32), np.asarray(completion, np.int32), str(row))
        for row, (prompt, completion) in enumerate(asked)
    ]
    found = {one.key: one for one in engine.score(requests)}
    return [
        {name: values.tolist() for name, values in vars(found[row]).items() if name != "key" and values is not None}
        for row in range(len(asked))
    ]


def main(folder: str, role: str, topk: str = "0") -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints must not come between
    sampling = Sampling(max_tokens=MAX_TOKENS, stop_ids=(IDS[END],)) if role == "sample" else None
    engine = LiveEngine(Path(folder), ENGINE, max_model_len=CONTEXT, sampling=sampling, topk=int(topk))
    print("{}", file=answers, flush=True)  # it is up
    for line in sys.stdin:
        print(json.dumps(answer(engine, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
