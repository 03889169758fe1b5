"""The only door to vLLM: token ids in; token ids, log-probs and top-k out, one finished request at a time.

Text never crosses this door: re-tokenised text is not what was sampled. Requests stream through a bounded window
(`LLM.enqueue` and the engine's own `step`), so that finished rows leave memory at once.
"""

import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from pydantic import ValidationError
from safetensors import SafetensorError

from common.errors import DataError, UsageError
from precompute.config import Engine as EngineConfig
from precompute.config import Sampling, Support
from precompute.engine.requests import (
    EngineDied,
    GenerateRequest,
    Generation,
    RequestRefused,
    ScoreRequest,
    Scores,
    Watch,
    memory_ran_out,
)
from precompute.engine.vllm_outputs import generation, scores_by_id, scores_from_prompt
from precompute.engine.vllm_requests import sampled, scored_by_id, scored_in_prompt, whole
from precompute.engine.vllm_settings import import_vllm, runs_v2, settings, usual_window

WATCH_S = 1.0
"""Between two looks at whether vLLM's engine process lives."""
CORE_FAILED = "Engine core initialization failed"
"""What vLLM says where its engine is a process of its own, whatever that failed of: settings, a GPU, or memory."""
MAY_DIE_OF = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError),
    *(OSError, RuntimeError, TypeError, ValueError),
)
"""What comes out of a step that failed, where the engine runs in this process; its state is then anybody's guess."""

Request = TypeVar("Request", GenerateRequest, ScoreRequest)
Result = TypeVar("Result")


class Engine:
    """One vLLM engine in this process. A process holds one: only its exit surely frees a GPU."""

    def __init__(
        self,
        folder: Path,
        config: EngineConfig,
        *,
        max_model_len: int,
        sampling: Sampling | None = None,
        topk: int = 0,
        support: Support = "teacher",
        watch: Watch | None = None,
        window: int | None = None,
    ) -> None:
        """Load the model in `folder`.

        Args:
            max_model_len: longest prompt and completion together, plus one, in tokens.
            sampling: how `generate` samples; None for an engine that only scores.
            topk: how many further tokens `score` grades at each position, and `generate` names.
            support: whose most likely tokens `score` grades: this engine's, or the ones that come with each request.
            watch: who is told which rows enter the engine, and of every step.
            window: rows in the engine at once at most; None for as many as keep it busy. Steps shrink with it.

        Raises:
            UsageError: vLLM cannot load this model with these settings, or cannot grade ids that are given to it; the
                latter is told before the model is loaded.
            DataError: the weights cannot be read.
            EngineDied: memory ran out, or an engine in a process of its own did not start, which leaves the reason only
                in what it printed.
        """
        self._sampling, self._topk, self.watch = sampling, topk, watch
        self.window = usual_window(config) if window is None else window
        """Rows in the engine at once at most; it may be changed between two streams."""
        vllm = import_vllm()
        self._params: Callable[..., Any] = vllm.SamplingParams
        self._died: type[Exception] = vllm.v1.engine.exceptions.EngineDeadError
        self._refused: type[Exception] = vllm.exceptions.VLLMClientError
        given = settings(
            folder,
            config,
            cpu=vllm.platforms.current_platform.is_cpu(),
            max_model_len=max_model_len,
            window=self.window,
            sampling=sampling,
            topk=topk,
        )
        with _loading(folder, vllm.exceptions.VLLMError):
            if support == "student":
                _require_v2(vllm, given, folder)
            self._llm = vllm.LLM(**given)
        self.alive = True
        """Whether it can be given more rows."""
        self.waiting = False
        """Whether a call to vLLM is under way."""
        resources = getattr(self._llm.llm_engine.engine_core, "resources", None)
        if hasattr(resources, "engine_dead"):  # only where the engine is a process of its own
            Thread(target=_watch, args=(weakref.ref(self), resources), name="engine-watchdog", daemon=True).start()
        v2 = bool(self._llm.llm_engine.vllm_config.use_v2_model_runner)
        self.scores_by_id = support == "student" or (topk == 0 and v2)
        """Whether the engine can score given ids at the completion's positions alone (the V2 model runner)."""

    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[Generation]:
        """Sample one completion a request; results come as they finish, in any order.

        Raises:
            EngineDied: the engine died of what it was given, or of something else.
            DataError: vLLM refuses a request, and nobody watches; or it returns something else than it sampled.
        """
        sampling, topk = self._sampling, self._topk
        if sampling is None:
            raise AssertionError("this engine was built to score")
        return self._stream(
            requests,
            lambda r: (r.prompt_ids, sampled(r, sampling, topk)),
            lambda r, output: generation(r, output, topk),
        )

    def close(self) -> None:
        """End it, and the processes of its own that it may have."""
        self.alive = False
        self._llm.llm_engine.engine_core.shutdown()

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Scores]:
        """Grade every completion token; results come as they finish, in any order. Raises as `generate` does."""
        if self.scores_by_id:
            return self._stream(requests, lambda r: (whole(r), scored_by_id(r)), scores_by_id)
        topk = self._topk
        return self._stream(
            requests,
            lambda r: (whole(r), scored_in_prompt(topk)),
            lambda r, output: scores_from_prompt(r, output, topk),
        )

    def _stream(
        self,
        requests: Iterable[Request],
        enter: Callable[[Request], tuple[list[int], dict[str, Any]]],
        leave: Callable[[Request, Any], Result],
    ) -> Iterator[Result]:
        source, inside = iter(requests), dict[str, Request]()
        try:
            while True:
                fresh = list(islice(source, max(0, self.window - len(inside))))
                self._fill(inside, fresh, enter)
                if not inside and not fresh:
                    return
                if not inside:  # all of them were refused
                    continue
                with self._call():
                    outputs = self._llm.llm_engine.step()
                if self.watch:
                    self.watch.stepped()
                for output in outputs:
                    if output.finished:
                        yield leave(inside.pop(output.request_id), output)
        finally:
            if inside and self.alive:  # else the next stream would be given their outputs
                self._llm.llm_engine.abort_request(list(inside))

    def _fill(
        self,
        inside: dict[str, Request],
        fresh: list[Request],
        enter: Callable[[Request], tuple[list[int], dict[str, Any]]],
    ) -> None:
        """Give the engine further rows, after whoever watches has been told of all of them."""
        if fresh and self.watch:
            self.watch.entering([request.uid for request in fresh])
        for request in fresh:
            prompt_ids, asked = enter(request)
            try:
                with self._call(request.uid):
                    prompts, params = [{"prompt_token_ids": prompt_ids}], [self._params(**asked)]
                    [request_id] = self._llm.enqueue(prompts, params, use_tqdm=False)
            except RequestRefused as error:
                if not self.watch:
                    raise
                self.watch.refused(request.uid, error.what)
            else:
                inside[request_id.partition("-")[0]] = request  # outputs come without the random suffix

    @contextmanager
    def _call(self, uid: str = "") -> Iterator[None]:
        """A call to vLLM, which the watchdog ends if nobody is left to answer it; what it dies of ends this engine."""
        self.waiting = True
        try:
            yield
        except self._refused as error:
            where = f"row {uid}" if uid else ""
            raise RequestRefused(f"vLLM refuses a request: {_first_line(error)}", where=where) from None
        except self._died:
            self.alive = False
            raise _engine_died() from None
        except MAY_DIE_OF as error:
            self.alive = False
            raise _engine_died(error) from error
        finally:
            self.waiting = False


