"""The student's most likely ids at each position: stored with its rollouts, for the teacher to grade."""

from common.errors import UsageError
from common.plans import Plan
from common.schema import widths_in
from precompute.config import Generate, Score


def planned_topk(kind: str, config: Generate, vocab_size: int) -> dict[str, int]:
    """What the plan says of the student's top-k: nothing where none is stored, as plans did before it was known.

    Raises:
        UsageError: it asks for what the vocabulary, the sampling or the kind of dataset does not have.
    """
    if not config.topk:
        return {}
    sampling = config.sampling
    if kind != "rollouts":
        raise UsageError("the teacher's own answers have no student's top-k", where="sft_data.topk", fix="Leave it out")
    if config.topk > vocab_size:
        raise UsageError(f"topk {config.topk} exceeds the student's vocabulary of {vocab_size}", where="rollouts.topk")
    if (sampling.top_p, sampling.top_k, sampling.min_p) != (1, 0, 0):
        raise UsageError(
            "top_p, top_k and min_p cut off ids that the student's top-k should hold",
            where="rollouts.topk",
            fix="Sample without them, or score with the teacher's top-k",
        )
    return {"rollout_topk": config.topk}


def planned_support(config: Score, rollouts: Plan) -> dict[str, str]:
    """What the plan says of whose top-k is graded: nothing where it is the teacher's.

    Args:
        rollouts: the plan of those that are to be scored, whether they are made yet or not.

    Raises:
        UsageError: it shall be the student's, of which the rollouts do not hold so many.
    """
    if config.topk_support == "teacher":
        return {}
    stored = widths_in(rollouts).rollout_topk
    if not 1 <= config.topk <= stored:
        raise UsageError(
            f"topk_support = student asks for {config.topk} ids a position, the rollouts hold {stored}",
            where=config.rollouts,
            fix=f"Give a topk of 1 to {stored}" if stored else "Sample them anew with [rollouts] topk",
        )
    return {"topk_support": config.topk_support}
