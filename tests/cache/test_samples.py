"""Rows as text: pieces of tokens, their shades, and text that wants to be obeyed."""

import html
import io
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from common.cache import sample_view
from common.cache.samples import STEPS, Sample, as_json, sample_of, spread
from common.cache.tokens import local_tokenizer, pieces
from common.chat import load_tokenizer
from common.lineage import ModelIdentity, tokenizer_sha256
from common.untrusted import one_line, visible
from tests.common.rows import IDENTITY, make_row
from tests.common.tiny_models import SPECIAL, make_model

JOINERS = "\u200c\u200d"
HOSTILE = "\x1b]0;owned\x07\x1b[31m[red]bold[/red] <script>alert(1)</script>\r\x9b2J\u202eevil\u2028\x7f"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a byte-level tokenizer."""
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(folder)  # type: ignore[return-value]


def sample(tokenizer: PreTrainedTokenizerFast | None, text: str, gaps: list[float] | None = None) -> Sample:
    """The row of a completion `text` (in the tokens of `tokenizer`), whose tokens have these gaps, else 0."""
    ids = np.array(tokenizer.encode(text) if tokenizer else [1, 2, 3], np.int32)
    rollout = np.full(len(ids), -9.0, np.float32)
    gap = np.array([*(gaps or []), *[0.0] * (len(ids) - len(gaps or []))], np.float32)
    return sample_of(
        make_row(tokens=len(ids), completion_ids=ids, rollout_logprobs=rollout, teacher_logprobs=rollout + gap)
        if tokenizer is None
        else make_row(
            tokens=len(ids),
            prompt_ids=np.array(tokenizer.encode("Say it!"), np.int32),
            completion_ids=ids,
            rollout_logprobs=rollout,
            teacher_logprobs=rollout + gap,
            completion=str(tokenizer.decode(ids.tolist())),
        ),
        tokenizer,
    )


def on_terminal(drawn: Sample, whole: bool = True) -> str:
    """What a terminal of 24-bit colour is sent."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="truecolor", width=1000, markup=False, emoji=False)
    console.print(sample_view.as_text(drawn, colour=True, whole=whole))
    return stream.getvalue()


