"""Session tokens: what a session must see, as a text that its client carries to another connection or proxy.

A token names floors, and the slot map that they were made under: the epoch, and a fingerprint of who owned which slot.
Where the map is still the same, a shard's floor is enough; where it is not, the reader decides what the floors mean.

Nothing is kept about tokens, so a token must prove by itself that it was made here: whoever could invent floors could
send all of a session's reads to the primaries, and one made for another cluster would claim things about data that it
never saw. Hence the signature, and the names of nodes: of each floor's primary, and of witnesses, so that also a token
without floors tells its cluster. What a token says can be read by who decodes it; it holds no keys and no values.

The text is base64url without padding, in the one spelling there is, so that no bit of it can change unnoticed:

    magic      2 bytes, by which every token begins with "stk"
    version    1 byte
    epoch      8 bytes, as all numbers big-endian
    map        8 bytes, see TopologyView.fingerprint
    count      2 bytes, of the floors
    floors     48 bytes each, by node id: node id, replication id, offset
    witnesses  20 bytes each, ascending: node ids
    signature  16 bytes, HMAC-SHA256 (RFC 2104) of all that is before, with a key made from the secret for this alone
"""

from __future__ import annotations

import hmac
import re
from base64 import b64decode, urlsafe_b64encode
from binascii import Error as Base64Error
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from struct import Struct

from routing.offsets import Point
from routing.topology import FINGERPRINT_BYTES

VERSION = 1
FLOORS_MAX = 4096  # more than the shards of a cluster
WITNESSES_MAX = 16
EPOCH_MAX = 2**64 - 1
OFFSET_MAX = 2**63 - 1

_MAGIC = b"\xb2\xd9"
_SIGNATURE_BYTES = 16  # half of what SHA-256 gives: RFC 2104 section 5 allows it, and clients carry it
_PURPOSE = b"steadyread session token 1"  # the key made with it signs tokens and nothing else

_HEAD = Struct(f"!2sBQ{FINGERPRINT_BYTES}sH")
_FLOOR = Struct("!20s20sQ")
_WITNESS = Struct("!20s")

