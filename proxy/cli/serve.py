"""``steadyread serve``: run the proxy in front of a cluster."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from proxy.app import Proxy
from proxy.cli.settings_options import add_setting_flags, load_from, print_problems
from proxy.embedded.cluster import ClusterError, running_cluster
from proxy.embedded.engine import EngineNotFound, find_engine
from proxy.log import configure, get_logger
from proxy.settings import Settings
from proxy.settings.load import SettingsError
from proxy.settings.state import MEMORY

if TYPE_CHECKING:
    from proxy.cli.main import Subparsers

log = get_logger(__name__)

# So long the data plane waits for the interpreter behind a thread, of the store or of memcached. With Python's own
# 5 ms, replies that wait in their sockets meanwhile would make nodes look slow.
SWITCH_SECONDS = 0.0005

DESCRIPTION = """\
Run the proxy until SIGTERM or SIGINT. Then it accepts nobody, finishes what is in flight within
stop_deadline_seconds, and logs what was cut off. Settings: command line over environment over file over defaults;
'steadyread config show' writes them all.
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="run the proxy in front of a cluster",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_setting_flags(parser)
    parser.add_argument(
        "--embedded",
        action="store_true",
        help="start a cluster of 3 primaries and 3 replicas for it, and stop it after",
    )
    parser.add_argument("--engine", metavar="PROGRAM", help="with --embedded: the server program to use")


def run(arguments: argparse.Namespace) -> int:
    try:
        settings = load_from(arguments).settings
    except SettingsError as error:
        print_problems(error)
        return 2
    configure(settings.log_level)
    sys.setswitchinterval(SWITCH_SECONDS)
    return trio.run(_serve, settings, arguments)


async def _serve(settings: Settings, arguments: argparse.Namespace) -> int:
    failures: list[BaseException] = []
    try:
        if arguments.embedded:
            await _serve_embedded(settings, arguments)
        else:
            await Proxy(settings, lambda: load_from(arguments).settings).run()
    except* (OSError, ClusterError, EngineNotFound) as group:
        failures += leaves(group)
    for failure in failures:
        print(f"steadyread serve: {failure}", file=sys.stderr)
    return 1 if failures else 0


async def _serve_embedded(settings: Settings, arguments: argparse.Namespace) -> None:
    """A cluster of the proxy's own, which is gone when the proxy is."""
    engine = find_engine(arguments.engine)
    log.info("embedded_cluster_starting", engine=str(engine))
    async with running_cluster(engine) as cluster:
        log.info("embedded_cluster_started", engine=str(engine), nodes=list(cluster.addresses))

        def with_cluster(given: Settings) -> Settings:
            # The cluster is gone when the proxy is: a record of it is kept only where one was asked for.
            store = replace(given.store, file=given.store.file or MEMORY)
            return replace(given, cluster=replace(given.cluster, seeds=cluster.addresses), store=store)

        await Proxy(with_cluster(settings), lambda: with_cluster(load_from(arguments).settings)).run()


def leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The exceptions of a group of groups."""
    found: list[BaseException] = []
    for error in group.exceptions:
        found += leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
