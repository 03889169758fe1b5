"""Sample rows drawn: coloured on a terminal, with marks as plain text, coloured in a page."""

import html

from rich.text import Text

from common.cache.samples import STEPS, Graded, Sample, worst
from common.untrusted import one_line, visible

MARKED = -3
"""The shade from which on plain text marks a piece with its gap."""
SHOWN_PIECES = 400
"""Pieces of a completion that a terminal shows unless asked for the whole row."""
SHOWN_PROMPT = 1500
"""Characters of a prompt, likewise."""
WORST = 5
WORSE = ("#fee2e2", "#fecaca", "#fca5a5", "#f87171")
BETTER = ("#dcfce7", "#bbf7d0", "#86efac", "#4ade80")
SAMPLE_STYLE = (
    """
details { border: 1px solid #e2e8f0; border-radius: .5rem; margin: 1rem 0; padding: .6rem 1rem; }
summary { cursor: pointer; font-weight: 600; } summary span { font-weight: 400; color: #475569; }
pre.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.65 ui-monospace, monospace; margin: .4rem 0; }
pre.prompt { color: #475569; border-left: 3px solid #cbd5e1; padding-left: .8rem; max-height: 16rem; overflow: auto; }
pre.text span { border-radius: .15rem; }
"""
    + "".join(f".w{depth} {{ background: {colour}; }}" for depth, colour in enumerate(WORSE, 1))
    + "".join(f".b{depth} {{ background: {colour}; }}" for depth, colour in enumerate(BETTER, 1))
    + "\n"
)
SCALE = f"teacher minus rollout log-prob: shades begin at {', '.join(f'{step:g}' for step in STEPS)} nats"


def legend(colour: bool) -> Text:
    """What the colours or marks say."""
    if not colour:
        return Text(
            f"A token is marked token⟦gap⟧ where teacher minus rollout log-prob is {-STEPS[-MARKED - 1]:g} nats or less"
        )
    text = Text("the teacher finds it ")
    for depth in range(len(STEPS), 0, -1):
        text.append(" worse " if depth == len(STEPS) else "  ", _style(-depth))
    for depth in range(1, len(STEPS) + 1):
        text.append(" better " if depth == len(STEPS) else "  ", _style(depth))
    return text.append(f"  {SCALE}", "dim")


def heading(sample: Sample) -> str:
    """One line on the row."""
    gap = f", gap {sample.gap:+.3f} nats a token" if sample.gap is not None else ""
    return f"{one_line(sample.uid)}: {sample.tokens:,} tokens, {one_line(sample.finish_reason)}{gap}"


def as_text(sample: Sample, *, colour: bool, whole: bool) -> Text:
    """The row for a terminal; without `colour` nothing but characters, the worst pieces marked."""
    text = Text(_cut(visible(sample.prompt), whole), "dim" if colour else "")
    text.append("\n\n")
    if not sample.spelled and sample.completion:
        return text.append(_cut(visible(sample.completion), whole), "not dim").append(_worst_ids(sample))
    shown = sample.graded if whole else sample.graded[:SHOWN_PIECES]
    for piece in shown:
        if colour:
            text.append(_with_line_breaks(piece), f"not dim {_style(piece.shade)}")
        else:
            text.append(visible(piece.text) + (f"⟦{piece.gap:+.1f}⟧" if piece.shade <= MARKED else ""))
    left = len(sample.graded) - len(shown)
    return text.append(f"\n... {left:,} more; --row {one_line(sample.uid)} shows all" if left else "")


def as_html(sample: Sample, opened: bool) -> str:
    """The row as a fold of a page; the figures of a piece are its tooltip."""
    if not sample.spelled and sample.completion:
        completion = html.escape(visible(sample.completion) + _worst_ids(sample))
    else:
        completion = "".join(_span(piece) for piece in sample.graded)
    return (
        f"<details{' open' if opened else ''}><summary>{html.escape(one_line(sample.uid))} "
        f"<span>{html.escape(heading(sample).removeprefix(one_line(sample.uid) + ': '))}</span></summary>"
        f'<pre class="text prompt">{html.escape(visible(sample.prompt))}</pre>'
        f'<pre class="text">{completion}</pre></details>'
    )


def html_legend() -> str:
    """What the colours of a page say."""
    worse = "".join(
        f'<span class="w{depth}">{"&nbsp;worse&nbsp;" if depth == len(STEPS) else "&emsp;"}</span>'
        for depth in range(len(STEPS), 0, -1)
    )
    better = "".join(
        f'<span class="b{depth}">{"&nbsp;better&nbsp;" if depth == len(STEPS) else "&emsp;"}</span>'
        for depth in range(1, len(STEPS) + 1)
    )
    return f"<p>The teacher finds it {worse}{better} ({SCALE}); the figures of a token are its tooltip.</p>"


def _span(piece: Graded) -> str:
    figures = f"id {', '.join(map(str, piece.ids))}; rollout {piece.rollout:.3f}"
    if piece.gap is not None:
        figures += f", teacher {piece.teacher:.3f}, gap {piece.gap:+.3f}"
    shade = f' class="{"w" if piece.shade < 0 else "b"}{abs(piece.shade)}"' if piece.shade else ""
    return f'<span{shade} title="{figures}">{html.escape(_with_line_breaks(piece))}</span>'


def _with_line_breaks(piece: Graded) -> str:
    """The text; a shaded line break gets a sign that can carry the shade."""
    text = visible(piece.text)
    return text.replace("\n", "↵\n") if piece.shade else text


def _style(shade: int) -> str:
    if not shade:
        return ""
    return f"black on {(WORSE if shade < 0 else BETTER)[abs(shade) - 1]}"


def _worst_ids(sample: Sample) -> str:
    found = worst(sample, WORST)
    if not found:
        return ""
    named = ", ".join(f"token {index} (id {piece.ids[0]}) {piece.gap:+.2f}" for index, piece in found)
    return f"\n\nWorst for the teacher: {named}"


def _cut(text: str, whole: bool) -> str:
    return text if whole or len(text) <= SHOWN_PROMPT else f"{text[:SHOWN_PROMPT]} ..."
