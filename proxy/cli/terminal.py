"""Text from outside on its way to a terminal: a cluster's names, a hook's last words, another process's answer."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` with all that could steer a terminal or break the line as an escape: ``\\x1b``, ``\\n``."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )
