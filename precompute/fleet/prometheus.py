"""The overview of a dataset in Prometheus' text format, version 0.0.4.

https://prometheus.io/docs/instrumenting/exposition_formats/ says what a line is. Numbers of a box count from the start
of its process, whose name is the label `box`; what tells of now (speed, rows in the engine) is left out for boxes that
have ended or gone silent.
"""

from collections.abc import Mapping
from typing import Literal

from common.untrusted import one_line
from precompute.fleet.overview import Box, Overview

PREFIX = "lopd_precompute_"
Kind = Literal["counter", "gauge"]
Labels = Mapping[str, str]


def exposition(found: Overview) -> str:
    """All that is known of the dataset, as one page that a scraper or node_exporter's textfile collector reads."""
    page = _Page({"url": found.url, "dataset": found.dataset_id})
    page.add("shards", "gauge", "Shards of the plan.", found.shards)
    page.add("shards_committed", "gauge", "Shards committed, by anybody.", found.shards_committed)
    page.add("complete", "gauge", "1 when the dataset has its manifest.", int(found.complete))
    page.add("eta_seconds", "gauge", "Time left; absent while unknown.", found.eta_s)
    page.add("last_commit_age_seconds", "gauge", "Time since the last commit.", found.last_commit_s)
    for box in found.boxes:
        _add_box(page, box)
    return str(page)


def _add_box(page: "_Page", box: Box) -> None:
    status = box.status
    labels = {"box": status.box, "phase": status.phase}
    page.add("box_info", "gauge", "Always 1; what the box is at.", 1, labels | {"state": status.state})
    page.add("box_at_work", "gauge", "0 when it has ended or is silent.", int(box.standing == "at work"), labels)
    page.add(
        "box_silent", "gauge", "1 when it should tell of itself and does not.", int(box.standing == "silent"), labels
    )
    page.add("box_heard_age_seconds", "gauge", "Time since its last status.", box.heard_s, labels)
    page.add("box_seconds_total", "counter", "How long it has worked.", status.seconds, labels)
    page.add("cost_total", "counter", "What it has cost, in the currency of its price.", status.cost, labels)
    page.add("box_shards_committed_total", "counter", "Shards committed by it.", status.shards_here, labels)
    page.add(
        "rejected_rows_total",
        "counter",
        "Rows left out: engines died of them, or would not take them.",
        status.rejected,
        labels,
    )
    page.add(
        "storage_retries_total",
        "counter",
        "Requests to the store that were made again.",
        status.storage_retries,
        labels,
    )
    page.add("truncated_share", "gauge", "Completions cut off at the longest length.", status.truncated, labels)
    page.add("self_test_nats", "gauge", "Largest difference of the scoring self-test.", status.self_test, labels)
    for replica in status.replicas:
        each = labels | {"replica": replica.name, "devices": replica.devices}
        page.add("tokens_total", "counter", "Completion tokens finished.", replica.tokens, each)
        page.add("rows_total", "counter", "Rows finished.", replica.rows, each)
        page.add("engine_deaths_total", "counter", "Engines that died.", replica.deaths, each)
        if box.standing == "at work":
            page.add("tokens_per_second", "gauge", "Over the last minute.", replica.tokens_per_s, each)
            page.add("rows_in_engine", "gauge", "Rows in the engine now.", replica.in_engine, each)
            page.add("beat_age_seconds", "gauge", "Time since its last beat.", replica.beat_age_s, each)


class _Page:
    """Samples by metric, for all of one metric must stand together."""

    def __init__(self, labels: Labels) -> None:
        self._labels = labels
        self._metrics: dict[str, list[str]] = {}

    def add(self, name: str, kind: Kind, text: str, value: float | None, labels: Labels | None = None) -> None:
        """One sample; none where there is no value."""
        if value is None:
            return
        full = f"{PREFIX}{name}"
        lines = self._metrics.setdefault(full, [f"# HELP {full} {text}", f"# TYPE {full} {kind}"])
        pairs = ",".join(f'{key}="{_escaped(of)}"' for key, of in {**self._labels, **(labels or {})}.items())
        lines.append(f"{full}{{{pairs}}} {value!r}")

    def __str__(self) -> str:
        return "".join(f"{line}\n" for lines in self._metrics.values() for line in lines)


def _escaped(value: str) -> str:
    """Names may be a stranger's: what a terminal would obey becomes visible, what the format reads is escaped."""
    return one_line(value).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
