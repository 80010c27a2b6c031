"""``steadyread config``: checks the settings and shows what is in effect."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from proxy.cli.settings_options import add_setting_flags, load_from, print_problems
from proxy.settings.load import SettingsError
from proxy.settings.show import facts_of, facts_of_problem, toml_of

if TYPE_CHECKING:
    from proxy.cli.main import Subparsers

EXAMPLES = """\
examples:
  steadyread config show > steadyread.toml           a complete file to start from, each option explained
  steadyread config check --config steadyread.toml   every problem in it, with its line
  steadyread config show --config steadyread.toml    what is in effect, and where each value comes from
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "config",
        help="check or show the settings",
        description="Checks the settings, or shows each with meaning and origin. Secrets are never shown.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, text in (
        ("check", "exit 0 when the settings are usable, else name every problem and exit 1"),
        ("show", "write the settings in effect as complete TOML, each with its meaning and origin"),
    ):
        action = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        add_setting_flags(action)
        action.add_argument("--json", action="store_true", help="print facts as JSON")


def run(arguments: argparse.Namespace) -> int:
    try:
        loaded = load_from(arguments)
    except SettingsError as error:
        if arguments.json:
            facts = [facts_of_problem(problem) for problem in error.problems]
            print(json.dumps({"ok": False, "problems": facts}, indent=2))
        else:
            print_problems(error)
        return 1
    if arguments.action == "show":
        text = (
            json.dumps({"settings": facts_of(loaded)}, indent=2)
            if arguments.json
            else toml_of(loaded).rstrip()
        )
    else:
        text = (
            json.dumps({"ok": True, "problems": []}, indent=2)
            if arguments.json
            else "The settings are usable."
        )
    print(text)
    return 0
