"""`python -m tests.precompute.engine.v2_engine MODEL FILE`: what one engine samples and grades, in every way, as JSON.

In a process of its own, for an engine is never alone in a process that had another one; `interpreted` says how the V2
model runner comes to run in it.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.chat import Template, load_tokenizer
from common.prompts import Prompt
from common.schema import Rollout
from precompute.config import Engine as EngineConfig
from precompute.config import Sampling, Support
from precompute.engine.door import Engine
from precompute.generate import generate, samples_of
from precompute.score import Unscored, score
from precompute.self_test import batch_noise

TOPK, STOP_ID = 3, 261
PROMPTS = ("Count to 3.", "the dog in the fog", "do")


def main(folder: Path, file: Path) -> None:
    sampling = Sampling(samples=2, max_tokens=16, stop_ids=(STOP_ID,), seed=7)
    config = EngineConfig(dtype="float32", max_num_seqs=4, cpu_kv_gib=0.1, compile=False)
    engine = Engine(folder, config, max_model_len=64, sampling=sampling, topk=TOPK, support="student")
    by_id = engine.scores_by_id
    samples = samples_of(0, [Prompt(f"p{i}", text) for i, text in enumerate(PROMPTS)], len(PROMPTS), sampling.samples)
    drawn = generate(engine, samples, load_tokenizer(folder), Template(), plan_seed=7, keep_text=False)
    rollouts = _in_order(drawn)
    rows = [Unscored(0, index, rollout) for index, rollout in enumerate(rollouts)]

    def graded(topk: int, support: Support, scores_by_id: bool) -> list[Rollout]:
        engine.scores_by_id, engine._topk = scores_by_id, topk
        return _in_order(score(engine, rows, topk=topk, support=support))

    found = {
        "scores_by_id": by_id,
        "rollouts": rollouts,
        "by_id": graded(0, "teacher", scores_by_id=True),
        "in_prompt": graded(0, "teacher", scores_by_id=False),
        "students_top": graded(TOPK, "student", scores_by_id=True),
        "teachers_top": graded(TOPK, "teacher", scores_by_id=False),
        "noise_by_id": _noise(engine, rows, scores_by_id=True),
        "noise_in_prompt": _noise(engine, rows, scores_by_id=False),
    }
    file.write_text(json.dumps(found, default=_plain))


def _noise(engine: Engine, rows: Sequence[Unscored], scores_by_id: bool) -> float | None:
    engine.scores_by_id, engine._topk = scores_by_id, 0
    return batch_noise(engine, rows)


def _in_order(finished: Any) -> list[Rollout]:
    row: Callable[[tuple[Any, Rollout]], int] = lambda pair: pair[0].row  # noqa: E731
    return [rollout for _, rollout in sorted(finished, key=row)]


def _plain(value: Any) -> Any:
    return vars(value) if isinstance(value, Rollout) else value.tolist()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
