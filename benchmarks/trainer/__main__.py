"""`python -m benchmarks.trainer`: our training step beside TRL's, and what it costs by itself.

Both sides run here, on the same rows. benchmarks/README.md says how each figure is taken.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from transformers.utils.logging import disable_progress_bar

from benchmarks.machine import processor
from benchmarks.trainer.cuda import SHAPES, SIZES, on_shapes, ours, random_model
from benchmarks.trainer.heads import Shape, measure_heads
from benchmarks.trainer.tables import Row, say_tables
from benchmarks.trainer.versus import Bench, Size, compare, ours_alone, over_ranks
from common.cli import run
from common.errors import UsageError
from trainer.world import kind_of

ROOT = Path("runs/bench")
PEER = ROOT / "peers" / "bin" / "python"
PARTS = ("versus", "context", "ranks", "heads", "shapes")
VARIANTS = {"ours": {"compile": True}, "ours, recomputing": {"compile": True, "activation_checkpointing": True}}
"""Ours as recommended: layers compiled; and every layer recomputed in the backward pass, TRL's default."""


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    versus: tuple[Size, ...] = (Size(2048, steps=3, rounds=2), Size(8192, steps=2))
    context: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    ranks: Size = Size(1024, steps=4)
    heads: tuple[Shape, ...] = (Shape(2048, 576, 49152), Shape(512, 1024, 151936))


ON_GPU = Extent(heads=(Shape(8192, 1024, 151936), Shape(8192, 2048, 151936)))
SMALL: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "head_dim": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32768, "tie_word_embeddings": True,
}  # fmt: skip
"""The network on which the growth with context is measured: SmolLM2 would take an hour."""
TINY: dict[str, Any] = {**SMALL, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
QUICK = Extent((Size(64, steps=3),), (32, 64), Size(64, steps=2), (Shape(48, 32, 512),))
"""With `TINY`: that every part runs, not how fast."""


@click.command()
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write machine and rows here.")
@click.option("--peer", type=click.Path(path_type=Path), help=f"Python of an environment with TRL.  [default: {PEER}]")
@click.option("--no-peer", is_flag=True, help="Leave TRL out.")
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="Only these; else all but `shapes`.")
@click.option("--cuda", is_flag=True, help="On this machine's GPU: the shapes of Qwen3, and the heads.")
@click.option("--threads", default=os.cpu_count(), show_default=True, help="Of every side.")
@click.option("--clock", default="wall", type=click.Choice(["wall", "cpu"]), help="`cpu`: on a busy machine, 1 thread.")
@click.option("--quick", is_flag=True, help="A tiny network: that everything runs, not how fast.")
def trainer(
    json_file: Path | None,
    peer: Path | None,
    no_peer: bool,
    parts: tuple[str, ...],
    cuda: bool,
    threads: int,
    clock: str,
    quick: bool,
) -> None:
    """Measure, print the tables, and say which goals are reached."""
    disable_progress_bar()
    root = ROOT.absolute()
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=root, prefix="scratch-") as scratch:
        model = _model(root, Path(scratch), quick)
        device = kind_of("cuda" if cuda else "cpu")
        bench = Bench(model, Path(scratch), device, clock, threads, None if no_peer else _peer(peer))
        found: dict[str, Any] = {"benchmark": "trainer", "machine": _machine(bench), "rows": []}
        wanted = parts or (("heads", "shapes") if cuda else PARTS[:-1])
        for label, measure_part in _parts(bench, QUICK if quick else ON_GPU if cuda else Extent(), wanted, quick):
            click.echo(label, err=True)
            found["rows"] += measure_part()
            if json_file is not None:  # after every part: a run of half an hour may be broken off
                json_file.parent.mkdir(parents=True, exist_ok=True)
                json_file.write_text(json.dumps(found, indent=1) + "\n")
        say_tables(found)


Part = tuple[str, Callable[[], list[Row]]]
"""One stretch of measuring: what it measures, and what finds its rows."""


def _parts(bench: Bench, extent: Extent, wanted: tuple[str, ...], quick: bool) -> Iterator[Part]:
    if "versus" in wanted:
        for size in extent.versus:
            for kind in ("sft", "opd"):
                label = f"{kind}, rows of {size.length:,} tokens"
                yield label, lambda kind=kind, size=size: compare(bench, kind, size, VARIANTS)
    if "context" in wanted:
        small = random_model(bench.scratch / "small", TINY if quick else SMALL, tokenizer=bench.model)
        for length in extent.context:
            yield f"context of {length:,}", lambda length=length: [_context(replace(bench, model=small), length)]
    if "ranks" in wanted:
        yield "one and two ranks", lambda: list(over_ranks(bench, "opd", extent.ranks, (1, 2)))
    if "heads" in wanted:
        for shape in extent.heads:
            own = replace(shape, device=bench.device, threads=bench.threads, clock=bench.clock)
            yield f"heads, {shape.tokens:,} x {shape.vocab:,}", lambda own=own: list(measure_heads(own))
    if "shapes" in wanted:
        shapes, sizes = ({"tiny": TINY}, QUICK.versus) if quick else (SHAPES, SIZES)
        yield f"shapes of {', '.join(shapes)}", lambda: list(on_shapes(bench, shapes, sizes))


def _context(bench: Bench, length: int) -> Row:
    row = ours_alone(bench, "opd", Size(length, steps=3), ours(bench.device))
    return {**row, "table": "context"}


def _model(root: Path, scratch: Path, quick: bool) -> Path:
    """SmolLM2-135M-Instruct, made once; with `quick` a network of its tokenizer and `TINY` layers."""
    from recipes.demo.models import build_teacher

    model = root / "models" / "smollm2"
    if not (model / "config.json").exists():
        build_teacher(model)
    return random_model(scratch / "tiny", TINY, tokenizer=model) if quick else model


def _peer(python: Path | None) -> Path | None:
    """The environment with TRL; None where there is none, which is said."""
    if python is not None and not python.exists():
        raise UsageError("there is no such Python", where=str(python), fix="`make bench-trainer` makes an environment")
    found = python or PEER.absolute()
    if found.exists():
        return found.absolute()
    click.echo("TRL is left out: no environment at runs/bench/peers (`make bench-trainer` makes it)", err=True)
    return None


def _machine(bench: Bench) -> dict[str, Any]:
    packages = {name: version(name) for name in ("torch", "transformers")}
    own = {"threads": bench.threads, "clock": bench.clock}
    return {**processor(), "load": os.getloadavg()[0], **own, **packages}


if __name__ == "__main__":
    run(trainer)
