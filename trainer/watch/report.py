"""A run, or several side by side, as one HTML page: curves, figures, settings, lineage. Made from what lies at the
outputs, at any time, also while they are trained."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median
from typing import Any

from common.errors import DataError, LopdError
from common.lineage import ModelIdentity
from common.models import pinned
from common.progress import duration, size
from common.report import Figure, Markup, Table, page
from common.storage import Store
from common.urls import clean_url, split_key
from trainer.watch.curves import curves
from trainer.watch.run_record import RunRecord, read_record
from trainer.watch.sinks import METRICS, stored_records

PAGE = "report.html"
STYLE = """
body { max-width: 76rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 0 2rem; }
.curves figure { margin: 1rem 0; } .curves h2 { margin: 0 0 .3rem; font-size: 1.02rem; }
figcaption { font-size: .88rem; }
td:nth-child(n+2), th:nth-child(n+2) { overflow-wrap: anywhere; }
"""
TOLD = (
    "loss", "validation/loss", "validation/teacher_k1", "kl/teacher_k1", "kl/teacher_k3", "kl/forward_k1",
    "kl/rollout_k3", "ratio/ess", "ratio/clipped", "entropy", "optim/grad_norm", "perf/tokens_per_s_per_rank",
    "perf/tflops", "perf/mfu", "data/fill",
)  # fmt: skip
"""Metrics of the table of figures."""
ENDS = 10
"""The first and the last tenth of a run are told by their medians."""


@dataclass(frozen=True)
class Told:
    """What lies at an output."""

    output: str
    name: str
    record: RunRecord | None
    steps: list[dict[str, Any]]

    @property
    def settings(self) -> Mapping[str, Any]:
        """Empty where the run left no record."""
        return self.record.settings if self.record else {}


def write_report(outputs: Sequence[str], target: str) -> str:
    """Write the page about these outputs to `target`, a file or a URL, and return where that is.

    Raises:
        DataError: there are no metrics at an output.
        UsageError: matplotlib is not installed.
    """
    store, key = split_key(target)
    text = render([read_output(output) for output in outputs])
    Store(store).put(key, text.encode())
    return f"{Store(store).url}/{key}"


def report_run(output: str, say: Callable[[str], None]) -> None:
    """The page beside a run that is over, where it can be drawn; a line that says how to have it elsewhere."""
    command = f"python -m trainer report {clean_url(output)}"
    if find_spec("matplotlib") is None:
        say(f"for a page of curves install lightning-opd[report], then: {command}")
        return
    try:
        say(f"report: {write_report([output], f'{clean_url(output)}/{PAGE}')}")
    except LopdError as error:
        say(f"WARNING: no report could be written: {error}. Later: {command}")


def read_output(output: str) -> Told:
    """Read what a run left at its output. Raises DataError where it left no metrics."""
    store = Store(output)
    steps, record = stored_records(store), read_record(store)
    if not steps:
        fix = "Give the output of a run that has taken a step; on an object store, one that has saved"
        raise DataError(f"no {METRICS}, or an empty one", where=store.url, fix=fix)
    return Told(store.url, record.name if record else store.url.rpartition("/")[2], record, steps)


def render(runs: Sequence[Told]) -> str:
    """The page."""
    names = _distinct(runs)
    drawn = curves([(name, run.settings, run.steps) for name, run in zip(names, runs, strict=True)])
    parts: list[Table | Figure | Markup] = [
        Markup("", "", STYLE),
        _figures(names, runs),
        Markup("Curves", '<div class="curves">'),
        *drawn,
        Markup("", "</div>"),
        Markup("Settings" if len(runs) == 1 else "Settings that differ", ""),
        _settings(names, runs),
    ]
    facts = {key: value for name, run in zip(names, runs, strict=True) for key, value in _facts(name, run, runs)}
    title = f"{_kind(runs[0])}: {names[0]}" if len(runs) == 1 else f"{len(runs)} runs: {', '.join(names)}"
    return page(
        title,
        " ".join(_lead(name, run) for name, run in zip(names, runs, strict=True)),
        parts,
        facts,
        alarm(names, runs),
    )


def alarm(names: Sequence[str], runs: Sequence[Told]) -> str:
    """Overridden checks and spent rollouts; empty where there are none."""
    said = []
    for name, run in zip(names, runs, strict=True):
        overrides = sorted({override for step in run.steps for override in step.get("overrides", ())})
        if overrides:
            said.append(f"{name}: overridden checks: {', '.join(overrides)}.")
        spent = [step for step in run.steps if "spent" in step]
        if spent:
            said.append(
                f"{name}: the rollouts were spent from step {spent[0]['step']} on ({'; '.join(spent[0]['spent'])}). "
                "Sample the next round from this student before training further."
            )
    return " ".join(said)


def _kind(run: Told) -> str:
    return {"opd": "Distillation", "sft": "Fine-tuning"}.get(run.record.kind if run.record else "", "Training")


def _lead(name: str, run: Told) -> str:
    last = run.steps[-1]
    seconds = sum(
        sum(step.get(key) or 0.0 for key in ("time/step", "time/save", "time/validation")) for step in run.steps
    )
    tokens = sum(step["data/tokens"] for step in run.steps)
    said = f"{last['step']:,} steps"
    if run.record is None:
        return f"{name}: {said}, {tokens:,.0f} tokens trained in {duration(seconds)}."
    about = run.record
    trained = about.data["rows"] - about.data["held_out"]
    round_ = f", round {about.round}" if about.kind == "opd" else ""
    teacher = f" from {about.teacher.name}" if about.teacher else ""
    return (
        f"{name}: {_kind(run).lower()}{round_} of {about.start.name}{teacher}; {said} of {about.total_steps:,}, "
        f"{last['data/epoch']:.2f} epochs of {trained:,} rows, {tokens:,.0f} tokens trained in "
        f"{duration(seconds)} on {about.ranks} x {about.device}."
    )


def _figures(names: Sequence[str], runs: Sequence[Told]) -> Table:
    """The metrics at the beginning and at the end of each run."""
    rows = []
    for metric in TOLD:
        cells = [_from_to(run.steps, metric) for run in runs]
        if any(cells):
            rows.append((metric, *cells))
    peaks = [max(step.get("perf/peak_memory") or 0.0 for step in run.steps) for run in runs]
    rows.append(("perf/peak_memory", *(size(peak) for peak in peaks)))
    return Table(("first tenth → last tenth, medians", *names), rows)


def _from_to(steps: Sequence[Mapping[str, Any]], metric: str) -> str:
    values = [step[metric] for step in steps if step.get(metric) is not None]
    if not values:
        return ""
    part = max(1, len(values) // ENDS)
    first, last = (f"{median(some):,.4g}" for some in (values[:part], values[-part:]))
    return first if first == last else f"{first} → {last}"


def _settings(names: Sequence[str], runs: Sequence[Told]) -> Table:
    """All settings of one run; of several those in which they differ."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    rows = [(key, *(_said(run.settings.get(key)) for run in runs)) for key in keys]
    shown = [row for row in rows if len(runs) == 1 or len(set(row[1:])) > 1]
    return Table(("setting", *names), shown)


