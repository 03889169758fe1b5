"""`--dry-run`: what a run would take, before it takes anything: its rows, its steps, its memory. No weight is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import create_model

from common.dataset import Dataset, open_dataset, require_kind
from common.errors import DataError, UsageError
from common.host import in_words
from common.lengths import RowLengths
from common.models import resolve_config
from common.report import Table
from common.terminal import say, say_table
from trainer.architectures import require_attention
from trainer.config import OpdConfig, TrainConfig
from trainer.epoch import steps_per_epoch
from trainer.inputs import objective_line, require_topk, topk_of, with_objective
from trainer.lora import add_adapters
from trainer.memory_plan.activations import measure
from trainer.memory_plan.device import CUDA_ITSELF, Plan, Ranks, device_plan, weights_of
from trainer.memory_plan.host import Machine, host_plan, require_room, this_machine
from trainer.model import COMPUTE_TYPES, decoder_layers, skeleton
from trainer.read_ahead import held_bytes
from trainer.reader import check_budget, plan_line
from trainer.validation import held_out
from trainer.world import World, kind_of

Settings = TypeVar("Settings", bound=TrainConfig)


@dataclass(frozen=True)
class Plans:
    """What a run holds on a rank's device and on a node's host."""

    device: Plan
    host: Plan


@dataclass(frozen=True)
class Load:
    """What the dataset puts on one rank."""

    tokens: int
    """Packed tokens of a step."""
    topk: int = 0
    """Teacher columns a token that the objective reads."""
    reader: int = 0
    """Bytes of shards that its reader holds."""


def plannable(model: type[Settings]) -> type[Settings]:
    """The settings of a run that may do without a dataset and an output, which its memory hardly depends on."""
    return create_model(model.__name__, __base__=model, data=(str, ""), output=(str, ""))


def dry_run(config: TrainConfig, ranks: int, machine: Machine | None) -> None:
    """Print the plan of a run of `ranks` ranks on one node; of its memory alone where `config.data` is empty.

    Args:
        machine: another machine than this one, with CUDA devices unless the settings say `device=cpu`.

    Raises:
        UsageError: it cannot fit, or dataset and settings do not go together.
        DataError: the model's config or the dataset cannot be read.
    """
    if ranks % config.replicas:
        raise UsageError(
            f"{ranks} ranks cannot be shared out among {config.replicas} replicas",
            where="replicas",
            fix=f"Set replicas to a divisor of {ranks}, or plan for a multiple of {config.replicas} ranks",
        )
    kind = kind_of(config.device) if machine is None else "cpu" if config.device == "cpu" else "cuda"
    if machine is None:
        require_attention(config.attention, kind, config.compute)
    where = Ranks(shards=ranks // config.replicas, here=ranks, kind=kind)
    folder = resolve_config(config.model)
    load = _look_at_data(config, ranks) if config.data else _without_data(config)
    plans = plan_memory(config, folder, where, load)
    there = machine or this_machine(kind)
    _show(plans, where, there)
    require_room(plans.device, plans.host, there, kind)
    say("It fits.", "green")


def plan_memory(config: TrainConfig, folder: Path, ranks: Ranks, load: Load) -> Plans:
    """The plans of a run from the model's config.json."""
    model = skeleton(folder, dtype=COMPUTE_TYPES[config.compute] if config.lora else torch.float32, attention="sdpa")
    if config.lora:
        add_adapters(model, decoder_layers(model), config.lora)
    weights = weights_of(model)
    layers = measure(
        folder, tokens=config.token_budget, compute=config.compute, attention=config.attention, lora=config.lora
    )
    device = device_plan(weights, layers, config, ranks, tokens=load.tokens, topk=load.topk)
    return Plans(device, host_plan(weights, config, ranks, device, load.reader))


def memory_line(config: TrainConfig, folder: Path, dataset: Dataset, lengths: RowLengths, world: World) -> str:
    """The plan's total in one line, for the start of a run, which goes on where there is no plan."""
    kind = world.device.type
    here = min(world.size, torch.cuda.device_count()) if kind == "cuda" else world.size
    ranks = Ranks(shards=world.size // config.replicas, here=here, kind=kind)
    try:
        plans = plan_memory(config, folder, ranks, _load(dataset, lengths, config, world.size))
    except DataError as error:
        return f"memory: not known beforehand: {error.what}"
    there = this_machine(kind)
    device = f"{in_words(plans.device.peak)} a rank at its fullest moment ({plans.device.fullest})"
    free = f" of {in_words(there.device)} free on its device" if there.device is not None else ""
    host = f" of {in_words(there.host)} free" if there.host is not None else ""
    return f"memory: {device}{free}; host {in_words(plans.host.peak)} ({plans.host.fullest}){host}"


def _without_data(config: TrainConfig) -> Load:
    """Micro-batches that are full; says what it takes `auto` for."""
    if isinstance(config, OpdConfig) and config.objective == "auto":
        say("objective: importance. With `data=` of a dataset that stores top-k it would be topk")
    return Load(config.token_budget, topk_of(config))


def _look_at_data(config: TrainConfig, ranks: int) -> Load:
    """Say what the dataset makes of the settings, and refuse what the run would."""
    dataset = open_dataset(config.data)
    config = with_objective(config, dataset)
    require_kind(dataset, "scored" if isinstance(config, OpdConfig) else "sft")
    if isinstance(config, OpdConfig):
        require_topk(dataset, config)
    lengths = dataset.row_lengths()
    check_budget(dataset, lengths, config.token_budget)
    trained = lengths.take(~held_out(lengths, config.validation_share, config.validation_rows))
    per_epoch = steps_per_epoch(len(trained), config.rows_per_step)
    total = config.max_steps or config.epochs * per_epoch
    say(
        f"{len(trained)} rows, {len(lengths) - len(trained)} held out, the longest of {lengths.total.max()} tokens; "
        f"{total} steps, {total / per_epoch:.1f} epochs, on {ranks} ranks"
    )
    if isinstance(config, OpdConfig):
        say(objective_line(config, dataset))
    say(plan_line(dataset, trained, config, ranks))
    return _load(dataset, trained, config, ranks)


def _load(dataset: Dataset, lengths: RowLengths, config: TrainConfig, ranks: int) -> Load:
    tokens = int(lengths.total.mean() * config.rows_per_step / ranks) + 1
    return Load(tokens, topk_of(config, dataset.topk), held_bytes(dataset, config))


def _show(plans: Plans, ranks: Ranks, machine: Machine) -> None:
    say("")
    _show_plan(f"a rank of {ranks.here}", plans.device)
    if ranks.kind == "cuda":
        say(f"beside it about {in_words(CUDA_ITSELF)} for CUDA itself; the device has {_known(machine.device)}")
    say("")
    _show_plan("their host", plans.host)
    say(f"the host has {_known(machine.host)}")


def _show_plan(title: str, plan: Plan) -> None:
    rows = [[line.name, *(_cell(line.at.get(moment, 0)) for moment in plan.moments)] for line in plan.lines]
    total = ["together", *(in_words(plan.total(moment)) for moment in plan.moments)]
    header = [title, *(f"{moment}{' ◂' if moment == plan.fullest else ''}" for moment in plan.moments)]
    say_table(Table(header, [*rows, total]), {len(rows): "bold"}, right=range(1, len(header)))


def _cell(count: int) -> str:
    return in_words(count) if count else "-"


def _known(count: int | None) -> str:
    return in_words(count) if count is not None else "an unknown amount"
