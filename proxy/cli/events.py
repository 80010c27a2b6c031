"""``steadyread events``: what happened in the cluster, as a running proxy's record has it; now, or as it goes on.

Following is asking again from the last number, with an answer that waits for the next event. So nothing is lost or
shown twice when the proxy restarts meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from proxy.cli.admin_client import AdminPort, AskError, add_admin_flags, run_asking
from proxy.cli.terminal import printable

if TYPE_CHECKING:
    from rich.text import Text

    from proxy.cli.main import Subparsers

LIMIT_MAX = 200  # events of one answer
WAIT_SECONDS = 20  # of one question, when following
ANSWER_SECONDS = 10.0  # beyond that, until the answer is given up
RETRY_SECONDS = 1.0
TEMPORARY = (None, 503)  # statuses of a proxy that may be back soon: no answer at all, or "stopping"

# The first of these that a kind contains gives its colour.
STYLES = {
    "lost": "bold red",
    "uncovered": "bold red",
    "failed": "bold red",
    "replaced": "bold red",
    "stuck": "yellow",
    "gap": "yellow",
    "found": "yellow",
    "failover": "magenta",
    "recovered": "green",
    "covered": "green",
    "completed": "green",
    "resumed": "green",
    "gone": "green",
}

EXAMPLES = """\
examples:
  steadyread events                                    the newest 20
  steadyread events --follow                           and those to come, until Ctrl-C
  steadyread events --kind 'migration_*' --slot 866 --evidence
  steadyread events --from 1 --limit 200 --json | jq .message
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "events",
        help="show what happened in the cluster, and follow it",
        description="Shows what happened in the cluster, as the proxy's record has it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_admin_flags(parser)
    parser.add_argument("--follow", action="store_true", help="go on with each event as it happens")
    parser.add_argument(
        "--from", dest="first", metavar="N", type=_count, help="begin with event N, instead of the newest"
    )
    parser.add_argument(
        "--limit", metavar="N", type=_limit, default=20, help=f"at most so many, up to {LIMIT_MAX} (20)"
    )
    parser.add_argument(
        "--kind",
        action="append",
        default=[],
        help="only this kind, or pattern such as 'migration_*'; repeat it",
    )
    parser.add_argument("--shard", metavar="ID", help="only what concerns this node id, or its beginning")
    parser.add_argument("--slot", metavar="N", help="only what concerns this slot")
    parser.add_argument("--evidence", action="store_true", help="show what each event was concluded from")


def run(arguments: argparse.Namespace) -> int:
    show = _Lines(as_json=arguments.json, with_evidence=arguments.evidence)
    return run_asking(arguments, lambda port: (_follow if arguments.follow else _list)(port, arguments, show))


def _list(port: AdminPort, arguments: argparse.Namespace, show: _Lines) -> int:
    """Pages until there are enough events, or no more: the proxy looks at a bounded part of its record at a time."""
    page = _ask(port, arguments, arguments.first, arguments.limit)
    shown = show.page(page)
    while shown < arguments.limit and not page["at_end"]:
        page = _ask(port, arguments, page["next"], arguments.limit - shown)
        shown += show.page(page)
    if arguments.first is None and shown < arguments.limit and page["looked_from"] > 1:
        _say(f"looked back to event {page['looked_from']}; --from 1 looks at all that are kept")
    return 0


def _follow(port: AdminPort, arguments: argparse.Namespace, show: _Lines) -> int:
    """Until interrupted. The first question must be answered; later ones are asked again for as long as it takes."""
    page = _ask(port, arguments, arguments.first, arguments.limit)
    show.page(page)
    place = page["next"]
    is_lost = False
    while True:
        try:
            page = _ask(port, arguments, place, LIMIT_MAX, wait_seconds=WAIT_SECONDS)
        except AskError as error:
            if error.status == 400 and "newest" in error.problem:
                _say(f"{error}\nsteadyread: going on with event 1 of the record that is there now")
                place = 1
                continue
            if error.status not in TEMPORARY:
                raise
            if not is_lost:
                _say(f"{error}; asking again until there is an answer")
            is_lost = True
            time.sleep(RETRY_SECONDS)
            continue
        if is_lost:
            _say(f"answered again; going on with event {place}")
        is_lost = False
        show.page(page)
        place = page["next"]


def _ask(
    port: AdminPort, arguments: argparse.Namespace, first: int | None, limit: int, *, wait_seconds: int = 0
) -> dict[str, Any]:
    """One page. Raises AskError."""
    query = {
        "from": first,
        "limit": limit,
        "kind": arguments.kind,
        "shard": arguments.shard,
        "slot": arguments.slot,
        "wait_seconds": wait_seconds or None,
    }
    given = {name: value for name, value in query.items() if value is not None}
    return port.ask(
        f"/v1/events?{urlencode(given, doseq=True)}",
        expected="events",
        timeout_seconds=wait_seconds + ANSWER_SECONDS,
    )


class _Lines:
    """Prints events, one on each line: JSON, or time, number, kind and message."""

    def __init__(self, *, as_json: bool, with_evidence: bool) -> None:
        self._as_json = as_json
        self._with_evidence = with_evidence

    def page(self, page: dict[str, Any]) -> int:
        """How many there were. What the page says is missing goes to standard error."""
        if page["missing_before"] is not None:
            _say(f"events before {page['missing_before']} are no longer kept")
        events: list[dict[str, Any]] = page["events"]
        if self._as_json:
            for event in events:
                print(json.dumps(event))
        elif events:
            from rich.console import Console

            console = Console(soft_wrap=True)
            for event in events:
                console.print(line_of(event))
                if self._with_evidence:
                    for name, value in event["evidence"].items():
                        console.print(f"    {name}: {json.dumps(value)}", markup=False, style="dim")
        sys.stdout.flush()
        return len(events)


def line_of(event: dict[str, Any]) -> Text:
    """An event for a rich console."""
    from rich.text import Text

    kind = event["kind"]
    style = next((style for word, style in STYLES.items() if word in kind), "cyan")
    return Text.assemble(
        (event["at"], "dim"),
        f" {event['number']:>7} ",
        (f"{kind:<20}", style),
        f" {printable(event['message'])}",
    )


def _say(text: str) -> None:
    print(f"steadyread: {text}", file=sys.stderr, flush=True)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def _limit(text: str) -> int:
    number = _count(text)
    if number > LIMIT_MAX:
        raise argparse.ArgumentTypeError(f"at most {LIMIT_MAX}; --from N shows the next ones")
    return number
