"""When the trainer's gauges would have spoken, from the metrics of a run."""

from benchmarks.study.beyond.staleness import spent_at


def metrics(**by_step: list[float]) -> dict[str, list[float]]:
    """Of twelve steps, healthy ones but for what is given."""
    well = {"kl/rollout_k3": 0.02, "ratio/ess": 0.95, "ratio/clipped": 0.0, "kl/teacher_k1": 0.05, "entropy": 0.4}
    return {key: by_step.get(key.rpartition("/")[2], [value] * 12) for key, value in well.items()}


def test_rollouts_are_spent_at_the_step_where_the_trainer_says_so() -> None:
    assert spent_at(metrics()) == "never"
    assert spent_at(metrics(rollout_k3=[0.02] * 4 + [0.2] * 8)) == "7"  # the median of five steps
    assert spent_at(metrics(ess=[0.95] * 8 + [0.3] + [0.95] * 3)) == "never"
