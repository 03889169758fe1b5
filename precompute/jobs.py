"""What a worker is told, of a phase that is planned."""

from common.plans import Plan
from precompute.config import Generate, Score
from precompute.engine.vllm_settings import usual_window
from precompute.fleet.messages import Job
from precompute.fleet.status import Phase
from precompute.plan import Job as Planned


def job_of(phase: Phase, section: Generate | Score, planned: Planned, plan: Plan, model: str) -> Job:
    """The job of a phase.

    Args:
        plan: as it lies in the dataset, which another box may have begun.
        model: Hub id, folder or URL.
    """
    return Job(
        phase=phase,
        section=section.model_dump(mode="json"),
        plan=plan,
        model=model,
        folder=str(planned.folder),
        max_model_len=planned.max_model_len,
        window=usual_window(section.engine),
    )
