"""Reads query parameters: each function gives a value, or None without the parameter, or says what is wrong with it.

All raise ProblemError 400. No I/O: what is relative to the present gets it as ``now``.
"""

from __future__ import annotations

import re
from datetime import datetime
from http import HTTPStatus

from proxy.admin.http import ProblemError, Request

DIGITS_MAX = 15  # of a number: what JSON's readers, and the store's keys, hold exactly

_SECONDS_OF_UNIT = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
# Of a moment that a date can name: the beginning of the year 1, and of the year 10000.
_SECONDS_MIN, _SECONDS_END = -62_135_596_800, 253_402_300_800
_RELATIVE = re.compile(r"-(?:\d{1,9}[smhd])+")
_RELATIVE_PART = re.compile(r"(\d+)([smhd])")


def text_of(request: Request, name: str) -> str | None:
    """The one value of ``name``, which is not empty."""
    values = request.query.get(name)
    if values is None:
        return None
    if len(values) > 1:
        raise _bad(f"{name} may be given once, and came {len(values)} times")
    if not values[0]:
        raise _bad(f"{name} is empty")
    return values[0]


def number_of(request: Request, name: str, *, least: int = 0, most: int | None = None) -> int | None:
    text = text_of(request, name)
    if text is None:
        return None
    if text.isascii() and text.isdigit() and len(text) <= DIGITS_MAX:
        number = int(text)
        if least <= number and (most is None or number <= most):
            return number
    bounds = f"from {least}" if most is None else f"from {least} to {most}"
    raise _bad(f"{name} is a number {bounds}, and not {text!r}")


def flag_of(request: Request, name: str) -> bool | None:
    text = text_of(request, name)
    if text not in (None, "true", "false"):
        raise _bad(f"{name} is true or false, and not {text!r}")
    return None if text is None else text == "true"


def moment_of(request: Request, name: str, *, now: float) -> float | None:
    """Unix seconds of a time: RFC 3339, Unix seconds, or relative to ``now`` as in ``-10m`` or ``-1h30m``."""
    text = text_of(request, name)
    if text is None:
        return None
    try:
        if _RELATIVE.fullmatch(text):
            parts = _RELATIVE_PART.findall(text)
            at = now - sum(int(count) * _SECONDS_OF_UNIT[unit] for count, unit in parts)
        else:
            at = float(text) if text[0].isdigit() and "-" not in text else _seconds_of_date(text)
        if _SECONDS_MIN <= at < _SECONDS_END:  # NaN is not
            return at
    except (ValueError, OverflowError):
        pass
    raise _bad(
        f"{name} is a time: 2026-03-01T12:00:00Z, 1772366400, or -10m (s, m, h, d); "
        f"{text!r} is none, or lacks its offset from UTC, or its year is not 1 to 9999"
    )


def _seconds_of_date(text: str) -> float:
    """Raises ValueError, OverflowError."""
    # A "+" that was not written as %2B arrives as a space.
    moment = datetime.fromisoformat(text.replace(" ", "+") if "T" in text else text)
    if moment.tzinfo is None:
        raise ValueError("no offset from UTC")
    return moment.timestamp()


def _bad(detail: str) -> ProblemError:
    return ProblemError(HTTPStatus.BAD_REQUEST, detail)
