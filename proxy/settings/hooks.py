"""What must hold of the hooks beyond the limits of single options. Pure: it looks at values and names faults."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from proxy.settings.fault import Fault
from proxy.settings.positions import Path
from proxy.settings.schema import did_you_mean, dotted
from proxy.settings.values import HookSettings
from routing.timeline import EventKind

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")  # it stands in keys of the store, URLs and metrics
_NODE_ID = re.compile(r"[0-9a-f]{4,40}")  # or its beginning
_HEADER_VALUE = re.compile(r"[!-~]([ -~]*[!-~])?")
_KINDS = tuple(kind.value for kind in EventKind)


def hook_faults(hooks: tuple[HookSettings, ...]) -> Iterator[Fault]:
    """All that is wrong with them, in the order of the options."""
    index_of_name: dict[str, int] = {}
    for index, hook in enumerate(hooks):
        place: Path = ("hooks", index)
        yield from _name_faults(hook, place, index_of_name)
        index_of_name.setdefault(hook.name, index)
        yield from _event_faults(hook, place)
        yield from _shard_faults(hook, place)
        yield from _target_faults(hook, place)
        if hook.retry_max_seconds < hook.retry_first_seconds:
            yield Fault(
                (*place, "retry_max_seconds"),
                hook.retry_max_seconds,
                f"give at least retry_first_seconds, which is {hook.retry_first_seconds:g}",
                also=(*place, "retry_first_seconds"),
            )


def _name_faults(hook: HookSettings, place: Path, index_of_name: dict[str, int]) -> Iterator[Fault]:
    path = (*place, "name")
    if not _NAME.fullmatch(hook.name):
        message = "give 1 to 64 lower-case letters, digits, - and _, a letter or digit first"
        yield Fault(path, hook.name, message)
    elif (other := index_of_name.get(hook.name)) is not None:
        taken = ("hooks", other, "name")
        yield Fault(path, hook.name, f"is taken by {dotted(taken)}; give another", also=taken)


def _event_faults(hook: HookSettings, place: Path) -> Iterator[Fault]:
    if not hook.events:
        yield Fault((*place, "events"), [], 'give at least one kind; ["*"] means all')
    for pattern in hook.events:
        if not any(fnmatchcase(kind, pattern) for kind in _KINDS):
            hint = did_you_mean(pattern, _KINDS) or f"; there are {', '.join(_KINDS)}"
            yield Fault((*place, "events"), list(hook.events), f'"{pattern}" is no kind of event{hint}')


def _shard_faults(hook: HookSettings, place: Path) -> Iterator[Fault]:
    if hook.shard and not _NODE_ID.fullmatch(hook.shard):
        yield Fault((*place, "shard"), hook.shard, "give a node id, or at least its first 4 digits")


def _target_faults(hook: HookSettings, place: Path) -> Iterator[Fault]:
    command, url = (*place, "command"), (*place, "url")
    if hook.command and hook.url:
        yield Fault(url, None, "give either this or command, not both", also=command)
    elif not hook.command and not hook.url:
        yield Fault(command, [], "give a command or a url", also=url)
    elif hook.url:
        if message := _url_fault(hook.url):
            yield Fault(url, None, message)
    elif not hook.command[0] or any("\0" in word for word in hook.command):
        yield Fault(command, list(hook.command), "give a program first, and no NUL character")
    authorization = (*place, "authorization")
    if hook.authorization and not hook.url:
        yield Fault(authorization, None, "goes with a url; a command gets no header", also=command)
    elif hook.authorization and not _HEADER_VALUE.fullmatch(hook.authorization):
        message = "give printable ASCII without a space at either end, as HTTP headers carry it"
        yield Fault(authorization, None, message)


def _url_fault(url: str) -> str:
    """What would be right; empty if ``url`` can be posted to."""
    try:
        parts = urlsplit(url)
        port = parts.port  # raises ValueError
    except ValueError:
        return "give a URL, as in https://example.com/events"
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        return "give a URL with http or https and a host, as in https://example.com/events"
    if "@" in parts.netloc:
        return "give it without user and password; what is secret belongs into authorization_file"
    if not (url.isascii() and url.isprintable()) or " " in url or parts.fragment:
        return "give printable ASCII without spaces and fragment; percent-encode the rest"
    return ""