def _require_v2(vllm: Any, given: dict[str, Any], folder: Path) -> None:
    if not runs_v2(vllm, given):
        raise UsageError(
            "this engine cannot grade the student's top-k: vLLM runs this model here without its V2 model runner",
            where=str(folder),
            fix='Score on a GPU, or with topk_support = "teacher"',
        )


@contextmanager
def _loading(folder: Path, vllm_error: type[Exception]) -> Iterator[None]:
    """What goes wrong while a model is loaded, as ours."""
    try:
        yield
    except (ValueError, RuntimeError, AssertionError, MemoryError, vllm_error) as error:
        said = _first_line(error)
        if memory_ran_out(f"{type(error).__name__} {error}"):
            raise EngineDied(
                f"no memory left to load the model: {said}",
                out_of_memory=True,
                where=str(folder),
                fix="Lower engine.max_num_seqs or engine.gpu_memory_utilization, or take more GPUs a replica",
            ) from error
        if CORE_FAILED in said:
            raise EngineDied(
                f"vLLM's engine did not start; the reason stands in its log: {said}", where=str(folder)
            ) from error
        raise UsageError(f"vLLM cannot load the model: {said}", where=str(folder)) from error
    except SafetensorError as error:
        raise DataError(
            f"the weights cannot be read: {_first_line(error)}", where=str(folder), fix="Fetch or export them again"
        ) from error


def _watch(engine: "weakref.ref[Engine]", resources: Any) -> None:
    """End this process when vLLM's engine process died while we wait for its answer, which then never comes.

    vLLM marks an orderly end in the same way, so only a death in the midst of a call counts; and it counts at the
    second look, because vLLM may yet raise an error of its own. Who watches the engine is told first, and may save what
    does not need it.
    """
    looks = 0
    while (watched := engine()) is not None:
        looks = looks + 1 if resources.engine_dead and watched.waiting else 0
        if looks == 2:
            error = _engine_died()
            sys.stderr.write(f"\nerror: {error}\n")
            sys.stderr.flush()
            try:
                if watched.watch:
                    watched.watch.dying()
            finally:  # also when nothing could be saved: the caller would wait for ever
                os._exit(error.exit_code)
        del watched  # or this thread would keep the engine, and whoever watches it, from going
        time.sleep(WATCH_S)


def _engine_died(error: Exception | None = None) -> EngineDied:
    """`error` is what a step raised; None where the engine's own process took it along."""
    return EngineDied(
        f"vLLM's engine died: {_first_line(error)}" if error else "vLLM's engine died; the reason stands above",
        out_of_memory=error is not None and memory_ran_out(f"{type(error).__name__} {error}"),
        fix="What is committed is safe: the same command resumes. If memory ran out, lower engine.max_num_seqs "
        "or engine.gpu_memory_utilization",
    )


def _first_line(error: BaseException) -> str:
    if isinstance(error, ValidationError):  # its own first line only counts the errors
        return error.errors()[0]["msg"].removeprefix("Value error, ").splitlines()[0]
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
