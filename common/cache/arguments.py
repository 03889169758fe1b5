"""Arguments that commands of `lopd cache` share."""

from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from common.urls import is_url


def complete_folder(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Folders of this machine; what lies on a store is not looked up while somebody types."""
    return [CompletionItem(incomplete, type="dir")]


class LocalPath(click.Path):
    """A path of this machine; a URL, which may hold a password, is refused and not repeated."""

    def __init__(self, *, folder: bool) -> None:
        super().__init__(exists=folder, dir_okay=folder, file_okay=not folder, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if is_url(str(value)):
            self.fail("give a path of this machine, not a URL", param, ctx)
        return super().convert(value, param, ctx)


url_argument = click.argument("url", shell_complete=complete_folder)
json_flag = click.option("--json", "as_json", is_flag=True, help="One JSON value on stdout instead of text.")
