"""What the study compares: sizes of the experiment, and the ways to distil."""

import re
from dataclasses import dataclass, field
from typing import Any

SHORT = 60
"""Optimizer steps at which arms are compared."""


@dataclass(frozen=True)
class Extent:
    """How large the experiment is."""

    teacher_steps: tuple[int, int] = (200, 200)
    """Of practice, once they have learned the task: in any order, and then in one."""
    base_steps: int = 400
    """Of practice, of the base model."""
    noise: float = 0.3
    """Laid over the base model's weights, as a share of their standard deviation."""
    answers: int = 512
    """Of the teacher, for SFT: few, so that SFT on them comes to an end."""
    sft_steps: int = 100
    """Many times over the answers, to where more bring little."""
    rollouts: int = 4096
    """Of a student, in one precompute."""
    rows_per_step: int = 256
    held_out: int = 1024
    """Questions of each seed on which everything is measured."""
    lr: float = 3e-4
    """Of all ways to distil, constant."""
    stops: tuple[int, ...] = (SHORT, 2 * SHORT, 3 * SHORT)
    """Steps at which the long arms are measured."""


@dataclass(frozen=True)
class Arm:
    """One way to distil."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the trainer's [opd], beside those that all arms share."""

    def warmed_up(self) -> "Arm":
        """The same, with a learning rate that rises over the first steps."""
        return Arm(f"{self.name}, warm-up", {**self.settings, "warmup": WARM_UP})

    def at_rate(self, lr: float) -> "Arm":
        """The same, with another learning rate."""
        return Arm(f"{self.name}, lr = {lr:g}", {**self.settings, "lr": lr})

    @property
    def slug(self) -> str:
        """The name, as files may be called."""
        return re.sub(r"\W+", "-", self.name)


PAPER = Arm("paper", {"objective": "paper", "loss_mean": "rollout"})
"""As in the paper."""
IMPORTANCE = Arm("importance", {"objective": "importance"})
"""What the trainer does of itself where a dataset stores no top-k."""
FULL_SUPPORT = Arm("topk reverse, k = all", {"objective": "topk", "kl": "reverse", "topk": 0})
"""KL over the whole vocabulary at the stored states."""
OBJECTIVES = (
    PAPER,
    Arm("paper, token mean", {"objective": "paper"}),
    Arm("paper, clipped at 1 nat", {"objective": "paper", "clip_advantage": 1.0}),
    Arm("proximal", {"objective": "proximal"}),
    IMPORTANCE,
    *(Arm(f"topk reverse, k = {k}", {"objective": "topk", "kl": "reverse", "topk": k}) for k in (1, 4, 16)),
    FULL_SUPPORT,
    *(Arm(f"topk forward, k = {k or 'all'}", {"objective": "topk", "kl": "forward", "topk": k}) for k in (1, 4, 16, 0)),
)
WARM_UP = 0.2
"""Share of the steps in which the learning rate rises, where it does. Every run begins with a new AdamW."""
OTHER_RATES = (1e-4, 1e-3)
"""A third and three times the learning rate of all others."""
ROUNDS = (1, 2, 3, 5)
ROUNDS_ROWS, ROUNDS_ROLLOUTS = 128, 3840
"""Rows a step and rollouts in all, of the arms that refresh: no round has a step that is not full, and each goes twice
over its rollouts."""
TRUNCATIONS = (5, 10)
"""A quarter and a half of a mean answer."""
TEMPERATURES = (0.7, 1.3)