def _facts(name: str, run: Told, runs: Sequence[Told]) -> list[tuple[str, str]]:
    prefix = f"{name}: " if len(runs) > 1 else ""
    facts = [(f"{prefix}output", run.output)]
    if (about := run.record) is not None:
        facts += [
            (f"{prefix}run", about.id),
            (f"{prefix}started from", _model(about.start)),
            (f"{prefix}SFT teacher", _model(about.teacher) if about.teacher else "not known"),
            (f"{prefix}data", f"{about.data['url']}, manifest {about.data['manifest_sha256']}"),
            (f"{prefix}round", str(about.round)),
            (f"{prefix}versions", ", ".join(f"{key} {value}" for key, value in about.versions.items())),
        ]
    return facts


def _model(identity: ModelIdentity) -> str:
    return f"{pinned(identity.name, identity.revision)}, tensors {identity.tensors_sha256}"


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else "" if value is None else str(value)


def _distinct(runs: Sequence[Told]) -> list[str]:
    """A name for each run; where two have the same, as much of the output as tells them apart."""
    parts = [run.output.split("/") for run in runs]
    names = [run.name for run in runs]
    depth = 1
    while len(set(names)) < len(names) and depth < max(map(len, parts)):
        depth += 1
        names = ["/".join(part[-depth:]) for part in parts]
    return names
