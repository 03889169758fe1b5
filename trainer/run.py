"""A run before its first step: what it reads, how many steps it has, how it treats its tokens."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from trainer import objectives
from trainer.config import OpdConfig, TrainConfig
from trainer.epoch import steps_per_epoch
from trainer.export import Spec
from trainer.header import Header, settings_of
from trainer.inputs import Inputs, objective_line, open_inputs, topk_of, with_objective
from trainer.memory_plan.dry_run import memory_line
from trainer.reader import plan_line
from trainer.step import Rules
from trainer.world import World

Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """All that stays the same from the first step to the last."""

    config: TrainConfig
    world: World
    inputs: Inputs
    total_steps: int
    say: Say

    @property
    def topk(self) -> int:
        """How many teacher columns the objective reads."""
        return topk_of(self.config, self.inputs.dataset.topk)

    def header(self, step: int) -> Header:
        """What a checkpoint after `step` steps is a checkpoint of."""
        epoch, position = divmod(step, steps_per_epoch(len(self.inputs.lengths), self.config.rows_per_step))
        return Header(
            step=step,
            epoch=epoch,
            step_in_epoch=position,
            manifest_sha256=self.inputs.dataset.manifest_sha256,
            start_sha256=self.inputs.start.tensors_sha256,
            settings=settings_of(self.config),
            overrides=self.inputs.provenance.overrides,
        )

    def epochs_at(self, step: int) -> float:
        """How often the dataset has been gone through after `step` steps."""
        return step / steps_per_epoch(len(self.inputs.lengths), self.config.rows_per_step)

    def export_spec(self) -> Spec:
        """What the export after the last step is to be."""
        return Spec(
            header=self.header(self.total_steps),
            dtype=self.config.export_dtype,
            provenance=self.inputs.provenance,
            start=self.inputs.start,
            scored_by=self.inputs.scored_by,
            stop_ids=self.inputs.dataset.plan["sampling"]["stop_ids"],
            chat_template=self.inputs.chat_template,
        )


def open_run(config: TrainConfig, world: World, tell: Say) -> Run:
    """Open and check the inputs, and say what is about to happen."""
    inputs = open_inputs(config, world)
    config = with_objective(config, inputs.dataset)
    per_epoch = steps_per_epoch(len(inputs.lengths), config.rows_per_step)
    total = config.max_steps or config.epochs * per_epoch
    tell(
        f"{_round(inputs)}{len(inputs.lengths)} rows, {inputs.lengths.completion.sum(dtype=int):,} completion tokens, "
        f"{len(inputs.held_out)} rows held out; {total} steps, {per_epoch} an epoch, "
        f"on {world.size} x {world.device.type}"
    )
    if isinstance(config, OpdConfig):
        tell(objective_line(config, inputs.dataset))
    tell(plan_line(inputs.dataset, inputs.lengths, config, world.size))
    if world.is_first:
        tell(memory_line(config, inputs.folder, inputs.dataset, inputs.lengths, world))
    for override in inputs.provenance.overrides:
        tell(f"WARNING: override {override!r} is in force and will be stamped into the export")
    for warning in inputs.warnings:
        tell(f"WARNING: {warning}")
    return Run(config, world, inputs, total, tell)


def _round(inputs: Inputs) -> str:
    return f"round {inputs.provenance.round}: " if inputs.provenance.role == "opd" else ""


def rules_of(config: TrainConfig) -> Rules:
    """How this run treats its tokens; the objective is chosen."""
    if not isinstance(config, OpdConfig):
        return Rules(objectives.imitation, "token", math.inf, config.clip, config.logits_chunk)
    assert config.objective != "auto"
    loss = partial(
        objectives.token_loss,
        config.objective,
        max_importance_ratio=config.max_importance_ratio,
        clip_advantage=math.inf if config.clip_advantage is None else config.clip_advantage,
        proximal_alpha=config.proximal_alpha,
        kl=config.kl,
        kl_forward_share=config.kl_forward_share,
        token_weights=config.token_weights,
        anchor_weight=config.anchor,
    )
    return Rules(loss, config.loss_mean, config.max_importance_ratio, config.clip, config.logits_chunk)
