"""Which sampled completions a dataset keeps: by length, repetition, and what a verifier says of them.

A row counts for the first filter that drops it, in the order in which `common.filtered.DROPPED` names them. The
verifier is asked last, and of what the cheap ones left.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError, UsageError
from common.prompts import PromptSet
from common.schema import Rollout
from precompute.config import Filters, Generate
from precompute.filters.repetition import loop_at_end, repeated_share
from precompute.filters.verifier_process import MATH_VERIFY, answer_in
from precompute.filters.verifiers import Failure, Verifier, pin_of

LABEL = "verified"
"""The key of a row's meta that holds the verdict; null where the verifier failed."""
NOT_PLANNED = {"verifier_processes"}
"""Settings that change no row."""


def planned_filters(config: Generate, prompts: PromptSet) -> dict[str, dict[str, Any]]:
    """What a plan says of the filters under the key `filters`, with what pins the verifier; nothing where none is on.

    Raises:
        UsageError: the verifier cannot be loaded, or no completion can be long enough.
        DataError: a prompt lacks the answer, or brings a verdict along already.
    """
    filters = config.filters
    if filters == Filters():
        return {}
    if (filters.min_tokens or 0) > config.sampling.max_tokens:
        raise UsageError(
            f"filters.min_tokens {filters.min_tokens} is above sampling.max_tokens {config.sampling.max_tokens}",
            fix="No completion would be left; mend one of them",
        )
    planned = filters.model_dump(exclude=NOT_PLANNED)
    if filters.verifier is None:
        return {"filters": planned}
    _require_answers(filters, prompts)
    function = filters.verifier.rpartition(":")[2]
    pin = pin_of(filters.verifier, filters.verifier_answer)
    return {"filters": planned | {"verifier": {"name": filters.verifier, "function": function, "pin": pin}}}


def _require_answers(filters: Filters, prompts: PromptSet) -> None:
    for prompt in prompts.prompts:
        where, meta = f"{prompts.source}, prompt {prompt.id}", json.loads(prompt.meta)
        if LABEL in meta:
            raise DataError(f"its meta has a key {LABEL!r}, which the verdict is to have", where=where)
        if filters.verifier == MATH_VERIFY:
            try:
                answer_in(meta, filters.verifier_answer)
            except LookupError as error:
                raise DataError(f"{error.args[0]}", where=where, fix="Set filters.verifier_answer") from None


def falls_to(row: Rollout, filters: Filters) -> str | None:
    """The first of the cheap filters that drops the row, by its name in a commit's statistics; None to keep it."""
    tokens, truncated = len(row.completion_ids), row.finish_reason == "length"
    said = row.completion_ids if truncated else row.completion_ids[:-1]  # without the token that ended it
    if filters.drop_truncated and truncated:
        return "dropped_truncated"
    if filters.min_tokens is not None and tokens < filters.min_tokens:
        return "dropped_short"
    if filters.max_tokens is not None and tokens > filters.max_tokens:
        return "dropped_long"
    if filters.drop_loops and loop_at_end(said):
        return "dropped_loop"
    if filters.max_repetition is not None and repeated_share(said, filters.repetition_ngram) > filters.max_repetition:
        return "dropped_repetition"
    return None


