"""The live baseline samples and scores with the weights of now: with those of a step ago it would be no baseline."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.study.live import EngineProcess
from benchmarks.study.setting.networks import Size, encode, save

PROMPT, ANSWER = encode("c9a3d4="), encode("a3,c2;d6#6$")
TOLERANCE = 1e-3


def _network(folder: Path, seed: int) -> LlamaForCausalLM:
    model = Size(width=32, layers=1, heads=1).build(seed).eval()
    save(model, folder)
    return model


@torch.no_grad()
def _logprobs(model: LlamaForCausalLM) -> list[float]:
    logps = model(torch.tensor([PROMPT + ANSWER])).logits[0].log_softmax(-1)
    return [logps[len(PROMPT) - 1 + index, token].item() for index, token in enumerate(ANSWER)]


@pytest.mark.slow
def test_an_engine_scores_with_the_weights_that_it_was_given_last(tmp_path: Path) -> None:
    first, second = (_network(tmp_path / str(seed), seed) for seed in (0, 1))
    with EngineProcess(tmp_path / "0", "score", tmp_path / "log") as engine:
        before = engine.ask("score", [(PROMPT, ANSWER)])[0]["logprobs"]
        engine.ask("load", str(tmp_path / "1"))
        after = engine.ask("score", [(PROMPT, ANSWER)])[0]["logprobs"]
    assert before == pytest.approx(_logprobs(first), abs=TOLERANCE)
    assert after == pytest.approx(_logprobs(second), abs=TOLERANCE)
    assert before != pytest.approx(after, abs=10 * TOLERANCE)
