"""What vLLM is told, by the size of the window."""

from pathlib import Path
from typing import Any

import pytest

from precompute.config import Engine, Sampling
from precompute.engine.vllm_settings import CPU_TOKENS, LEAST_TOKENS, USUAL_TOKENS, settings, usual_window

CONFIG = Engine(max_num_seqs=256)


def told(window: int | None = None, config: Engine = CONFIG, **changes: Any) -> dict[str, Any]:
    usual = {"cpu": False, "max_model_len": 5000, "sampling": None, "topk": 0}
    return settings(Path("m"), config, **{"window": window or usual_window(config), **usual, **changes})


def test_the_usual_window_leaves_the_size_of_a_step_to_the_config_and_to_vllm() -> None:
    assert (told()["max_num_seqs"], told()["max_num_batched_tokens"]) == (256, None)
    assert told(config=Engine(max_batched_tokens=3000))["max_num_batched_tokens"] == 3000
    assert told(window=10_000)["max_num_seqs"] == 256


def test_steps_shrink_with_the_window() -> None:
    halved = told(window=256)
    assert (halved["max_num_seqs"], halved["max_num_batched_tokens"]) == (128, USUAL_TOKENS // 2)
    given = told(window=256, config=Engine(max_num_seqs=256, max_batched_tokens=4096))
    assert given["max_num_batched_tokens"] == 2048


def test_a_row_fits_into_the_smallest_step_there_is() -> None:
    alone = told(window=1)
    assert (alone["max_num_seqs"], alone["max_num_batched_tokens"]) == (1, LEAST_TOKENS)  # longer ones go in chunks
    whole = told(window=1, cpu=True)
    assert whole["enable_chunked_prefill"] is False
    assert whole["max_num_batched_tokens"] == 5000
    assert told(cpu=True, max_model_len=100)["max_num_batched_tokens"] == CPU_TOKENS


@pytest.mark.parametrize("topk", [0, 1, 64])
def test_as_many_ids_may_be_asked_for_as_a_position_has_columns(topk: int) -> None:
    assert told(topk=topk)["max_logprobs"] == topk + 1


def test_a_prefix_is_kept_for_samples_and_never_for_scores() -> None:
    """Rows that a cache supplies have no log-probs."""
    assert told()["enable_prefix_caching"] is False
    assert told(sampling=Sampling())["enable_prefix_caching"] is True


def test_log_probs_are_of_the_distribution_that_sampled() -> None:
    assert "logprobs_mode" not in told(sampling=Sampling())
    assert told(sampling=Sampling(temperature=0.7))["logprobs_mode"] == "processed_logprobs"


def test_code_of_a_model_runs_only_when_it_is_asked_for() -> None:
    assert told()["trust_remote_code"] is False
