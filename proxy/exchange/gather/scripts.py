"""SCRIPT and FUNCTION: the same scripts and libraries on all primaries, shown as one server's."""

from __future__ import annotations

from proxy.exchange.gather.fanout import Answer, all_done, ask_primaries, first_error
from proxy.exchange.gather.nodes import ask_any_node
from proxy.exchange.open_requests import OpenRequests
from proxy.protocol.encode import OK, array, integer
from proxy.protocol.replies import decode, elements

NOT_BUSY = b"-NOTBUSY"
UNKILLABLE = b"-UNKILLABLE"


async def script_load(requests: OpenRequests, arguments: list[bytes]) -> bytes:
    """SCRIPT LOAD: done once one primary has compiled it.

    A node that could not be reached, or is added later, is healed from the proxy's copy when it says
    NOSCRIPT.
    """
    answers = await ask_primaries(requests, arguments, repeatable=True)
    loaded = [answer for answer in answers if not answer.is_error]
    if not loaded:
        return all_done("SCRIPT LOAD", answers)
    requests.exchange.scripts.remember(arguments[2])
    return loaded[0].reply


async def script_exists(requests: OpenRequests, arguments: list[bytes]) -> bytes:
    """SCRIPT EXISTS: 1 where EVALSHA would run everywhere, by the proxy's copy or every primary's own."""
    answers = await ask_primaries(requests, arguments, repeatable=True)
    scripts = requests.exchange.scripts
    known = [scripts.knows(digest) for digest in arguments[2:]]
    if (failure := first_error(answers)) is not None:
        return array([integer(1)] * len(known)) if all(known) else failure
    everywhere = [all(column) for column in zip(*(decode(answer.reply) for answer in answers), strict=True)]
    return array([integer(here or there) for here, there in zip(known, everywhere, strict=True)])


async def script_flush(requests: OpenRequests, arguments: list[bytes]) -> bytes:
    """SCRIPT FLUSH [ASYNC | SYNC]: the proxy's copies too, unless no primary took it."""
    answers = await ask_primaries(requests, arguments, repeatable=True)
    if not all(answer.is_error for answer in answers):
        requests.exchange.scripts.clear()
    return all_done("SCRIPT FLUSH", answers)


async def kill(requests: OpenRequests, arguments: list[bytes]) -> bytes:
    """SCRIPT KILL and FUNCTION KILL: OK if one was killed; a refusal to kill says more than NOTBUSY."""
    answers = await ask_primaries(requests, arguments, repeatable=False)
    replies = [answer.reply for answer in answers]
    if OK in replies:
        return OK
    for reply in replies:
        if reply.startswith(UNKILLABLE):
            return reply
    busy = [answer for answer in answers if not answer.reply.startswith(NOT_BUSY)]
    return first_error(busy) or replies[0]


async def function_change(requests: OpenRequests, arguments: list[bytes]) -> bytes:
    """FUNCTION LOAD, DELETE, FLUSH, RESTORE: at all primaries."""
    answers = await ask_primaries(requests, arguments, repeatable=False)
    return all_done(f"FUNCTION {arguments[1].decode().upper()}", answers)


async def function_list(requests: OpenRequests, arguments: list[bytes]) -> bytes:
    """FUNCTION LIST: every library that a primary has, each once."""
    answers = await ask_primaries(requests, arguments, repeatable=True)
    if (failure := first_error(answers)) is not None:
        return failure
    libraries: dict[bytes, bytes] = {}
    for answer in answers:
        for library in elements(answer.reply):
            libraries.setdefault(_library_name(library), library)
    return array(list(libraries.values()))


def _library_name(library: bytes) -> bytes:
    fields = decode(library)
    pairs = fields if isinstance(fields, dict) else dict(zip(fields[::2], fields[1::2], strict=True))
    name = pairs[b"library_name"]
    assert isinstance(name, bytes)
    return name


async def function_stats(requests: OpenRequests, arguments: list[bytes]) -> bytes:
    """FUNCTION STATS: of the primary that runs a function or script now, if one does."""
    answers = await ask_primaries(requests, arguments, repeatable=True)
    for answer in answers:
        if not answer.is_error and _is_running(answer):
            return answer.reply
    return first_error(answers) or answers[0].reply


def _is_running(answer: Answer) -> bool:
    fields = decode(answer.reply)
    running = fields[b"running_script"] if isinstance(fields, dict) else fields[1]
    return running is not None


COMMANDS = {
    "SCRIPT|LOAD": script_load,
    "SCRIPT|EXISTS": script_exists,
    "SCRIPT|FLUSH": script_flush,
    "SCRIPT|KILL": kill,
    "FUNCTION|LOAD": function_change,
    "FUNCTION|DELETE": function_change,
    "FUNCTION|FLUSH": function_change,
    "FUNCTION|RESTORE": function_change,
    "FUNCTION|LIST": function_list,
    "FUNCTION|STATS": function_stats,
    "FUNCTION|KILL": kill,
    "FUNCTION|DUMP": ask_any_node,
    "FUNCTION|HELP": ask_any_node,
    "SCRIPT|HELP": ask_any_node,
}
