"""The study as people read it: the texts of study.md and study.html, and the table of claims."""

import html
import json
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.study.results import plots
from benchmarks.study.results.findings import Finding, Study
from benchmarks.study.results.statistics import Mean
from common import report

TITLE = "Do the paper's claims hold, and can live distillation be beaten?"
OPENING = (
    "Lightning OPD (arXiv 2604.13010) says that on-policy distillation needs no teacher at training time: the rollouts "
    "of the fine-tuned student, graded once, do as well, if the teacher that grades is the one whose answers the "
    "student was fine-tuned on. Here that is tested with this software on models small enough to train from nothing "
    "and many times over: running sums with a chain of thought, a soft teacher A, a teacher B of equal skill that "
    "thinks in another order, and a smaller student whose base model is often wrong."
)
SETTING = (
    "`c9a3d4=` asks, `a3,c2;d6#6$` answers: the sum so far, modulo ten, after each label, then the total, from a "
    "vocabulary of 24 tokens. Teachers have 323,000 parameters, students 25,000. A student is fine-tuned on few "
    "answers of teacher A, and then distilled; all ways to distil have the same optimizer, batch and learning rate, "
    "which was tuned for none. A student may end above its teacher: it comes to take the likeliest token more often "
    "than the soft teacher does."
)
WORDS = {
    "live": "samples with the student of now at every step, and scores with the teacher at once; the paper's loss "
    "unless another is named",
    "Lightning": "offline: samples rollouts of the student after SFT, scores them once, goes over them several times",
    "`paper`, as in the paper": "the paper's loss, on the log-prob of the sampled token, mean per rollout, where the "
    "others take the mean over tokens. Only the loss is the paper's: rollouts are sampled at temperature 1 (the paper: "
    "0.7, top-p 0.9), without weight decay",
    "`importance`": "the same, each token weighted by its probability under the student of now over that when it was "
    "sampled, at most 2",
    "`proximal`": "the paper's loss with an even mixture of teacher and student for a teacher, which bounds the "
    "advantage from below",
    "`topk`, full support": "KL over the teacher's k likeliest tokens, or all of them, at every stored state",
    "ESS, k3": "signs of how far the student has left its rollouts: effective share of tokens under the importance "
    "weights, and an estimate of the KL to the policy that sampled",
}
FURTHER = (
    "More on the objectives: [training.md](training.md#which-objective). How it is run: "
    "[benchmarks/README.md](../benchmarks/README.md#study); what all arms share: "
    "[study.toml](../benchmarks/study/study.toml)."
)
READING = (
    "Figures with ± are means over seeds and half of their 95% interval (Student's t), unless the finding says "
    "otherwise; each names its seeds, and fewer have wider intervals for the same spread. Seeds differ in the order of "
    "SFT's rows, the rollouts and their questions, the order of training, and the held-out questions and answers; "
    "task, teachers, base model and SFT answers are one and the same, so the intervals say nothing of other ones. All "
    "are measured at answers that the student samples itself, to questions that no student was fine-tuned or distilled "
    "on; KL divergences are exact sums over the whole vocabulary, in nats per token. A claim *holds* or *does not "
    "hold* where the intervals show it, and is *not shown* where they leave it open; *measured* is said where there "
    "was none."
)
COLUMNS = 120
"""Characters of a line, where words can be broken; a wider table is not padded."""
STYLE = "figure h2 { font-size: 1rem; margin: 0; } th { vertical-align: bottom; }"
NOT_MEASURED = "–"


def headline(study: Study, page: str = "docs/study.md") -> str:
    """The claims as a Markdown table: title, verdict, and the first sentence of the answer.

    Args:
        page: where study.md lies as seen from the text that the table stands in; empty within it.
    """
    lines = [
        (f"[{one.title}]({page}#{_anchor(one)})", one.verdict, _first_sentence(one.answer)) for one in _claims(study)
    ]
    return _table(("Claim", "Verdict", "Found"), lines, numbers=False)


def markdown(study: Study) -> str:
    """The text of study.md."""
    besides = [f"- [{one.title}](#{_anchor(one)})" for one in study.findings if one.verdict == "measured"]
    parts = [
        f"# {TITLE}",
        _wrapped(OPENING),
        _wrapped(SETTING),
        "\n".join(f"- {_indented(f'**{word}**: {meaning}.')}" for word, meaning in WORDS.items()),
        _wrapped(READING),
        _wrapped(FURTHER),
        "Plots: [study.html](study.html). Every number by seed: [study.json](study.json).",
        "## The claims",
        headline(study, page=""),
        *(["Measured besides:", "\n".join(besides)] if besides else []),
        *(part for finding in study.findings for part in _section(finding)),
        "## How it was made",
        "\n".join(f"- {key}: `{value}`" for key, value in _facts(study.about)),
    ]
    return "\n\n".join(parts) + "\n"


