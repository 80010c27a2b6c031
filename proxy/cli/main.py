"""Parses the command line and calls the command. Exit codes: 0 done, 1 failed, 2 misuse, 130 interrupted.

Each command is a module of this package with ``add_parser(subparsers)`` and ``run(arguments) -> exit code``.
Only the module of the command that was asked for is imported, so that each starts quickly and works alone.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

DONE, FAILED, MISUSE, INTERRUPTED = 0, 1, 2, 130

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

COMMANDS = {  # name -> summary; the module is proxy.cli.NAME
    "demo": "an embedded cluster, live traffic and a reshard, with and without the proxy",
    "serve": "run the proxy in front of a cluster",
    "cluster": "start, stop or look at an embedded cluster",
    "topology": "show the shards, slots, replicas and migrations that a running proxy sees",
    "events": "show what happened in the cluster, and follow it",
    "replicas": "show which replicas are readable, how far each is behind, and why one is not read",
    "hot": "show the keys and slots that clients ask for most",
    "explain": "show where a read goes, at which level, and why",
    "snapshot": "open, list, show or close snapshots: the whole cluster as of one moment",
    "mode": "show or set the routing mode: what reads get that ask for no level",
    "audit": "list what operators did, or verify that the list is whole",
    "config": "check or show the settings",
}

EXAMPLES = """\
examples:
  steadyread demo                                    see what it is for; needs nothing, ends by itself
  steadyread serve --embedded                        the proxy with a cluster of its own, to try things
  steadyread serve --seed 10.0.0.1:6379              the proxy in front of your cluster
  steadyread config show > steadyread.toml           a complete settings file to start from
  steadyread topology                                what a proxy on this machine sees
  steadyread events --follow                         what happens in its cluster

exit codes: 0 done, 1 failed, 2 misuse
'steadyread COMMAND --help' explains a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that ``argv`` (default: this process's arguments) names; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except SystemExit as exit_:  # argparse, after it has printed its message or the help
        return exit_.code if isinstance(exit_.code, int) else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BaseExceptionGroup as group:  # a nursery wraps what a signal raised in it
        if group.split(KeyboardInterrupt)[1] is None:
            return INTERRUPTED
        raise
    except BrokenPipeError:
        if not _is_reader_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit is quiet
        return FAILED


def _run(arguments: list[str]) -> int:
    asked_for = next((argument for argument in arguments if not argument.startswith("-")), None)
    parser = argparse.ArgumentParser(
        prog="steadyread",
        description="A read-routing proxy for Redis and Valkey Cluster: reads hold steady while data moves.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    module = None
    for name, summary in COMMANDS.items():
        if name == asked_for:
            module = import_module(f"proxy.cli.{name}")
            module.add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    parsed = parser.parse_args(arguments)
    if module is None:
        raise RuntimeError("argparse accepted a command that was not found")
    code: int = module.run(parsed)
    sys.stdout.flush()  # here, where a reader that left is noticed
    return code


class _Version(argparse.Action):
    """Looks the version up only when asked: importlib.metadata is slow to import."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            text = version("steadyread")
        except PackageNotFoundError:
            text = "(not installed: running from its source tree)"
        print(f"steadyread {text}")
        parser.exit()


def _is_reader_gone() -> bool:
    """Whether standard output is a pipe whose reader, `head` for one, has left."""
    poller = select.poll()
    poller.register(sys.stdout.fileno(), 0)  # errors are reported unasked
    return any(events & select.POLLERR for _, events in poller.poll(0))
