"""What a reload changes: the settings as they are beside the settings as the sources give them now.

Pure: it reads no source and puts nothing into effect. Which settings may change while the proxy runs is said where
they are described, by ``Says.is_live``; nothing else decides it. No secret leaves this module.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from proxy.settings.positions import Path
from proxy.settings.schema import Option, Table, dotted, table_of
from proxy.settings.show import options_of, plain
from proxy.settings.values import Settings
from routing.timeline import Plain

SECRET_HIDDEN = "(hidden)"
RECORDED_BITS_MAX = 63  # of an integer: what the record's encoding carries; a larger one is shown as text


@dataclass(frozen=True, slots=True)
class Changed:
    """A setting that differs. Of a secret only is shown whether there is one: "" where there is none."""

    setting: str  # as in the file: cluster.seeds, listeners[1].address
    before: Plain  # as JSON carries it; None: the table that it is in was not there
    after: Plain  # None: the table that it is in is not there any more
    is_live: bool  # a reload puts it into effect; else it needs a restart


def changes(old: Settings, new: Settings) -> tuple[Changed, ...]:
    """What differs, in the order in which ``config show`` writes the settings; what ``new`` lacks comes last."""
    before, after = _values(old), _values(new)
    return tuple(_differing(before, after))


def applied(old: Settings, new: Settings) -> Settings:
    """``old`` with the live values of ``new``: what is in effect after a reload."""
    merged: Settings = _with_live_values(table_of(Settings), old, new)
    return merged


_Values = dict[Path, tuple[Option, object]]


def _values(settings: Settings) -> _Values:
    return {path: (option, value) for path, option, value in options_of(settings)}


def _differing(before: _Values, after: _Values) -> Iterator[Changed]:
    for path, (option, _) in {**after, **before}.items():
        is_in_both = path in before and path in after
        if is_in_both and before[path][1] == after[path][1]:
            continue
        yield Changed(dotted(path), _shown(before, path), _shown(after, path), option.says.is_live)


def _shown(values: _Values, path: Path) -> Plain:
    if path not in values:
        return None
    option, value = values[path]
    if option.says.is_secret:
        return SECRET_HIDDEN if value else ""
    if isinstance(value, int) and value.bit_length() > RECORDED_BITS_MAX:
        return str(value)
    return plain(value)


def _with_live_values(table: Table, old: Any, new: Any) -> Any:
    """An array of tables is replaced whole if all in it is live, else it stays whole.

    Which of the new tables an old one has become cannot be known.
    """
    values: dict[str, object] = {}
    for name, entry in table.entries.items():
        if isinstance(entry, Option):
            if entry.says.is_live:
                values[name] = getattr(new, name)
        elif entry.is_array:
            if entry.is_live:
                values[name] = getattr(new, name)
        else:
            values[name] = _with_live_values(entry, getattr(old, name), getattr(new, name))
    return replace(old, **values)
