"""What the admin port answers about hooks: how far each has come, its dead letters, and asking for another attempt.

It reads the store, so any proxy answers the same, whichever runs the hooks.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus

from proxy.admin.acts import content_of, operator_of, store_problems
from proxy.admin.http import ProblemError, Request, Response, Route
from proxy.hooks.records import DeadLetter, ask_for_retry, read_letters, read_position, remove_letter
from proxy.settings import HookSettings
from proxy.store.interface import ConflictError, TopologyStore
from proxy.topology.event_facts import rfc3339
from routing.hook_delivery import HookPosition

_NUMBER_DIGITS_MAX = 16  # of an event, as in the store's keys


def routes(store: TopologyStore, hooks: Iterable[HookSettings]) -> list[Route]:
    """The hooks' part of the table that AdminServer takes."""
    hook_of_name = {hook.name: hook for hook in hooks}

    async def list_hooks(request: Request) -> Response:
        request.refuse_query()
        facts = []
        for hook in hook_of_name.values():
            position = await read_position(store, hook.name)
            letters = await read_letters(store, hook.name)
            facts.append(_facts_of_hook(hook, position, len(letters)))
        return Response.of_json({"hooks": facts})

    async def list_dead_letters(request: Request) -> Response:
        request.refuse_query()
        hook = _hook_of(request)
        letters = await read_letters(store, hook.name)
        return Response.of_json({"dead_letters": [_facts_of_letter(letter) for letter in letters]})

    async def retry(request: Request) -> Response:
        request.refuse_query()
        operator = operator_of(request)
        content_of(request, ())
        hook, number = _hook_of(request), _number_of(request)
        if not await ask_for_retry(store, hook.name, number, time.time(), operator):
            raise _no_letter(hook, number)
        return Response.of_json({"hook": hook.name, "event_number": number}, HTTPStatus.ACCEPTED)

    async def remove(request: Request) -> Response:
        request.refuse_query()
        hook, number = _hook_of(request), _number_of(request)
        if not await remove_letter(store, hook.name, number, time.time(), operator_of(request)):
            raise _no_letter(hook, number)
        return Response.of_json({"hook": hook.name, "event_number": number})

    def _hook_of(request: Request) -> HookSettings:
        name = request.parameters["name"]
        if name not in hook_of_name:
            names = ", ".join(hook_of_name) or "none"
            raise ProblemError(HTTPStatus.NOT_FOUND, f"there is no hook {name!r:.100}; there are: {names}")
        return hook_of_name[name]

    letters = "/v1/hooks/{name}/dead-letters"
    return [
        Route("/v1/hooks", {"GET": _guarded(list_hooks)}),
        Route(letters, {"GET": _guarded(list_dead_letters)}),
        Route(letters + "/{number}", {"DELETE": _guarded(remove)}),
        Route(letters + "/{number}/retry", {"POST": _guarded(retry)}),
    ]


def _guarded(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """The store's errors as answers that their caller can act on."""

    async def guarded(request: Request) -> Response:
        try:
            with store_problems():
                return await handler(request)
        except ConflictError:
            raise ProblemError(
                HTTPStatus.CONFLICT, "the dead letter changed just now: look at it again"
            ) from None

    return guarded


def _number_of(request: Request) -> int:
    text = request.parameters["number"]
    if not (text.isascii() and text.isdigit() and len(text) <= _NUMBER_DIGITS_MAX):
        raise ProblemError(HTTPStatus.BAD_REQUEST, f"{text!r:.100} is no number of an event")
    return int(text)


def _no_letter(hook: HookSettings, number: int) -> ProblemError:
    return ProblemError(HTTPStatus.NOT_FOUND, f"hook {hook.name} has no dead letter of event {number}")


def _facts_of_hook(hook: HookSettings, position: HookPosition | None, letter_count: int) -> dict[str, object]:
    """A hook for JSON. Not its command or URL, which may say too much. ``position`` is null until it first ran."""
    facts: dict[str, object] = {
        "name": hook.name,
        "kind": "command" if hook.command else "url",
        "events": list(hook.events),
        "shard": hook.shard or None,
        "slot": None if hook.slot < 0 else hook.slot,
        "position": None,
        "delivered_at": None,
        "failing_since": None,
        "failed_attempts": 0,
        "failing_event": None,
        "last_error": None,
        "dead_letter_count": letter_count,
    }
    if position is not None:
        facts |= {
            "position": position.number,
            "delivered_at": _time(position.delivered_at),
            "failing_since": _time(position.failing_since),
            "failed_attempts": position.attempts,
            "failing_event": position.attempted or None,
            "last_error": position.error or None,
        }
    return facts


def _facts_of_letter(letter: DeadLetter) -> dict[str, object]:
    return {
        "event_number": letter.number,
        "attempts": letter.attempts,
        "last_error": letter.error,
        "at": rfc3339(letter.at),
        "retry_asked_at": _time(letter.retry_asked_at),
    }


def _time(at: float | None) -> str | None:
    return None if at is None else rfc3339(at)
