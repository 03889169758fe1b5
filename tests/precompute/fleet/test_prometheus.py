from typing import Any

import pytest

from precompute.fleet.overview import Box, Overview
from precompute.fleet.prometheus import exposition
from tests.precompute.fleet.statuses import make_replica, make_status

NAME = 'a"b\\c'


def make_overview(**changes: Any) -> Overview:
    values: dict[str, Any] = {
        "url": "s3://bucket/run1/scored",
        "dataset_id": "0123456789abcdef",
        "kind": "scored",
        "model": "org/model",
        "teacher": None,
        "complete": False,
        "shards": 64,
        "shards_committed": 12,
        "last_commit_s": 5.5,
        "tokens": 100,
        "tokens_per_s": 3400.8,
        "eta_s": 1920.0,
        "cost": 4.2,
        "boxes_with_price": 1,
        "rejected": 0,
        "deaths": 1,
        "storage_retries": 0,
        "boxes": (
            Box(standing="at work", heard_s=2.0, status=make_status()),
            Box(standing="silent", heard_s=900.0, status=make_status(box="b-1", cost=None)),
        ),
        "unread": (),
    }
    return Overview(**(values | changes))


def parsed(page: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Samples by metric, as Prometheus' own client reads them."""
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus_client comes with vLLM")
    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in parser.text_string_to_metric_families(page):
        assert family.documentation and family.type in ("counter", "gauge")
        for sample in family.samples:
            assert (family.type == "counter") == sample.name.endswith("_total")
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return samples


def test_every_number_arrives_under_its_labels() -> None:
    samples = parsed(exposition(make_overview()))
    dataset = {"url": "s3://bucket/run1/scored", "dataset": "0123456789abcdef"}
    assert samples["lopd_precompute_shards"] == [(dataset, 64.0)]
    assert samples["lopd_precompute_shards_committed"] == [(dataset, 12.0)]
    assert samples["lopd_precompute_eta_seconds"] == [(dataset, 1920.0)]
    labels = dataset | {"box": "gpu-box-4711", "phase": "score", "replica": "1", "devices": "2,3"}
    assert (labels, 812_345.0) in samples["lopd_precompute_tokens_total"]
    assert (labels, 1700.4) in samples["lopd_precompute_tokens_per_second"]


def test_of_a_silent_box_only_what_it_has_done_is_told() -> None:
    samples = parsed(exposition(make_overview()))
    boxes = {name: {labels["box"] for labels, _ in found if "box" in labels} for name, found in samples.items()}
    assert boxes["lopd_precompute_tokens_total"] == {"gpu-box-4711", "b-1"}
    assert boxes["lopd_precompute_tokens_per_second"] == boxes["lopd_precompute_rows_in_engine"] == {"gpu-box-4711"}
    silent = {labels["box"]: value for labels, value in samples["lopd_precompute_box_silent"]}
    assert silent == {"gpu-box-4711": 0.0, "b-1": 1.0}


def test_what_is_not_known_has_no_sample() -> None:
    page = exposition(make_overview(eta_s=None, last_commit_s=None, boxes=()))
    assert set(parsed(page)) == {f"lopd_precompute_{name}" for name in ("shards", "shards_committed", "complete")}


@pytest.mark.parametrize("name", [NAME, "", "ünïcödé 節点", "a}b,c=d", " "])
def test_any_name_survives_as_a_label(name: str) -> None:
    box = Box(standing="at work", heard_s=0.0, status=make_status(replicas=(make_replica(name),)))
    samples = parsed(exposition(make_overview(boxes=(box,))))
    assert [labels["replica"] for labels, _ in samples["lopd_precompute_tokens_total"]] == [name]


def test_names_are_escaped_as_the_format_says_and_no_line_is_broken() -> None:
    box = Box(standing="at work", heard_s=0.0, status=make_status(replicas=(make_replica(f"{NAME}\n\x1b[2J"),)))
    page = exposition(make_overview(boxes=(box,)))
    assert r'replica="a\"b\\c↵␛[2J"' in page
    assert all(line.isprintable() for line in page.splitlines()) and page.endswith("\n")


def test_samples_of_one_metric_stand_together_below_its_help_and_type() -> None:
    lines = exposition(make_overview()).splitlines()
    names = [line.split("{")[0].split(" ")[2] if line.startswith("#") else line.split("{")[0] for line in lines]
    runs = [name for index, name in enumerate(names) if index == 0 or names[index - 1] != name]
    assert len(runs) == len(set(runs))
    assert (
        sum(line.startswith("# HELP ") for line in lines)
        == sum(line.startswith("# TYPE ") for line in lines)
        == len(runs)
    )
