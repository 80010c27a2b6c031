"""What all endpoints need with which operators act: who it is, what they sent, and a store that does not answer.

An act wants ``Content-Type: application/json``. A page in a browser cannot send that to another site without asking
first, and this port never says yes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from proxy.admin.http import JSON_TYPE, ProblemError, Request
from proxy.store.interface import StoreRefusedError, StoreUnavailableError
from proxy.topology.audit import Operator

OPERATOR_HEADER = "x-steadyread-operator"
OPERATOR_CHARACTERS_MAX = 128  # of a name, which is kept for ever
DEFAULT_OPERATOR = "admin"


def operator_of(request: Request) -> Operator:
    """Who acts: the name that X-Steadyread-Operator claims, and where from. Raises ProblemError 400."""
    who = request.headers.get(OPERATOR_HEADER, DEFAULT_OPERATOR).strip()
    if not who or len(who) > OPERATOR_CHARACTERS_MAX or not (who.isascii() and who.isprintable()):
        raise ProblemError(
            HTTPStatus.BAD_REQUEST,
            f"X-Steadyread-Operator takes a name of 1 to {OPERATOR_CHARACTERS_MAX} printable ASCII characters",
        )
    return Operator(who, request.peer)


def content_of(request: Request, members: Collection[str], optional: Collection[str] = ()) -> dict[str, Any]:
    """The JSON object that was sent, which has exactly these members; an ``optional`` one not sent is None.

    Raises ProblemError 415 or 400.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != JSON_TYPE:
        raise ProblemError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"{request.path} takes Content-Type: {JSON_TYPE}"
        )
    try:
        content = json.loads(request.body)
    except (ValueError, RecursionError):
        raise ProblemError(HTTPStatus.BAD_REQUEST, "the body is not JSON") from None
    wanted = " and ".join(f'"{name}"' for name in members)
    may_have = " and ".join(f'"{name}"' for name in optional)
    if may_have:
        wanted = f"{wanted}, and perhaps {may_have}" if wanted else f"{may_have}, or without"
    if (
        not isinstance(content, dict)
        or not set(members) <= content.keys()
        or not content.keys() <= {*members, *optional}
    ):
        raise ProblemError(
            HTTPStatus.BAD_REQUEST, f"the body is to be a JSON object with {wanted or 'no members'}"
        )
    return {**dict.fromkeys(optional), **content}


@contextmanager
def store_problems() -> Iterator[None]:
    """What the store cannot do becomes a problem: 503 when a later attempt may work, else 500."""
    try:
        yield
    except StoreUnavailableError as error:
        raise ProblemError(
            HTTPStatus.SERVICE_UNAVAILABLE,
            f"the topology store is out of reach: {error}",
            headers=[("Retry-After", "1")],
        ) from error
    except StoreRefusedError as error:
        raise ProblemError(HTTPStatus.INTERNAL_SERVER_ERROR, str(error)) from error
