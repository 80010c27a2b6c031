"""What commands print: text from outside (a cluster's names, another process's answer) made harmless, and tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType


def printable(text: str) -> str:
    """``text`` with all that could steer a terminal or break the line as an escape: ``\\x1b``, ``\\n``."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )


def print_rich(shown: Sequence[RenderableType]) -> None:
    """To a terminal as wide as it is; into a file or a pipe as wide as needed, so that lines stay whole."""
    from rich.console import Console

    console = Console()
    if not sys.stdout.isatty():
        width = max(
            console.measure(each, options=console.options.update(max_width=10_000)).maximum for each in shown
        )
        console = Console(width=max(width, console.width))
    console.print(*shown, sep="\n")
