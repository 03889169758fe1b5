"""A training run, told in order: open, check, load, resume, prove parity, train, save, export."""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from common.errors import LopdError
from common.urls import clean_url
from trainer.batch import Batch
from trainer.checkpoint import Checkpoints
from trainer.config import OpdConfig, TrainConfig
from trainer.export import export, is_exported
from trainer.model import COMPUTE_TYPES, load_sharded
from trainer.output import require_own_place, resumable
from trainer.parity import prove_parity
from trainer.postmortem import NotFinite, keep
from trainer.reader import Reader, ahead, step_batches
from trainer.run import Run, Say, open_run, rules_of
from trainer.schedule import lr
from trainer.self_test import prove_forward
from trainer.step import train_step
from trainer.validation import Validation
from trainer.watch.meter import Meter
from trainer.watch.run_record import recorded
from trainer.watch.sinks import watched
from trainer.watch.trackers import require_trackers
from trainer.world import World, is_lost_rank


class Stopped(LopdError):
    """SIGTERM came; the state is saved."""

    exit_code = 143


def train(config: TrainConfig, world: World, say: Say) -> None:
    """Train from `config.model` on `config.data` into `config.output`; a finished run is left as it is.

    Args:
        say: takes a line for the person who watches; called on rank 0 only.

    Raises:
        LopdError: anything a user can act on; what is saved stays, and the same command resumes.
    """
    tell = say if world.is_first else _quiet
    require_own_place(config)
    require_trackers(config.trackers)
    run = open_run(config, world, tell)
    config = run.config
    checkpoints = Checkpoints(config.output, world, config.keep_last, tell)
    found = resumable(run, checkpoints)
    done = found.step if found else 0
    if found:
        run = replace(run, inputs=run.inputs.overridden(found.overrides))
    if done == run.total_steps and world.from_first(lambda: is_exported(config.output, run.export_spec())):
        tell(f"already finished: {clean_url(config.output)}/export")
        return
    world.from_first(lambda: recorded(run))  # tells of an output that cannot be written before the weights are loaded
    model = _load(run)
    optimizer = optimizer_of(model, config)  # before any forward pass: after it the root's weights are not the shards
    prove_forward(model, world, compute=COMPUTE_TYPES[config.compute])
    reader = Reader(run.inputs.dataset, run.inputs.lengths)
    if done:
        checkpoints.restore(model, optimizer, done)
        tell(f"resuming after step {done} of {run.total_steps}")
    elif isinstance(config, OpdConfig):
        run = replace(run, inputs=run.inputs.overridden(prove_parity(model, reader, config, world, tell)))
    if done < run.total_steps:
        _steps(run, model, optimizer, reader, checkpoints, done)
    export(model, run.inputs.folder, config.output, world, run.export_spec())
    tell(f"exported to {clean_url(config.output)}/export")


def _load(run: Run) -> PreTrainedModel:
    return load_sharded(
        run.inputs.folder,
        run.world,
        compute=run.config.compute,
        attention=run.config.attention,
        checkpoint_activations=run.config.activation_checkpointing,
        compiled=run.config.compile,
        cpu_offload=run.config.cpu_offload,
        lora=run.config.lora,
    )


def optimizer_of(model: PreTrainedModel, config: TrainConfig) -> Optimizer:
    """AdamW, whose decay spares norms and biases: shrinking those shrinks the signal, not the complexity."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    matrices = [weight for weight in trained if weight.ndim >= 2]
    vectors = [weight for weight in trained if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW([group for group in groups if group["params"]], lr=config.lr, betas=config.betas, fused=True)


def _steps(
    run: Run, model: PreTrainedModel, optimizer: Optimizer, reader: Reader, checkpoints: Checkpoints, done: int
) -> None:
    config, world = run.config, run.world
    batches = ahead(step_batches(reader, config, world, first=done, stop=run.total_steps, topk=run.topk))
    meter = Meter(config, world, model)
    validation = Validation(run.inputs.dataset, run.inputs.held_out, config, world, run.total_steps)
    stopping, waited = False, 0.0
    with _terminations() as terminations, checkpoints, closing(batches), watched(run, done) as watch:
        for step in range(done, run.total_steps):
            record = _one_step(run, model, optimizer, meter, batches, step)
            record |= validation.figures(model, step + 1)
            record["time/save"] = waited  # for the checkpoint of the step before
            waited = 0.0
            if watch:
                watch.step(record)
            stopping = world.any(bool(terminations))
            if stopping or (step + 1) % config.save_every == 0 or step + 1 == run.total_steps:
                if watch:
                    watch.flush()
                waited = checkpoints.save(model, optimizer, run.header(step + 1))
            if stopping:
                break
    if stopping or world.any(bool(terminations)):  # the signal may have come while the last save was waited for
        raise Stopped(f"stopped by SIGTERM after step {step + 1}, which is saved", fix="The same command resumes")


def _one_step(
    run: Run, model: PreTrainedModel, optimizer: Optimizer, meter: Meter, batches: Iterator[list[Batch]], step: int
) -> dict[str, Any]:
    """Take optimizer step `step`, counted from 0; returns its line of metrics, with overrides if any."""
    config, world = run.config, run.world
    began = time.monotonic()
    mine = world.together(lambda: next(batches))
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
    try:
        sums, norm = train_step(model, optimizer, [batch.to(world.device) for batch in mine], rules_of(config), world)
    except NotFinite as error:
        raise keep(error, run.header(step + 1), config.output, world) from None
    optimizer.zero_grad(set_to_none=True)  # now and not in the next step: a save in between needs the memory
    overrides = list(run.inputs.provenance.overrides)
    return {
        "step": step + 1,
        "data/epoch": run.epochs_at(step + 1),
        **meter.figures(sums, mine, began=began, loaded=loaded),
        "optim/lr": rate,
        "optim/grad_norm": norm,
        **({"overrides": overrides} if overrides else {}),
    }


@contextmanager
def _terminations() -> Iterator[Sequence[int]]:
    """The SIGTERMs that have come, so that a run ends at the end of a step, saved.

    A list and no Event: a second signal while the first is setting it would wait for ever for its lock.
    """
    came: list[int] = []
    lost = False
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield came
    except RuntimeError as error:
        lost = is_lost_rank(error)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        if lost and came:  # another rank failed, and tells why; the signal is the launcher's, which waits for our end
            signal.raise_signal(signal.SIGTERM)


def _quiet(line: str) -> None:
    """What ranks other than the first say."""
