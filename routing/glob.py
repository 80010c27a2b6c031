"""Glob patterns as in Redis: ``*``, ``?``, ``[a-z]``, ``[^a]``, ``\\`` takes the next character as it is.

Matching takes time at most in proportion to pattern times text, whatever a client sends: what stands between
two stars is an atomic group, so only the last star is ever tried again.
"""

from __future__ import annotations

import re
from typing import TypeAlias

Pattern: TypeAlias = re.Pattern[bytes]

PATTERN_BYTES_MAX = 1024  # compiling takes about 5 microseconds a byte, which others wait for

_NOTHING = b"(?!)"


class PatternError(ValueError):
    """The pattern is too long. The message is an error reply's text."""


def is_pattern(text: bytes) -> bool:
    """Whether ``text`` can stand for more than itself."""
    return any(character in text for character in b"*?[")


def parse(pattern: bytes, *, ignore_case: bool = False) -> Pattern:
    """A class that is never closed reaches to the end, as in Redis.

    ``ignore_case``: for texts that are in lower case. Raises PatternError.
    """
    if len(pattern) > PATTERN_BYTES_MAX:
        raise PatternError(
            f"ERR the pattern has {len(pattern)} bytes; at most {PATTERN_BYTES_MAX} are matched"
        )
    if ignore_case:
        pattern = pattern.lower()
    pieces = [b""]  # expressions for what stands between the stars
    at = 0
    while at < len(pattern):
        character = pattern[at]
        at += 1
        if character == ord("*"):
            pieces.append(b"")
        elif character == ord("?"):
            pieces[-1] += b"."
        elif character == ord("["):
            members, at = _parse_class(pattern, at)
            pieces[-1] += members
        else:
            if character == ord("\\") and at < len(pattern):
                character = pattern[at]
                at += 1
            pieces[-1] += b"\\x%02x" % character
    first, *others = pieces
    if others:
        *middle, last = others
        first += b"".join([b"(?>.*?%b)" % piece for piece in middle if piece]) + b".*" + last
    return re.compile(first, re.DOTALL)


def matches(pattern: Pattern, text: bytes) -> bool:
    """Whether the whole ``text`` is what ``pattern`` describes."""
    return pattern.fullmatch(text) is not None


def _parse_class(pattern: bytes, at: int) -> tuple[bytes, int]:
    """The expression of a class whose ``[`` stands before ``at``, and where the pattern goes on."""
    is_negated = pattern[at : at + 1] == b"^"
    at += is_negated
    members = b""
    while at < len(pattern) and pattern[at] != ord("]"):
        if pattern[at] == ord("\\") and at + 1 < len(pattern):
            members += b"\\x%02x" % pattern[at + 1]
            at += 2
        elif pattern[at + 1 : at + 2] == b"-" and at + 2 < len(pattern):
            first, last = sorted((pattern[at], pattern[at + 2]))
            members += b"\\x%02x-\\x%02x" % (first, last)
            at += 3
        else:
            members += b"\\x%02x" % pattern[at]
            at += 1
    if not members:
        return (b"." if is_negated else _NOTHING), at + 1
    return b"[%b%b]" % (b"^" if is_negated else b"", members), at + 1
