"""Each key of a TOML text is found on its line."""

import tomllib

from hypothesis import given
from hypothesis import strategies as st

from proxy.settings.positions import Path, lines_of

EVERY_FORM = '''\
# a comment with [brackets] and = signs
plain = 1
dotted . "quo.ted" . 'lite"ral' = "a \\" # b"  # c

text = """
[not.a.table]
key = "no" \\
""""
after_text = \'\'\'
[[nor.this]]\'\'\'\'
date = 1979-05-27 07:32:00  # with a space
inline = { a = 1, "b.c" = [2, "}"], d.e = 3 }
list = [
  1, # one ]
  "]",

  [ 2,
    3 ],
]

[table]
key = ''

[[array]]
key = 1
[array.below]
key = 2

[[array]]
[[array.inner]]
key = 3
[["array".inner]]
key = 4
[a.b.c]
[a]
key = 5
'''


def test_every_form_of_key_is_found() -> None:
    """Dotted and quoted keys, headers, arrays of tables, multi-line values: each on its own line."""
    assert lines_of(EVERY_FORM) == {
        ("plain",): 2,
        ("dotted",): 3,
        ("dotted", "quo.ted"): 3,
        ("dotted", "quo.ted", 'lite"ral'): 3,
        ("text",): 5,
        ("after_text",): 9,
        ("date",): 11,
        ("inline",): 12,
        ("inline", "a"): 12,
        ("inline", "b.c"): 12,
        ("inline", "b.c", 0): 12,
        ("inline", "b.c", 1): 12,
        ("inline", "d"): 12,
        ("inline", "d", "e"): 12,
        ("list",): 13,
        ("list", 0): 14,
        ("list", 1): 15,
        ("list", 2): 17,
        ("list", 2, 0): 17,
        ("list", 2, 1): 18,
        ("table",): 21,
        ("table", "key"): 22,
        ("array",): 24,
        ("array", 0): 24,
        ("array", 0, "key"): 25,
        ("array", 0, "below"): 26,
        ("array", 0, "below", "key"): 27,
        ("array", 1): 29,
        ("array", 1, "inner"): 30,
        ("array", 1, "inner", 0): 30,
        ("array", 1, "inner", 0, "key"): 31,
        ("array", 1, "inner", 1): 32,
        ("array", 1, "inner", 1, "key"): 33,
        ("a",): 35,
        ("a", "b"): 34,
        ("a", "b", "c"): 34,
        ("a", "key"): 36,
    }
    assert set(_paths_of(tomllib.loads(EVERY_FORM), ())) == set(lines_of(EVERY_FORM))


SPELLINGS = ("{}", '"{}"', "'{}'", '"\\u006b{}"')
VALUES = (
    "1",
    "-0.5e3",
    "true",
    "inf",
    "1979-05-27T07:32:00Z",
    '""',
    "''",
    '"= [x] # \\\\"',
    "'\\'",
    '"""\n\n[x]\n""\\""""""',
    "'''\n''\n'''''",
    "[]",
    "[\n1, # ]\n\n[2],\n{a.b = '}'},\n]",
    '{ "x y" = [ 1,\n2 ] }',
    "{}",
)
GAPS = ("", "\n", "# [c]\n", " \t# x = 1\n\n")


@given(st.data())
def test_lines_agree_with_how_the_text_was_made(data: st.DataObject) -> None:
    """Whatever stands between and inside the values, every key is on the line where it was written."""
    text = ""
    expected: dict[Path, int] = {}
    table: Path = ()
    array_count = 0
    for number in range(data.draw(st.integers(1, 12))):
        text += data.draw(st.sampled_from(GAPS))
        line = text.count("\n") + 1
        spelling = data.draw(st.sampled_from(SPELLINGS))
        key = f"k{number}" if "006b" not in spelling else f"kk{number}"
        written = spelling.format(f"k{number}")
        form = data.draw(st.sampled_from(("value", "value", "dotted", "table", "array")))
        if form == "value":
            text += f" {written}\t= {data.draw(st.sampled_from(VALUES))} # end\n"
            expected[*table, key] = line
        elif form == "dotted":
            text += f"{written} . x={data.draw(st.sampled_from(VALUES))}\n"
            expected[*table, key, "x"] = line
        elif form == "table":
            text += f"[ {written} . t ]\n"
            table = (key, "t")
            expected[table] = line
        else:
            text += "[[ array.'of' ]]\n"
            table = ("array", "of", array_count)
            array_count += 1
            expected[table] = line
    lines = lines_of(text)
    assert {path: lines.get(path) for path in expected} == expected
    assert set(lines) == set(_paths_of(tomllib.loads(text), ()))


def _paths_of(value: object, path: Path) -> list[Path]:
    below: list[tuple[str | int, object]] = []
    if isinstance(value, dict):
        below = list(value.items())
    elif isinstance(value, list):
        below = list(enumerate(value))
    return [found for key, element in below for found in [(*path, key), *_paths_of(element, (*path, key))]]