_BYTES_MAX = _HEAD.size + FLOORS_MAX * _FLOOR.size + WITNESSES_MAX * _WITNESS.size + _SIGNATURE_BYTES
TEXT_BYTES_MAX = -(-_BYTES_MAX * 4 // 3)  # of a token's text

_TEXT = re.compile(rb"[A-Za-z0-9_-]+")
_ID = re.compile(r"[0-9a-f]{40}")
_REPLID = re.compile(rb"[0-9a-f]{40}")

_NO_TOKEN = "this is no session token: give one as STEADY.TOKEN answered it, unchanged"


@dataclass(frozen=True, slots=True)
class Token:
    """What a session has seen and written, under which map. Names at least one node, as a floor's primary or a witness.

    Equal ones have equal texts.
    """

    epoch: int  # the cluster's, 0 to EPOCH_MAX
    fingerprint: bytes  # TopologyView.fingerprint of the map
    floors: Mapping[str, Point]  # node id of the primary that said it -> what a reader of its shard must have
    witnesses: frozenset[str] = frozenset()  # node ids of the cluster


class TokenError(ValueError):
    """The text is no token that holds here. Says why and what to do, and nothing of what the token holds."""


def pack_token(token: Token, secret: bytes) -> bytes:
    """The token as text: ASCII letters, digits, ``-`` and ``_``. Equal for equal tokens and secrets.

    Raises ValueError if the token names no node, holds what is none of the cluster's words (a node id or replication id
    is 40 hex digits in lower case), or is too large; or if the secret is empty.
    """
    _refuse_unfit(token)
    floors = [
        _FLOOR.pack(bytes.fromhex(node_id), bytes.fromhex(point.replid.decode("ascii")), point.offset)
        for node_id, point in sorted(token.floors.items())
    ]
    head = _HEAD.pack(_MAGIC, VERSION, token.epoch, token.fingerprint, len(floors))
    content = b"".join([head, *floors, *map(bytes.fromhex, sorted(token.witnesses))])
    return _text_of(content + _signature(content, secret))


def unpack_token(text: bytes, secret: bytes) -> Token:
    """The token that ``pack_token`` made with the same secret. Raises TokenError; ValueError if the secret is empty.

    Costs little for what is no token, however long it is: nothing is decoded past TEXT_BYTES_MAX, and nothing of the
    content is looked at before the signature fits.
    """
    packed = _packed_of(text)
    content, signature = packed[:-_SIGNATURE_BYTES], packed[-_SIGNATURE_BYTES:]
    if not hmac.compare_digest(signature, _signature(content, secret)):
        raise TokenError(
            "the token's signature does not fit: it was changed or forged, or made by a proxy with another secret"
        )
    return _token_of(content)


def is_of(token: Token, known_node_ids: Collection[str]) -> bool:
    """Whether the token is of the cluster that has these nodes: it names at least one of them.

    One is enough, because nodes come and go, and a failed primary stays a node of its cluster.
    """
    return any(node_id in known_node_ids for named in (token.floors, token.witnesses) for node_id in named)


def _refuse_unfit(token: Token) -> None:
    if not token.floors and not token.witnesses:
        raise ValueError("a token must name at least one node of its cluster")
    if len(token.floors) > FLOORS_MAX or len(token.witnesses) > WITNESSES_MAX:
        raise ValueError(f"a token has at most {FLOORS_MAX} floors and {WITNESSES_MAX} witnesses")
    if not 0 <= token.epoch <= EPOCH_MAX or len(token.fingerprint) != FINGERPRINT_BYTES:
        raise ValueError(f"no map has epoch {token.epoch} and fingerprint {token.fingerprint!r:.50}")
    for node_id in (*token.floors, *token.witnesses):
        if not _ID.fullmatch(node_id):
            raise ValueError(f"{node_id!r:.50} is no node id")
    for point in token.floors.values():
        if not _REPLID.fullmatch(point.replid) or not 0 <= point.offset <= OFFSET_MAX:
            raise ValueError(f"{point!r:.100} is no place in a replication history")


def _signature(content: bytes, secret: bytes) -> bytes:
    if not secret:
        raise ValueError("an empty secret signs nothing")
    key = hmac.digest(secret, _PURPOSE, "sha256")
    return hmac.digest(key, content, "sha256")[:_SIGNATURE_BYTES]


def _text_of(packed: bytes) -> bytes:
    return urlsafe_b64encode(packed).rstrip(b"=")


def _packed_of(text: bytes) -> bytes:
    """Content and signature of a text of this version; neither was looked at."""
    if len(text) > TEXT_BYTES_MAX or not _TEXT.fullmatch(text):
        raise TokenError(_NO_TOKEN)
    try:
        packed = b64decode(text + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except Base64Error:
        raise TokenError(_NO_TOKEN) from None
    if _text_of(packed) != text:  # its last character has bits that stand for nothing, and they are set
        raise TokenError(_NO_TOKEN)
    version = packed[len(_MAGIC) :][:1]
    if not packed.startswith(_MAGIC) or version in (b"", b"\0"):
        raise TokenError(_NO_TOKEN)
    if version[0] > VERSION:
        raise TokenError(
            f"the token has version {version[0]}, and this proxy knows versions up to {VERSION}: "
            "a newer proxy made it; ask this one for a token"
        )
    if len(packed) < _HEAD.size + _SIGNATURE_BYTES:
        raise TokenError(_NO_TOKEN)
    return packed


def _token_of(content: bytes) -> Token:
    """What a signed content says. It fits together unless a faulty proxy has signed it."""
    _, _, epoch, fingerprint, count = _HEAD.unpack_from(content)
    end = _HEAD.size + count * _FLOOR.size
    if end > len(content) or (len(content) - end) % _WITNESS.size:
        raise TokenError(_NO_TOKEN)
    floors = list(_FLOOR.iter_unpack(content[_HEAD.size : end]))
    witnesses = [witness for (witness,) in _WITNESS.iter_unpack(content[end:])]
    if (
        not (floors or witnesses)
        or any(one[0] >= other[0] for one, other in pairwise(floors))
        or any(one >= other for one, other in pairwise(witnesses))
        or any(offset > OFFSET_MAX for _, _, offset in floors)
    ):
        raise TokenError(_NO_TOKEN)
    return Token(
        epoch,
        fingerprint,
        {node_id.hex(): Point(replid.hex().encode(), offset) for node_id, replid, offset in floors},
        frozenset(witness.hex() for witness in witnesses),
    )