def test_a_character_split_over_tokens_is_one_piece(tokenizer: PreTrainedTokenizerFast) -> None:
    found = pieces(tokenizer, tokenizer.encode("a漢🙂é!"))
    assert [(piece.text, piece.stop - piece.start) for piece in found] == [
        ("a", 1),
        ("漢", 3),
        ("🙂", 4),
        ("é", 2),
        ("!", 1),
    ]


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_the_pieces_of_any_text_spell_it_and_use_every_token_once(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    ids = tokenizer.encode(text)
    found = pieces(tokenizer, ids)
    assert [place for piece in found for place in range(piece.start, piece.stop)] == list(range(len(ids)))
    if "\ufffd" not in text:
        assert "".join(piece.text for piece in found) == tokenizer.decode(ids)


def test_bytes_that_are_no_character_do_not_swallow_what_follows(tokenizer: PreTrainedTokenizerFast) -> None:
    lone = tokenizer.encode("漢")[0]
    found = pieces(tokenizer, [lone] * 9 + tokenizer.encode("ok"))
    assert len(found) >= 4 and found[-1].text == "k" and found[-1].stop == 11


def test_special_tokens_are_shown(tokenizer: PreTrainedTokenizerFast) -> None:
    assert pieces(tokenizer, tokenizer.encode(f"hi{SPECIAL[0]}"))[-1].text == SPECIAL[0]


def test_a_piece_sums_the_log_probs_of_its_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    drawn = sample(tokenizer, "漢!", [-1.0, -0.5, 0.25, 2.0])
    first, second = drawn.graded
    assert (first.gap, first.rollout, second.gap) == (pytest.approx(-1.25), pytest.approx(-27), pytest.approx(2.0))
    assert drawn.gap == pytest.approx(0.75 / 4) and drawn.tokens == 4


@pytest.mark.parametrize(
    ("gap", "shade"), [(0.0, 0), (0.49, 0), (0.5, 1), (-0.5, -1), (-1.5, -2), (3.9, 3), (-4.0, -4), (-900.0, -4)]
)
def test_shades_deepen_with_the_gap(tokenizer: PreTrainedTokenizerFast, gap: float, shade: int) -> None:
    assert sample(tokenizer, "x", [gap]).graded[0].shade == shade


def test_plain_text_marks_the_worst_tokens_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    drawn = sample(tokenizer, "abcd", [-3.25, -1.9, 5.0, -2.0])
    text = sample_view.as_text(drawn, colour=False, whole=True).plain
    assert text == "Say it!\n\na⟦-3.2⟧bcd⟦-2.0⟧"
    assert "-2 nats" in sample_view.legend(colour=False).plain


def test_a_terminal_gets_red_and_green(tokenizer: PreTrainedTokenizerFast) -> None:
    text = on_terminal(sample(tokenizer, "abc", [-9.0, 0.0, 9.0]))
    background = {shade: int(colour[1:3], 16) for shade, colour in (("red", sample_view.WORSE[-1]),)}
    assert re.search(rf"\x1b\[30;48;2;{background['red']};\d+;\d+ma\x1b\[0mb\x1b\[30;48;2;74;222;128mc", text)
    assert "⟦" not in text


def test_a_page_colours_and_says_the_figures(tokenizer: PreTrainedTokenizerFast) -> None:
    page = sample_view.as_html(sample(tokenizer, "ab\n", [-9.0, 0.6, -1.0]), opened=True)
    assert re.search(r'<span class="w4" title="id \d+; rollout -9.000, teacher -18.000, gap -9.000">a</span>', page)
    assert re.search(r'<span class="b1" title="[^"]*">b</span>', page)
    assert re.search(r'<span class="w2" title="[^"]*">↵\n</span>', page)


def test_hostile_text_is_not_obeyed(tokenizer: PreTrainedTokenizerFast) -> None:
    drawn = sample(tokenizer, HOSTILE)
    terminal = on_terminal(drawn)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2028]", re.sub(r"\x1b\[[0-9;]*m", "", terminal))
    assert "[red]bold[/red]" in terminal and "\x1b[31m" not in terminal
    plain = sample_view.as_text(drawn, colour=False, whole=True).plain
    assert "␛]0;owned␇␛[31m[red]bold[/red] <script>" in plain and "\x1b" not in plain
    page = sample_view.as_html(drawn, opened=True)
    assert "<script" not in page and html.escape("<") in page and "\x1b" not in page


def test_a_hostile_uid_and_finish_reason_stay_on_their_line() -> None:
    drawn = sample_of(make_row(uid="a\n\x1b[2J<b>", finish_reason="x\r\ny"), None)
    assert sample_view.heading(drawn).startswith("a↵␛[2J<b>: 5 tokens, x␍↵y, gap")
    assert "<b>" not in sample_view.as_html(drawn, opened=False)


@given(st.text())
def test_no_text_keeps_what_a_terminal_obeys(text: str) -> None:
    obeyed = {"Cc", "Cf", "Zl", "Zp"}
    assert not [letter for letter in one_line(text) if unicodedata.category(letter) in obeyed and letter not in JOINERS]


def test_ordinary_text_of_any_script_is_left_as_it_is() -> None:
    text = "Ünïcödé 漢字 🙂👩‍👩‍👧 नमस्ते\n\tمرحبا می‌خواهم"
    assert visible(text) == text


def test_without_a_tokenizer_the_stored_text_is_shown_and_the_worst_ids_named() -> None:
    drawn = sample(None, "", [-0.1, -7.0, 0.0])
    text = sample_view.as_text(drawn, colour=False, whole=True).plain
    assert "Ünïcödé 漢字 🙂\n\nWorst for the teacher: token 1 (id 2) -7.00" in text and "What is 0?" in text
    assert "token 1 (id 2) -7.00" in sample_view.as_html(drawn, opened=True)
    assert as_json(drawn)["pieces"][1] == {
        "text": None,
        "ids": [2],
        "rollout_logprob": -9.0,
        "teacher_logprob": -16.0,
    }


def test_without_text_or_tokenizer_the_ids_are_shown_with_their_shades() -> None:
    drawn = sample_of(make_row(tokens=2, completion_ids=np.array([7, 8], np.int32), prompt="", completion=""), None)
    assert sample_view.as_text(drawn, colour=False, whole=True).plain.endswith("\n\n7 8 ")


def test_a_tokenizer_of_another_model_invents_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    drawn = sample_of(make_row(), tokenizer)
    assert not drawn.spelled and drawn.completion == "Ünïcödé 漢字 🙂"


def test_rows_that_are_not_scored_have_no_shades(tokenizer: PreTrainedTokenizerFast) -> None:
    row = make_row(scored=False, completion="", completion_ids=np.array(tokenizer.encode("plain"), np.int32))
    drawn = sample_of(row, tokenizer)
    assert drawn.gap is None and {piece.shade for piece in drawn.graded} == {0}
    assert "gap" not in sample_view.heading(drawn) and "gap" not in sample_view.as_html(drawn, opened=True)


def test_a_long_row_is_cut_unless_asked_for_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    drawn = sample(tokenizer, "x" * (sample_view.SHOWN_PIECES + 7))
    cut = sample_view.as_text(drawn, colour=False, whole=False).plain
    assert cut.endswith(f"\n... 7 more; --row {drawn.uid} shows all") and cut.count("x") == sample_view.SHOWN_PIECES
    assert sample_view.as_text(drawn, colour=False, whole=True).plain.count("x") == sample_view.SHOWN_PIECES + 7


def test_rows_are_spread_over_the_dataset() -> None:
    assert spread(100, 4) == [12, 37, 62, 87] and spread(2, 5) == [0, 1] and spread(5, 0) == []
    assert len(STEPS) == len(sample_view.WORSE) == len(sample_view.BETTER)


def test_the_tokenizer_is_looked_for_on_this_machine_alone(folder: Path, tmp_path: Path) -> None:
    def model(name: str) -> ModelIdentity:
        return ModelIdentity.model_validate(IDENTITY | {"name": name, "tokenizer_sha256": digest})

    digest = tokenizer_sha256(load_tokenizer(folder))
    assert local_tokenizer(model(str(folder))) is not None
    for name in ("s3://bucket/model", "org/never-fetched", str(tmp_path / "gone"), str(tmp_path), "not a name?!"):
        assert local_tokenizer(model(name)) is None
