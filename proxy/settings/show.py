"""Writes settings down: as complete TOML that loads to the same settings, and as plain facts for JSON.

Secrets are never written: in the TOML a comment says ``(set)``, so that the text still loads.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from enum import Enum

from proxy.settings.load import SECRET_SHOWN, Loaded, Problem
from proxy.settings.positions import Path
from proxy.settings.schema import Option, Table, dotted, table_of, variable_of
from proxy.settings.values import NodeZone, Settings
from routing.timeline import Plain
from routing.topology import Address

COMMENT_WIDTH = 100
LIVE_MARK = " (live)"
HEADER = """\
# Settings of Steadyread. Each line ends with where its value comes from.
# The command line is stronger than the environment, and that is stronger than the file. Each option has
# a variable: STEADYREAD_CLUSTER__SEEDS for seeds in [cluster], STEADYREAD_LISTENERS__0__ADDRESS for the
# first listener.
# What is marked (live) changes while the proxy runs, by a reload: SIGHUP, or POST /v1/settings/reload on
# the admin port. The rest needs a restart.
"""


def toml_of(loaded: Loaded) -> str:
    """All settings as a TOML text, each with its meaning and its origin."""
    return HEADER + "\n".join(_lines_of_table(loaded, loaded.settings, table_of(Settings), ())) + "\n"


def facts_of(loaded: Loaded) -> list[dict[str, object]]:
    """All settings as values for JSON: setting, value, origin, environment variable, meaning, whether it is live."""
    facts: list[dict[str, object]] = []
    for path, option, value in options_of(loaded.settings):
        is_hidden = option.says.is_secret and value != ""
        facts.append(
            {
                "setting": dotted(path),
                "value": SECRET_SHOWN if is_hidden else plain(value),
                "origin": str(loaded.origin_of(path)),
                "environment": variable_of(path),
                "meaning": option.says.meaning,
                "live": option.says.is_live,
            }
        )
    return facts


def facts_of_problem(problem: Problem) -> dict[str, object]:
    """A problem for JSON."""
    return {
        "origin": str(problem.origin),
        "line": problem.origin.line,
        "setting": problem.setting,
        "value": problem.value,
        "message": problem.message,
    }


def options_of(settings: Settings) -> Iterator[tuple[Path, Option, object]]:
    """Every option that these settings have, with its value, in the order of the schema."""
    return _options(settings, table_of(Settings), ())


def plain(value: object) -> Plain:
    """A setting's value as JSON carries it: addresses, zones and enums as their text."""
    if isinstance(value, Address | NodeZone):
        return str(value)
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, tuple):
        return [plain(element) for element in value]
    if isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"no JSON for {type(value).__name__}")


def _options(value: object, table: Table, path: Path) -> Iterator[tuple[Path, Option, object]]:
    for name, entry in table.entries.items():
        below, here = getattr(value, name), (*path, name)
        if isinstance(entry, Option):
            yield here, entry, below
        elif entry.is_array:
            for index, element in enumerate(below):
                yield from _options(element, entry, (*here, index))
        else:
            yield from _options(below, entry, here)


def _lines_of_table(loaded: Loaded, value: object, table: Table, path: Path) -> Iterator[str]:
    for name, entry in table.entries.items():
        below, here = getattr(value, name), (*path, name)
        if isinstance(entry, Option):
            yield ""
            yield from _comment(entry.says.meaning + (LIVE_MARK if entry.says.is_live else ""))
            origin = loaded.origin_of(here)
            if entry.says.is_secret and below != "":
                yield f"# {name} = {_toml(SECRET_SHOWN)}  # {origin}"
            else:
                yield f"{name} = {_toml(plain(below))}  # {origin}"
            continue
        if entry.is_array and not below:
            yield ""
            yield from _comment(f"There is none of these; each would look like this. {entry.meaning}")
            example = _lines_of_table(loaded, entry.kind(), entry, (*here, 0))
            yield from (f"# {line}".rstrip() for line in [entry.header, *example])
            continue
        tables = list(enumerate(below)) if entry.is_array else [(None, below)]
        for index, element in tables:
            yield ""
            yield from _comment(entry.meaning)
            yield entry.header
            yield from _lines_of_table(loaded, element, entry, here if index is None else (*here, index))


def _comment(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), COMMENT_WIDTH, initial_indent="# ", subsequent_indent="# ")


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(_toml(element) for element in value) + "]"
    raise TypeError(f"no TOML for {type(value).__name__}")