class Keeper:
    """Applies the filters of a plan to the rows of whole shards; several threads may, each with another shard.

    Args:
        filters: the plan's, with the verifier where this box has it.
        planned: what the plan has under `filters`; None where there are none.
        decode: token ids, (tokens,), as the text that a verifier reads.
        log: the file to which goes what the verifier prints.
        tell: told of each shard on which the verifier failed.
    """

    def __init__(
        self,
        filters: Filters,
        planned: Mapping[str, Any] | None,
        decode: Callable[[np.ndarray], str],
        log: Path,
        tell: Callable[[str], None],
    ) -> None:
        self._filters, self._decode, self._tell = filters, decode, tell
        self._verifier: Verifier | None = None
        if planned is not None and filters.verifier is not None:
            self._verifier = Verifier(
                filters.verifier,
                filters.verifier_answer,
                filters.verifier_timeout_s,
                filters.verifier_processes,
                pin=planned["verifier"]["pin"],
                log=log,
            )

    @property
    def judged(self) -> int:
        """Completions that the verifier has judged so far."""
        return 0 if self._verifier is None else self._verifier.judged

    def keep(self, rows: Sequence[Rollout], where: str = "") -> tuple[list[Rollout], dict[str, float]]:
        """The rows that are kept, with their verdicts, and how many were dropped by each filter that is on.

        Args:
            rows: all of a shard, in dataset order.
            where: the shard, for what is told.

        Raises:
            UsageError, DataError: the verifier cannot be loaded here, or is not the one of the plan.
        """
        counts = Counter(dict.fromkeys(self._counted(), 0))
        left: list[Rollout] = []
        for row in rows:
            name = falls_to(row, self._filters)
            counts.update([name] if name else [])
            left += [] if name else [row]
        if self._filters.drop_duplicates:
            left, left_out = _distinct(left)
            counts["dropped_duplicate"] += left_out
        if self._verifier is not None:
            left = self._judged(left, self._verifier, counts, where)
        if self._filters.per_prompt is not None:
            left, left_out = _first(left, self._filters.per_prompt)
            counts["dropped_extra"] += left_out
        return left, {name: float(count) for name, count in counts.items()}

    def close(self) -> None:
        """End the verifier's processes."""
        if self._verifier is not None:
            self._verifier.close()

    def _counted(self) -> list[str]:
        filters = self._filters
        judged, choosy = filters.verifier is not None, filters.keep == "correct"
        on = {
            "dropped_truncated": filters.drop_truncated,
            "dropped_short": filters.min_tokens is not None,
            "dropped_long": filters.max_tokens is not None,
            "dropped_loop": filters.drop_loops,
            "dropped_repetition": filters.max_repetition is not None,
            "dropped_duplicate": filters.drop_duplicates,
            "dropped_wrong": choosy,
            "dropped_unverified": choosy,
            "dropped_extra": filters.per_prompt is not None,
            "judged": judged,
            "judged_correct": judged,
            "verifier_failed": judged,
        }
        return [name for name, is_on in on.items() if is_on]

    def _judged(self, rows: list[Rollout], verifier: Verifier, counts: Counter[str], where: str) -> list[Rollout]:
        """The rows with their verdicts; of a choosy filter, those found correct."""
        verdicts = verifier.judge([(self._decode(row.completion_ids), row.meta) for row in rows])
        failures = [(row, one) for row, one in zip(rows, verdicts, strict=True) if isinstance(one, Failure)]
        counts["judged"] += len(rows)
        counts["judged_correct"] += sum(one is True for one in verdicts)
        counts["verifier_failed"] += len(failures)
        if failures:
            row, failure = failures[0]
            self._tell(
                f"{where}: the verifier failed on {len(failures)} of {len(rows)} completions, "
                f"the first is {row.uid}: {failure.reason}"
            )
        if self._filters.keep == "correct":
            counts["dropped_wrong"] += sum(one is False for one in verdicts)
            counts["dropped_unverified"] += len(failures)
            pairs = [(row, one) for row, one in zip(rows, verdicts, strict=True) if one is True]
        else:
            pairs = list(zip(rows, verdicts, strict=True))
        return [_labelled(row, None if isinstance(one, Failure) else one) for row, one in pairs]


def _labelled(row: Rollout, verdict: bool | None) -> Rollout:
    meta = {**json.loads(row.meta), LABEL: verdict}
    return replace(row, meta=json.dumps(meta, sort_keys=True, ensure_ascii=False))


def _distinct(rows: Sequence[Rollout]) -> tuple[list[Rollout], int]:
    """The first of the completions of a prompt that have the same tokens, and how many went."""
    seen: dict[tuple[str, bytes], Rollout] = {}
    for row in rows:
        seen.setdefault((row.prompt_id, row.completion_ids.tobytes()), row)
    return list(seen.values()), len(rows) - len(seen)


def _first(rows: Sequence[Rollout], count: int) -> tuple[list[Rollout], int]:
    """The first `count` rows of each prompt, and how many went."""
    taken: Counter[str] = Counter()
    left = []
    for row in rows:
        taken[row.prompt_id] += 1
        left += [row] if taken[row.prompt_id] <= count else []
    return left, len(rows) - len(left)
