"""On which line of a TOML text each key stands. tomllib gives the values but no positions.

The text must be one that ``tomllib.loads`` accepted: this walks it and checks nothing again. Source of the
grammar: TOML v1.0.0.
"""

from __future__ import annotations

import re
import tomllib

Path = tuple[str | int, ...]  # keys, and indexes into arrays: ("listeners", 0, "address")

_SPACE = re.compile(r"[ \t]*")
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")  # what may stand between statements and between array elements
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r'"""(?:[^\\"]|\\[\s\S]|"(?!""))*"{3,5}'  # up to two quotes may stand before the closing three
    r"|'''(?:[^']|'(?!''))*'{3,5}"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'"
)
_SCALAR = re.compile(r"[^,\]}#\n]+")


def lines_of(text: str) -> dict[Path, int]:
    """The 1-based line of each key, table header, and array element, by its path.

    A table that is only implied by a longer header or a dotted key stands where it was first implied.
    """
    return _Walk(text).statements()


class _Walk:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._lines: dict[Path, int] = {}
        self._array_counts: dict[Path, int] = {}  # path of an array of tables -> tables so far

    def statements(self) -> dict[Path, int]:
        table: Path = ()
        self._skip(_BLANK)
        while self._at < len(self._text):
            if self._text.startswith("[[", self._at):
                table = self._array_table_header()
            elif self._text.startswith("[", self._at):
                table = self._table_header()
            else:
                self._key_and_value(table)
            self._skip(_BLANK)
        return self._lines

    def _array_table_header(self) -> Path:
        line = self._line()
        self._at += len("[[")
        *parents, last = self._dotted_key()
        self._at += len("]]")
        array = (*self._resolve(parents, line), last)
        index = self._array_counts.get(array, 0)
        self._array_counts[array] = index + 1
        self._note(array, line)
        self._note((*array, index), line)
        return (*array, index)

    def _table_header(self) -> Path:
        line = self._line()
        self._at += len("[")
        keys = self._dotted_key()
        self._at += len("]")
        table = self._resolve(keys, line)
        self._lines[table] = line  # its own header says more than a longer one that implied it
        return table

    def _resolve(self, keys: list[str], line: int) -> Path:
        """A header's keys as a path: a key that names an array of tables means its newest table."""
        path: Path = ()
        for key in keys:
            path = (*path, key)
            if path in self._array_counts:
                path = (*path, self._array_counts[path] - 1)
            self._note(path, line)
        return path

    def _key_and_value(self, table: Path) -> None:
        line = self._line()
        path = table
        for key in self._dotted_key():
            path = (*path, key)
            self._note(path, line)
        self._at += len("=")
        self._skip(_SPACE)
        self._value(path)

    def _value(self, path: Path) -> None:
        """Steps over one value, and notes the elements and keys inside it."""
        opening = self._text[self._at]
        if opening == "[":
            self._at += 1
            self._skip(_BLANK)
            index = 0
            while self._text[self._at] != "]":
                self._note((*path, index), self._line())
                self._value((*path, index))
                index += 1
                self._skip_comma()
            self._at += 1
        elif opening == "{":
            self._at += 1
            self._skip(_BLANK)
            while self._text[self._at] != "}":
                self._key_and_value(path)
                self._skip_comma()
            self._at += 1
        elif opening in "\"'":
            self._take(_STRING)
        else:
            self._take(_SCALAR)

    def _dotted_key(self) -> list[str]:
        """Reads ``a . "b" . 'c'`` with the spaces around it, and stops before what follows."""
        keys = []
        while True:
            self._skip(_SPACE)
            if self._text[self._at] in "\"'":
                keys.append(str(tomllib.loads(f"key = {self._take(_STRING)}")["key"]))
            else:
                keys.append(self._take(_BARE_KEY))
            self._skip(_SPACE)
            if self._text[self._at] != ".":
                return keys
            self._at += 1

    def _skip_comma(self) -> None:
        self._skip(_BLANK)
        if self._text[self._at] == ",":
            self._at += 1
            self._skip(_BLANK)

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self._text, self._at)
        if match is not None:
            self._at = match.end()

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        if match is None:
            raise ValueError(f"not a TOML text at line {self._line()}")
        self._at = match.end()
        return match.group()

    def _note(self, path: Path, line: int) -> None:
        self._lines.setdefault(path, line)

    def _line(self) -> int:
        return self._text.count("\n", 0, self._at) + 1
