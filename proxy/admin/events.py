"""The timeline for operators: pages of events, waiting for the next ones, a stream of them, and the migrations.

It owns nothing: each answer is read from the record. A caller's place in the timeline is a number that the caller
keeps, so that it can go on at another proxy of the same store, or at this one after a restart.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass, replace
from http import HTTPStatus

import trio

from proxy.admin.acts import store_problems
from proxy.admin.http import ProblemError, Request, Response, Route, StreamResponse
from proxy.admin.query import flag_of, number_of, text_of
from proxy.log import get_logger
from proxy.store.interface import StoreUnavailableError
from proxy.topology.event_facts import facts_of_event, rfc3339
from proxy.topology.history import EventPage, History
from routing.events import EventFilter, parse_filter
from routing.migrations import MigrationRecord
from routing.topology import ranges

LIMIT = 100  # events of an answer, unless the caller says otherwise
LIMIT_MAX = 200  # encoding an event takes some 15 microseconds of the event loop
WAIT_SECONDS_MAX = 60
ANSWER_SECONDS = 10.0  # for what is not waiting: finding the events, and the caller taking them
HEARTBEAT_SECONDS = 15.0  # proxies on the way close connections that are silent for longer
RETRY_SECONDS = 1.0  # before a stream looks at an unavailable store again, and a caller connects again
EVENT_STREAM_TYPE = "text/event-stream"
PARAMETERS = ("from", "limit", "kind", "shard", "slot", "wait_seconds", "stream")

log = get_logger(__name__)


def routes(history: History) -> list[Route]:
    """``/v1/events`` and ``/v1/migrations``."""

    async def events(request: Request) -> Response | StreamResponse:
        asked = _Asked.of(request)
        with store_problems():
            page = await _page(history, asked)
        if not asked.is_stream:
            return Response.of_json(facts_of_page(page))
        return StreamResponse(HTTPStatus.OK, EVENT_STREAM_TYPE, lambda: _stream(history, asked, page))

    async def migrations(request: Request) -> Response:
        request.refuse_query("limit")
        limit = number_of(request, "limit", least=1, most=LIMIT_MAX) or LIMIT
        with store_problems():
            records = await history.migrations(limit)
        return Response.of_json({"migrations": [facts_of_migration_record(record) for record in records]})

    return [
        Route("/v1/events", {"GET": events}, deadline_seconds=WAIT_SECONDS_MAX + ANSWER_SECONDS),
        Route("/v1/migrations", {"GET": migrations}),
    ]


def facts_of_page(page: EventPage) -> dict[str, object]:
    """A page for JSON. ``next`` is what to give as ``from`` to go on."""
    return {
        "events": [facts_of_event(event) for event in page.events],
        "next": page.next_after + 1,
        "at_end": page.is_at_end,
        "missing_before": page.missing_before,
        "looked_from": page.looked_from,
        "newest": page.newest,
    }


def facts_of_migration_record(record: MigrationRecord) -> dict[str, object]:
    """A migration with its stages, for JSON. Slot ranges are inclusive [first, last] pairs."""
    return {
        "id": record.id,
        "kind": record.kind.value,
        "stage": record.stage.value,
        "source_id": record.source_id,
        "target_id": record.target_id,
        "begun_at": rfc3339(record.begun_at),
        "ended_at": None if record.ended_at is None else rfc3339(record.ended_at),
        "progressed_at": rfc3339(record.progressed_at),
        "is_stuck": record.is_stuck,
        "stages": [
            {"stage": entry.stage.value, "at": rfc3339(entry.at), "evidence": dict(entry.evidence)}
            for entry in record.stages
        ],
        "open_slot_ranges": _pairs(record.open_slots),
        "moved_slot_ranges": _pairs(record.moved_slots),
        "returned_slot_ranges": _pairs(record.returned_slots),
        "stuck_slot_ranges": _pairs(record.stuck_slots),
        "keys_left": {str(slot): count for slot, count in record.keys_left.items()},
        "jobs": [asdict(job) for job in record.jobs],
    }


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a request for events asks for."""

    after: int | None  # None: the newest
    filter: EventFilter
    limit: int
    wait_seconds: int
    is_stream: bool
    is_resumed: bool  # a stream that broke, and goes on where it was

    @classmethod
    def of(cls, request: Request) -> _Asked:
        """Raises ProblemError."""
        request.refuse_query(*PARAMETERS)
        wanted = flag_of(request, "stream")
        accepted = request.headers.get("accept", "")
        is_stream = EVENT_STREAM_TYPE in accepted if wanted is None else wanted
        first = number_of(request, "from", least=1)
        last_seen = request.headers.get("last-event-id", "") if is_stream else ""
        if last_seen and not (last_seen.isascii() and last_seen.isdigit() and len(last_seen) <= 15):
            raise ProblemError(
                HTTPStatus.BAD_REQUEST, f"Last-Event-ID is an event's number, and not {last_seen!r}"
            )
        wait_seconds = number_of(request, "wait_seconds", most=WAIT_SECONDS_MAX)
        if wait_seconds is not None and is_stream:
            raise ProblemError(
                HTTPStatus.BAD_REQUEST, "a stream waits by itself: wait_seconds is for single answers"
            )
        if last_seen:  # it knows more than the address, which is the same for each connection of the stream
            after: int | None = int(last_seen)
        else:
            after = None if first is None else first - 1
        return cls(
            after=after,
            filter=_filter_of(request),
            limit=number_of(request, "limit", least=1, most=LIMIT_MAX) or LIMIT,
            wait_seconds=wait_seconds or 0,
            is_stream=is_stream,
            is_resumed=bool(last_seen),
        )