def page(study: Study) -> str:
    """The text of study.html."""
    claims = report.Table(
        ("Claim", "Verdict", "Found"),
        [(one.title, one.verdict, _first_sentence(one.answer)) for one in _claims(study)],
    )
    words = [f"**{word}**: {meaning}." for word, meaning in WORDS.items()]
    parts: list[report.Table | report.Figure | report.Markup] = [
        report.Markup("", "".join(map(_paragraph, (SETTING, *words, READING))), STYLE),
        claims,
        report.Markup("", _contents(study)),
    ]
    for one in study.findings:
        parts += [
            report.Markup(one.title, f'<a id="{_anchor(one)}"></a>{_paragraph(one.question)}'),
            report.Table(*table_of(one)),
            report.Markup("", "".join(map(_paragraph, _answers(one)))),
            *(plots.curves(plot) for plot in one.plots),
            *plots.intervals(one),
        ]
    return report.page(TITLE, OPENING, parts, dict(_facts(study.about)))


def _contents(study: Study) -> str:
    """Links to the findings."""
    links = (f'<a href="#{_anchor(one)}">{html.escape(one.title)}</a>' for one in study.findings)
    return f"<p>{' · '.join(links)}</p>"


def _section(finding: Finding) -> list[str]:
    return [
        f'<a id="{_anchor(finding)}"></a>\n\n## {finding.title}',
        _wrapped(finding.question),
        _table(*table_of(finding), numbers=True),
        *map(_wrapped, _answers(finding)),
    ]


def _answers(finding: Finding) -> list[str]:
    """The paragraphs below a finding's table."""
    failed = finding.verdict in ("does not hold", "not shown")
    remedy = [f"**What would make it hold.** {finding.would_hold}"] if failed and finding.would_hold else []
    return [f"**{_spoken(finding)}** {finding.answer}", *remedy, _seeds(finding)]


def table_of(finding: Finding) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a finding's table."""
    digits = {column: _decimals([row.figures.get(column) for row in finding.rows]) for column in finding.columns}
    rows = [
        [row.name, *(_cell(row.figures.get(column), places) for column, places in digits.items())]
        for row in finding.rows
    ]
    return ["", *finding.columns.values()], rows


def _decimals(cells: Sequence[Mean | float | str | None]) -> int:
    """Of a column of means: two digits of the interval in the middle, and one of the smallest."""
    halves = sorted(cell.half for cell in cells if isinstance(cell, Mean) and cell.half)
    if not halves:
        return 3
    places = [math.floor(math.log10(half)) for half in (halves[len(halves) // 2], halves[0])]
    return min(max(1 - places[0], -places[1], 0), 9)


def _cell(figure: Mean | float | str | None, decimals: int) -> str:
    if isinstance(figure, Mean):
        return f"{figure.mean:,.{decimals}f} ± {figure.half:,.{decimals}f}"
    if isinstance(figure, int):
        return f"{figure:,}"
    if isinstance(figure, float):
        return f"{figure:,.0f}" if abs(figure) >= 1000 else f"{figure:.3g}"
    return figure or NOT_MEASURED


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool) -> str:
    """A Markdown table, padded where that fits on a line; with `numbers`, all but the first column stand right."""
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in (header, *rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]
    if sum(widths) + 3 * len(widths) + 1 > COLUMNS:
        widths = [3] * len(widths)
    right = [numbers and column > 0 for column in range(len(header))]
    rule = ["-" * (width - 1) + (":" if at_right else "-") for width, at_right in zip(widths, right, strict=True)]
    padded = [
        [
            cell.rjust(width) if at_right else cell.ljust(width)
            for cell, width, at_right in zip(line, widths, right, strict=True)
        ]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]])


def _wrapped(text: str) -> str:
    """In lines; a number or dash that comes to stand first in one must not make a list of it."""
    lines = textwrap.wrap(text, COLUMNS, break_long_words=False, break_on_hyphens=False)
    marked = (re.sub(r"^([-+>#]+)(?=\s)", r"\\\1", line) for line in lines)
    return "\n".join(re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line) for line in marked)


def _indented(text: str) -> str:
    """The same, as an item of a list."""
    return _wrapped(text).replace("\n", "\n  ")


def _paragraph(text: str) -> str:
    """Markdown's bold, emphasis and code as HTML."""
    shown = html.escape(text, quote=False)
    for mark, tag in ((r"`([^`]+)`", "code"), (r"\*\*([^*]+)\*\*", "b"), (r"\*([^*\s][^*]*)\*", "i")):
        shown = re.sub(mark, rf"<{tag}>\1</{tag}>", shown)
    return f"<p>{shown}</p>"


def _spoken(finding: Finding) -> str:
    told = {"measured": "Found.", "not shown": "The claim is not shown."}
    return told.get(finding.verdict, f"The claim {finding.verdict}.")


def _seeds(finding: Finding) -> str:
    return f"{'Seeds' if len(finding.seeds) > 1 else 'One seed'}: {', '.join(map(str, finding.seeds))}."


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`(])", text, maxsplit=1)[0]


def _anchor(finding: Finding) -> str:
    return f"finding-{finding.key}"


def _claims(study: Study) -> list[Finding]:
    return [finding for finding in study.findings if finding.verdict != "measured"]


def _facts(about: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values of what `Study.about` holds at any depth."""
    for key, value in about.items():
        if isinstance(value, Mapping):
            yield from _facts(value, f"{above}{key}.")
        else:
            items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
            yield f"{above}{key}", "; ".join(item if isinstance(item, str) else json.dumps(item) for item in items)
