"""Logs: one event on each line of standard error, with fields; JSON, or readable where a person looks on.

    log = get_logger(__name__)
    log.info("node_connected", node=address, attempts=3)

An event is a fixed name in lower case; what varies goes into fields. Payloads and passwords are never logged:
bytes appear as their length, and a field that is named like a secret as ``(hidden)``. Records of other
libraries, which use ``logging`` as it is, come out in the same form with the event ``log`` and their text as
``message``.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import Enum
from typing import TextIO

LEVELS: Mapping[str, int] = {  # the setting log_level -> logging's level
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
TEXT_CHARACTERS_MAX = 4096  # of one field: a log line is not where to keep more
_OWN_NAMES = frozenset({"time", "level", "event", "logger", "exception"})
_SECRET_NAME = re.compile(r"(^|_)(password|passwd|secret|token|authorization|payload)($|_)")
_FIELDS = "steadyread_fields"  # the attribute of a LogRecord that carries the fields


class Logger:
    """Writes events. A call below the level costs one look-up."""

    __slots__ = ("_logger",)

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def is_enabled_for(self, level: str) -> bool:
        """Whether an event of ``level`` would be written: ask before working out costly fields."""
        return self._logger.isEnabledFor(LEVELS[level])

    def debug(self, event: str, /, **fields: object) -> None:
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, /, **fields: object) -> None:
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, /, **fields: object) -> None:
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, /, **fields: object) -> None:
        self._log(logging.ERROR, event, fields)

    def exception(self, event: str, /, **fields: object) -> None:
        """An error with the traceback of the exception that is being handled."""
        self._log(logging.ERROR, event, fields, with_traceback=True)

    def _log(self, level: int, event: str, fields: dict[str, object], with_traceback: bool = False) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, "%s", event, extra={_FIELDS: fields}, exc_info=with_traceback)


def get_logger(name: str) -> Logger:
    """The logger of a module: ``get_logger(__name__)``."""
    return Logger(logging.getLogger(name))


def configure(level: str, *, stream: TextIO | None = None, is_human: bool | None = None) -> None:
    """Writes events of ``level`` (a key of LEVELS) and above to ``stream``, by default standard error.

    ``is_human`` chooses the readable form; by default a terminal gets it, and everything else JSON.
    Calling it again replaces what the last call set up.
    """
    stream = sys.stderr if stream is None else stream
    handler = _Handler(stream)
    is_human = stream.isatty() if is_human is None else is_human
    handler.setFormatter(_HumanFormatter() if is_human else _JsonFormatter())
    root = logging.getLogger()
    for earlier in [earlier for earlier in root.handlers if isinstance(earlier, _Handler)]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    set_level(level)


def set_level(level: str) -> None:
    """Writes events of ``level`` and above from now on, to where ``configure`` said."""
    logging.getLogger().setLevel(LEVELS[level])


class _Handler(logging.StreamHandler[TextIO]):
    """A class of its own, so that ``configure`` knows which handler it has set."""


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        event, fields = _event_of(record)
        line: dict[str, object] = {
            "time": _time_of(record),
            "level": record.levelname.lower(),
            "event": event,
            "logger": record.name,
        }
        line.update(fields)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, allow_nan=False)  # in ASCII: no text can break the line or the terminal


class _HumanFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        event, fields = _event_of(record)
        clock = _time_of(record)[11:23]
        shown = " ".join(f"{name}={_bare_or_quoted(value)}" for name, value in fields.items())
        line = f"{clock} {record.levelname.lower():<7} {event} {shown}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _time_of(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _event_of(record: logging.LogRecord) -> tuple[str, dict[str, object]]:
    """The event and its fields, ready for JSON. A field named like one of ours gets a ``_`` behind."""
    fields = getattr(record, _FIELDS, None)
    if fields is None:
        return "log", {"message": _plain(record.getMessage())}
    return record.getMessage(), {
        f"{name}_" if name in _OWN_NAMES else name: "(hidden)" if _SECRET_NAME.search(name) else _plain(value)
        for name, value in fields.items()
    }


def _plain(value: object) -> object:
    """``value`` as JSON can carry it; whatever is not plain becomes its text."""
    match value:
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case bytes() | bytearray() | memoryview():
            return f"<{len(value)} bytes>"
        case Enum():
            return _plain(value.value)
        case BaseException():
            return _cut(f"{type(value).__name__}: {value}")
        case Mapping():
            return {
                str(key): "(hidden)" if _SECRET_NAME.search(str(key)) else _plain(element)
                for key, element in value.items()
            }
        case list() | set() | frozenset():
            return [_plain(element) for element in value]
        case tuple() if (
            type(value).__str__ is tuple.__str__
        ):  # one with a text of its own, an Address, says it
            return [_plain(element) for element in value]
        case _:
            return _cut(str(value))


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_CHARACTERS_MAX else text[:TEXT_CHARACTERS_MAX] + "..."


def _bare_or_quoted(value: object) -> str:
    if isinstance(value, str) and value.isascii() and value.isprintable() and not set(value) & set(' ="'):
        return value
    return json.dumps(value)
