"""A cell is found again by what went into it, and by nothing else."""

from pathlib import Path

from benchmarks.study.cells import Cells, digest


def test_a_cell_is_made_once_for_the_same_inputs_and_again_for_others(tmp_path: Path) -> None:
    made = list[int]()

    def make() -> dict[str, int]:
        made.append(len(made))
        return {"number": made[-1]}

    for lr, number in ((1e-3, 0), (1e-3, 0), (2e-3, 1), (1e-3, 0)):
        assert Cells(tmp_path, lambda name: None).get("arm", {"lr": lr}, make)["number"] == number
    assert len(made) == 2


def test_what_other_inputs_made_lies_elsewhere(tmp_path: Path) -> None:
    cells = Cells(tmp_path, lambda name: None)
    assert cells.place("seed-0/arm", {"lr": 1e-3}) == cells.place("seed-0/arm", {"lr": 1e-3})
    assert cells.place("seed-0/arm", {"lr": 1e-3}) != cells.place("seed-0/arm", {"lr": 2e-3})


def test_a_cell_that_failed_is_made_again(tmp_path: Path) -> None:
    cells = Cells(tmp_path, lambda name: None)
    for outcome in (ZeroDivisionError, dict):
        try:
            found = cells.get("arm", {}, lambda outcome=outcome: {"by": 1 / 0} if outcome is ZeroDivisionError else {})
        except ZeroDivisionError:
            continue
        assert set(found) == {"seconds"}


def test_a_digest_is_of_contents_and_order(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("1")
    other.write_text("2")
    assert digest(one, other) != digest(other, one)
    twin = tmp_path / "twin"
    twin.write_text("1")
    assert digest(twin) == digest(one)
