"""A training run, told in order: open, check, load, resume, prove parity, train, save, export."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import Any

import torch
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from common.errors import LopdError, UsageError
from trainer import metrics, objectives
from trainer.batch import Batch
from trainer.checkpoint import Checkpoints, Header, require_same_run, settings_of
from trainer.config import OpdConfig, TrainConfig
from trainer.epoch import steps_per_epoch
from trainer.export import Spec, export, is_exported
from trainer.inputs import Inputs, open_inputs
from trainer.model import load_sharded
from trainer.parity import prove_parity
from trainer.reader import Reader, ahead, step_batches
from trainer.schedule import lr
from trainer.sinks import MetricsFile, step_line
from trainer.step import Rules, train_step
from trainer.world import World

Say = Callable[[str], None]


class Stopped(LopdError):
    """SIGTERM came; the state is saved."""

    exit_code = 143


@dataclass(frozen=True)
class Run:
    """All that stays the same from the first step to the last."""

    config: TrainConfig
    world: World
    inputs: Inputs
    total_steps: int
    say: Say

    def header(self, step: int) -> Header:
        """What a checkpoint after `step` steps is a checkpoint of."""
        epoch, position = divmod(step, steps_per_epoch(self.inputs.dataset.num_rows, self.config.rows_per_step))
        return Header(
            step=step,
            epoch=epoch,
            step_in_epoch=position,
            manifest_sha256=self.inputs.dataset.manifest_sha256,
            start_sha256=self.inputs.start.tensors_sha256,
            settings=settings_of(self.config),
            overrides=self.inputs.provenance.overrides,
        )

    def export_spec(self) -> Spec:
        """What the export after the last step is to be."""
        return Spec(
            header=self.header(self.total_steps),
            dtype=self.config.export_dtype,
            provenance=self.inputs.provenance,
            stop_ids=self.inputs.dataset.plan["sampling"]["stop_ids"],
            chat_template=self.inputs.chat_template,
        )


def train(config: TrainConfig, world: World, say: Say) -> None:
    """Train from `config.model` on `config.data` into `config.output`; a finished run is left as it is.

    Args:
        say: takes a line for the person who watches; called on rank 0 only.

    Raises:
        LopdError: anything a user can act on; what is saved stays, and the same command resumes.
    """
    tell = say if world.is_first else _quiet
    run = _open_run(config, world, tell)
    checkpoints = Checkpoints(config.output, world, config.keep_last, tell)
    done = _resumable_step(run, checkpoints)
    if done == run.total_steps and world.from_first(lambda: is_exported(config.output, run.export_spec())):
        tell(f"already finished: {config.output}/export")
        return
    model = _load(run)
    optimizer = _optimizer(model, config)
    reader = Reader(run.inputs.dataset, run.inputs.lengths, cached_shards=config.shuffle_shards + 1)
    if done:
        checkpoints.restore(model, optimizer, done)
        tell(f"resuming after step {done} of {run.total_steps}")
    elif isinstance(config, OpdConfig):
        prove_parity(model, reader, config, world, tell)
    _steps(run, model, optimizer, reader, checkpoints, done)
    export(model, run.inputs.folder, config.output, world, run.export_spec())
    tell(f"exported to {config.output}/export")


def _open_run(config: TrainConfig, world: World, tell: Say) -> Run:
    inputs = open_inputs(config, world)
    per_epoch = steps_per_epoch(inputs.dataset.num_rows, config.rows_per_step)
    total = config.max_steps or config.epochs * per_epoch
    tell(
        f"{inputs.dataset.num_rows} rows, {inputs.dataset.num_tokens:,} completion tokens; "
        f"{total} steps, {per_epoch} an epoch, on {world.size} x {world.device.type}"
    )
    for override in inputs.provenance.overrides:
        tell(f"WARNING: override {override!r} is in force and will be stamped into the export")
    for warning in inputs.warnings:
        tell(f"WARNING: {warning}")
    return Run(config, world, inputs, total, tell)


def _resumable_step(run: Run, checkpoints: Checkpoints) -> int:
    step = checkpoints.newest()
    if step is None:
        return 0
    where = f"{run.config.output}/checkpoints/step-{step:06d}"
    if run.config.resume == "never":
        raise UsageError("the output holds a checkpoint and resume=never", where=where, fix="Choose another output")
    require_same_run(checkpoints.header(step), run.header(step), where)
    if step > run.total_steps:
        raise UsageError(
            f"the output already has {step} steps, more than the {run.total_steps} asked for",
            where=where,
            fix="Raise max_steps or epochs, or choose another output",
        )
    return step


def _load(run: Run) -> PreTrainedModel:
    return load_sharded(
        run.inputs.folder,
        run.world,
        compute=run.config.compute,
        attention=run.config.attention,
        checkpoint_activations=run.config.activation_checkpointing,
    )


def _optimizer(model: PreTrainedModel, config: TrainConfig) -> Optimizer:
    """AdamW, whose decay spares norms and biases: shrinking those shrinks the signal, not the complexity."""
    matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW([group for group in groups if group["params"]], lr=config.lr, betas=config.betas)


def _steps(
    run: Run, model: PreTrainedModel, optimizer: Optimizer, reader: Reader, checkpoints: Checkpoints, done: int
) -> None:
    config, world = run.config, run.world
    log = MetricsFile(config.output, done) if world.is_first else None
    batches = ahead(step_batches(reader, config, world, first=done, stop=run.total_steps, topk=_topk(run)))
    started = time.monotonic()
    stopping = False
    with closing(batches), _terminated() as terminated:
        for step in range(done, run.total_steps):
            record = _one_step(run, model, optimizer, batches, step)
            left = (time.monotonic() - started) / (step + 1 - done) * (run.total_steps - step - 1)
            run.say(step_line(record, run.total_steps, left))
            if log:
                log.append(record)
            stopping = world.any(terminated.is_set())
            if stopping or (step + 1) % config.save_every == 0 or step + 1 == run.total_steps:
                checkpoints.save(model, optimizer, run.header(step + 1))
                if log:
                    log.flush()
            if stopping:
                break
    checkpoints.wait()
    if stopping:
        raise Stopped(f"stopped by SIGTERM after step {step + 1}, which is saved", fix="The same command resumes")


def _one_step(
    run: Run, model: PreTrainedModel, optimizer: Optimizer, batches: Iterator[list[Batch]], step: int
) -> dict[str, Any]:
    """Take optimizer step `step`, counted from 0; returns its line of metrics, with overrides if any."""
    config, world = run.config, run.world
    began = time.monotonic()
    mine = [batch.to(world.device) for batch in next(batches)]
    loaded = time.monotonic()
    rate = lr(
        step,
        peak=config.lr,
        schedule=config.schedule,
        warmup=round(config.warmup * run.total_steps),
        total=run.total_steps,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate
    sums, norm = train_step(model, optimizer, mine, rules_of(config), world)
    optimizer.zero_grad(set_to_none=True)  # now and not in the next step: a save in between needs the memory
    figures = metrics.distillation if isinstance(config, OpdConfig) else metrics.imitation
    total = world.sum(sums)
    seconds = time.monotonic() - began
    overrides = list(run.inputs.provenance.overrides)
    record = figures(total)
    processed = world.sum(torch.tensor(float(sum(batch.input_ids.numel() for batch in mine)))).item()
    return {
        "step": step + 1,
        "epoch": run.header(step).epoch,
        **record,
        "optim/lr": rate,
        "optim/grad_norm": norm,
        "data/processed_tokens": processed,
        "perf/tokens_per_s": processed / seconds,
        "time/step": seconds,
        "time/data": loaded - began,
        **({"overrides": overrides} if overrides else {}),
    }


def rules_of(config: TrainConfig) -> Rules:
    """How this run treats its tokens."""
    if not isinstance(config, OpdConfig):
        return Rules(objectives.imitation, "token", math.inf, config.clip, config.logits_chunk)
    loss = partial(objectives.token_loss, config.objective, max_importance_ratio=config.max_importance_ratio)
    return Rules(loss, config.loss_mean, config.max_importance_ratio, config.clip, config.logits_chunk)


def _topk(run: Run) -> int:
    """How many teacher columns the objective reads."""
    if isinstance(run.config, OpdConfig) and run.config.objective == "topk":
        return run.config.topk or run.inputs.dataset.topk
    return 0


@contextmanager
def _terminated() -> Iterator[Event]:
    """An event that SIGTERM sets, so that a run ends at the end of a step, saved."""
    event = Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


def _quiet(line: str) -> None:
    """What ranks other than the first say."""