def _filter_of(request: Request) -> EventFilter:
    """Raises ProblemError: a filter that can fit nothing would wait for ever."""
    try:
        return parse_filter(
            request.query.get("kind", ()), text_of(request, "shard") or "", text_of(request, "slot") or ""
        )
    except ValueError as error:
        raise ProblemError(HTTPStatus.BAD_REQUEST, str(error)) from None


async def _page(history: History, asked: _Asked) -> EventPage:
    """The first events that were asked for, once there are any or the wait is over. Raises ProblemError, StoreError."""
    if asked.after is None:
        page = await history.newest(asked.limit, asked.filter)
    else:
        page = await history.events(asked.after, filter=asked.filter, limit=asked.limit)
        if asked.after > page.newest and not asked.is_resumed:
            raise ProblemError(
                HTTPStatus.BAD_REQUEST,
                f"the newest event is {page.newest}, so {page.newest + 1} is the last that from may ask for; "
                "was it taken from another record?",
                more={"newest": page.newest},
            )
    with trio.move_on_after(asked.wait_seconds):
        while asked.wait_seconds and not page.events:
            if page.is_at_end:
                await history.wait(page.next_after)
            more = await history.events(page.next_after, filter=asked.filter, limit=asked.limit)
            page = replace(
                more,
                looked_from=page.looked_from,
                missing_before=more.missing_before or page.missing_before,
            )
    return page


async def _stream(history: History, asked: _Asked, page: EventPage) -> AsyncGenerator[bytes, None]:
    """Server-sent events for ever, beginning with ``page``.

    Beside the kinds of events there are three of its own, without an id: ``missing`` (events that are no longer kept),
    ``record_replaced`` (the caller's number is beyond the newest, so it is from another record, and this one is told
    from its beginning), and ``store_unavailable`` (what happens meanwhile is told later).
    """
    yield f"retry: {RETRY_SECONDS * 1000:.0f}\n\n".encode()
    is_available = True
    if page.next_after > page.newest:
        yield _message("record_replaced", {"asked_after": page.next_after, "newest": page.newest})
        page = replace(page, next_after=0, is_at_end=False)
    while True:
        if page.missing_before is not None:
            yield _message("missing", {"missing_before": page.missing_before})
        if page.events:
            yield b"".join(
                _message(event.kind.value, facts_of_event(event), event.number) for event in page.events
            )
        try:
            while page.is_at_end:
                with trio.move_on_after(HEARTBEAT_SECONDS) as silence:
                    await history.wait(page.next_after)
                    break
                if silence.cancelled_caught:
                    yield _heartbeat(page.next_after)
            if not page.is_at_end and not page.events:
                yield _heartbeat(page.next_after)
            page = await history.events(page.next_after, filter=asked.filter, limit=LIMIT_MAX)
            is_available = True
        except StoreUnavailableError as error:
            if is_available:
                log.warning("event_stream_interrupted", reason=error)
                yield _message("store_unavailable", {"detail": str(error)})
            else:
                yield b": the store is unavailable\n\n"
            is_available = False
            page = replace(page, events=(), missing_before=None, is_at_end=True)
            await trio.sleep(RETRY_SECONDS)


def _message(kind: str, facts: dict[str, object], number: int | None = None) -> bytes:
    head = "" if number is None else f"id: {number}\n"
    return f"{head}event: {kind}\ndata: {json.dumps(facts, allow_nan=False)}\n\n".encode()


def _heartbeat(number: int) -> bytes:
    """Something to send, and how far the stream has come: a caller resumes there, and nothing is scanned twice."""
    return f": heartbeat\nid: {number}\n\n".encode()


def _pairs(slots: tuple[int, ...]) -> list[list[int]]:
    return [list(pair) for pair in ranges(slots)]
