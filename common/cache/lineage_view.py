"""A lineage tree drawn: for a terminal, as plain lines, as JSON, as a nested list of a page."""

import html
from typing import Any

from rich.text import Text
from rich.tree import Tree

from common.cache.lineage_tree import Mark, Node
from common.untrusted import one_line

COLOURS = {"good": "green", "doubt": "yellow", "bad": "bold red"}
UNKNOWN = "(not recorded)"
SHORT = 12
"""Digits of a hash that are shown where people read."""


def as_lines(node: Node) -> list[str]:
    """The tree in box characters, one line a node."""
    lines = [_label(node).plain]
    for index, child in enumerate(node.made_from):
        last = index == len(node.made_from) - 1
        first, *rest = as_lines(child)
        lines.append(f"{'└── ' if last else '├── '}{first}")
        lines += [f"{'    ' if last else '│   '}{line}" for line in rest]
    return lines


def as_rich(node: Node) -> Tree:
    """The tree for a terminal, coloured by the marks."""
    tree = Tree(_label(node), guide_style="dim")
    for child in node.made_from:
        tree.children.append(as_rich(child))
    return tree


def as_json(node: Node) -> dict[str, Any]:
    """Nested objects; `made_from` are the node's inputs."""
    return {
        "what": node.what,
        "name": node.name or None,
        **dict(node.pins),
        "marks": [{"text": mark.text, "level": mark.level} for mark in node.marks],
        "made_from": [as_json(child) for child in node.made_from],
    }


def as_html(node: Node) -> str:
    """Nested lists with the classes of `TREE_STYLE`."""
    return f'<ul class="tree">{_item(node)}</ul>'


TREE_STYLE = """
ul.tree, ul.tree ul { list-style: none; margin: 0; padding-left: 0; }
ul.tree ul { margin-left: .55rem; padding-left: 1.1rem; border-left: 2px solid #e2e8f0; }
ul.tree li { padding: .2rem 0; } ul.tree b { font-weight: 600; }
ul.tree .pin { color: #64748b; font-size: .85em; white-space: nowrap; }
.mark { font-size: .8em; padding: .05rem .5rem; border-radius: 1rem; white-space: nowrap; }
.mark.good { background: #dcfce7; color: #166534; } .mark.doubt { background: #fef9c3; color: #854d0e; }
.mark.bad { background: #fee2e2; color: #991b1b; font-weight: 600; }
"""


def _label(node: Node) -> Text:
    """One line: what it is, its name, what pins it, the marks."""
    text = Text(one_line(node.what), "bold")
    text.append(f"  {one_line(node.name)}" if node.name else "", "not bold")
    if not node.name and not node.pins:
        text.append(f"  {UNKNOWN}", "not bold dim")
    for name, value in node.pins:
        text.append(f"  {_short(name)} {one_line(value)[:SHORT]}", "not bold dim")
    for mark in node.marks:
        text.append(f"  [{one_line(mark.text)}]", f"not bold {COLOURS[mark.level]}")
    return text


def _item(node: Node) -> str:
    name = html.escape(one_line(node.name))
    if not node.name and not node.pins:
        name = f'<span class="pin">{UNKNOWN}</span>'
    pins = "".join(
        f' <span class="pin" title="{html.escape(one_line(value))}">{_short(key)} '
        f"<code>{html.escape(one_line(value)[:SHORT])}</code></span>"
        for key, value in node.pins
    )
    marks = "".join(f" {_badge(mark)}" for mark in node.marks)
    below = "".join(_item(child) for child in node.made_from)
    return (
        f"<li><b>{html.escape(one_line(node.what))}</b> {name}{pins}{marks}{f'<ul>{below}</ul>' if below else ''}</li>"
    )


def _short(pin: str) -> str:
    return pin.removesuffix("_sha256")


def _badge(mark: Mark) -> str:
    return f'<span class="mark {mark.level}">{html.escape(one_line(mark.text))}</span>'
