"""Where everything of the demo lies."""

from dataclasses import dataclass
from pathlib import Path

STUDENTS = {"pruned": "layers taken out", "sft": "after SFT", "opd": "after OPD"}
"""The three students that are measured, and what each is."""


@dataclass(frozen=True)
class Paths:
    """Where everything of the demo lies."""

    root: Path

    def model(self, student: str) -> Path:
        """The model folder of a student, or of the teacher."""
        return self.root / student / "export" if student in ("sft", "opd") else self.root / "models" / student

    def dataset(self, name: str) -> Path:
        """One of the datasets: sft, rollouts, scored, held-out-<student>."""
        return self.root / "cache" / name

    @property
    def training_prompts(self) -> Path:
        """Prompts of SFT and OPD."""
        return self.root / "prompts.jsonl"

    @property
    def held_out_prompts(self) -> Path:
        """Prompts of the measurement alone."""
        return self.root / "held-out.jsonl"

    def kl(self, student: str) -> Path:
        """The measurement of a student."""
        return self.root / "kl" / f"{student}.json"
