"""Glob patterns as in Redis: ``*``, ``?``, ``[a-z]``, ``[^a]``, ``\\`` takes the next character as it is.

Matching takes time at most in proportion to pattern times text, whatever a client sends: only the last star
is ever tried again.
"""

from __future__ import annotations

_STAR = None  # among the sets of a parsed pattern

# One character of the text each: the bytes that may stand there, or _STAR.
Pattern = list[frozenset[int] | None]

_ANY = frozenset(range(256))


def parse(pattern: bytes, *, ignore_case: bool = False) -> Pattern:
    """A class that is never closed reaches to the end, as in Redis.

    ``ignore_case``: for texts that are in lower case.
    """
    if ignore_case:
        pattern = pattern.lower()
    parts: Pattern = []
    at = 0
    while at < len(pattern):
        character = pattern[at]
        at += 1
        if character == ord("*"):
            if not parts or parts[-1] is not _STAR:
                parts.append(_STAR)
        elif character == ord("?"):
            parts.append(_ANY)
        elif character == ord("["):
            members, at = _parse_class(pattern, at)
            parts.append(members)
        else:
            if character == ord("\\") and at < len(pattern):
                character = pattern[at]
                at += 1
            parts.append(frozenset((character,)))
    return parts


def matches(pattern: Pattern, text: bytes) -> bool:
    """Whether the whole ``text`` is what ``pattern`` describes."""
    at = in_pattern = 0
    last_star = -1
    star_until = 0  # the text that the last star takes ends here
    while at < len(text):
        part = pattern[in_pattern] if in_pattern < len(pattern) else frozenset[int]()
        if part is _STAR:
            last_star, star_until = in_pattern, at
            in_pattern += 1
        elif part is not None and text[at] in part:
            at += 1
            in_pattern += 1
        elif last_star >= 0:
            star_until += 1
            at, in_pattern = star_until, last_star + 1
        else:
            return False
    return all(part is _STAR for part in pattern[in_pattern:])


def _parse_class(pattern: bytes, at: int) -> tuple[frozenset[int], int]:
    """The members of a class whose ``[`` stands before ``at``, and where the pattern goes on."""
    is_negated = pattern[at : at + 1] == b"^"
    at += is_negated
    members: set[int] = set()
    while at < len(pattern) and pattern[at] != ord("]"):
        if pattern[at] == ord("\\") and at + 1 < len(pattern):
            members.add(pattern[at + 1])
            at += 2
        elif pattern[at + 1 : at + 2] == b"-" and at + 2 < len(pattern):
            first, last = sorted((pattern[at], pattern[at + 2]))
            members.update(range(first, last + 1))
            at += 3
        else:
            members.add(pattern[at])
            at += 1
    return (_ANY - members if is_negated else frozenset(members)), at + 1
