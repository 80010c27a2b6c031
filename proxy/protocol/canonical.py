"""Replies to reads as of a snapshot: the same bytes from a key and from each copy of it.

``routing/snapshot_reads.py`` says which form a reply has. Here it gets it: raw RESP2 or RESP3 in, raw out, of the same
version. Only order, the names of keys, and the sign of a score of zero ever change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from proxy.protocol.encode import array, bulk
from proxy.protocol.replies import AGGREGATE, ERROR, FrameScanner, ReplyError, number_of
from routing import glob
from routing.snapshot_reads import Form, Shape

_NILS: Final = (b"$-1\r\n", b"*-1\r\n", b"_\r\n")
_MAP: Final = 37
_DOUBLE: Final = 44
_NO_NAMES: Final[Mapping[bytes, bytes]] = {}
_Pairs = list[tuple[bytes, bytes]]  # raw frames


def canonical(shape: Shape, reply: bytes, replaced: Mapping[bytes, bytes] = _NO_NAMES) -> bytes:
    """The canonical reply. ``replaced``: the client's key -> what was read in its place, as ``rewrite`` took it.

    Nil stays as it is; in an error only the names of keys are put back. Raises ReplyError when ``reply`` is not one
    that a command of this shape gives.
    """
    if reply[0] == ERROR:
        return _with_names_in_error(reply, replaced) if replaced else reply
    if shape.form is Form.AS_IS or reply in _NILS:
        return reply
    return _FORMS[shape.form](shape, reply, replaced)


def _members(shape: Shape, reply: bytes, replaced: Mapping[bytes, bytes]) -> bytes:
    header, members = _split(reply)
    members.sort(key=payload)
    return header + b"".join(members)


def _pairs(shape: Shape, reply: bytes, replaced: Mapping[bytes, bytes]) -> bytes:
    header, members = _split(reply)
    return header + b"".join([frame for pair in _by_field(members) for frame in pair])


def _fields(shape: Shape, reply: bytes, replaced: Mapping[bytes, bytes]) -> bytes:
    return array([field for field, _ in _by_field(_split(reply)[1])])


def _values(shape: Shape, reply: bytes, replaced: Mapping[bytes, bytes]) -> bytes:
    return array([value for _, value in _by_field(_split(reply)[1])])


def _scores(shape: Shape, reply: bytes, replaced: Mapping[bytes, bytes]) -> bytes:
    if b"-0\r\n" not in reply:
        return reply
    return b"".join(map(_unsigned_zero, _frames(reply)))


def _with_scores(shape: Shape, reply: bytes, replaced: Mapping[bytes, bytes]) -> bytes:
    if b"-0\r\n" not in reply:
        return reply
    header, members = _split(reply)
    if members[0][0] in AGGREGATE:  # RESP3: an array for each
        pairs = [array([member, _unsigned_zero(score)]) for member, score in _member_scores(members)]
        return header + b"".join(pairs)
    members[1::2] = map(_unsigned_zero, members[1::2])
    return header + b"".join(members)


def _texts(shape: Shape, reply: bytes, replaced: Mapping[bytes, bytes]) -> bytes:
    """What is equal up to the first NUL byte stands together; among each other, these are sorted."""
    _, members = _split(reply)
    at = 0
    while at < len(members):
        text = _text_of(members[at])
        end = at + 1
        while end < len(members) and _text_of(members[end]) == text:
            end += 1
        if end - at > 1:
            members[at:end] = sorted(members[at:end], key=payload)
        at = end
    if shape.limit is not None:
        first, count = shape.limit
        members = members[first:] if count < 0 else members[first : first + count]
    return array(members)


def _scan_members(shape: Shape, reply: bytes, replaced: Mapping[bytes, bytes]) -> bytes:
    members = sorted(_split(reply)[1], key=payload)
    return _scan_end([member for member in members if _is_wanted(shape.pattern, member)])


def _scan_pairs(shape: Shape, reply: bytes, replaced: Mapping[bytes, bytes]) -> bytes:
    pairs = [pair for pair in _by_field(_split(reply)[1]) if _is_wanted(shape.pattern, pair[0])]
    return _scan_end([frame for pair in pairs for frame in pair])


def _scan_fields(shape: Shape, reply: bytes, replaced: Mapping[bytes, bytes]) -> bytes:
    fields = [field for field, _ in _by_field(_split(reply)[1])]
    return _scan_end([field for field in fields if _is_wanted(shape.pattern, field)])


def _scan_scores(shape: Shape, reply: bytes, replaced: Mapping[bytes, bytes]) -> bytes:
    pairs = [pair for pair in _member_scores(_split(reply)[1]) if _is_wanted(shape.pattern, pair[0])]
    # Of a scan, scores are bulk strings in RESP3, too.
    return _scan_end(
        [frame for member, score in pairs for frame in (member, bulk(payload(_unsigned_zero(score))))]
    )


def _scan_ranked(shape: Shape, reply: bytes, replaced: Mapping[bytes, bytes]) -> bytes:
    members = [member for member, _ in _member_scores(_split(reply)[1])]
    return _scan_end([member for member in members if _is_wanted(shape.pattern, member)])


def _streams(shape: Shape, reply: bytes, replaced: Mapping[bytes, bytes]) -> bytes:
    if not replaced:
        return reply
    originals = _originals(replaced)
    header, members = _split(reply)
    if reply[0] == _MAP:
        members[0::2] = [originals.get(name, name) for name in members[0::2]]
        return header + b"".join(members)
    streams = [_split(member)[1] for member in members]
    return header + b"".join([array([originals.get(name, name), entries]) for name, entries in streams])


def _script(shape: Shape, reply: bytes, replaced: Mapping[bytes, bytes]) -> bytes:
    if not any(name in reply for name in replaced.values()):
        return reply
    originals = _originals(replaced)
    return b"".join([originals.get(frame, frame) for frame in _frames(reply)])


_FORMS: Final[Mapping[Form, Callable[[Shape, bytes, Mapping[bytes, bytes]], bytes]]] = {
    Form.MEMBERS: _members,
    Form.PAIRS: _pairs,
    Form.FIELDS: _fields,
    Form.VALUES: _values,
    Form.SCORES: _scores,
    Form.WITH_SCORES: _with_scores,
    Form.TEXTS: _texts,
    Form.SCAN_MEMBERS: _scan_members,
    Form.SCAN_PAIRS: _scan_pairs,
    Form.SCAN_FIELDS: _scan_fields,
    Form.SCAN_SCORES: _scan_scores,
    Form.SCAN_RANKED: _scan_ranked,
    Form.STREAMS: _streams,
    Form.SCRIPT: _script,
}


def payload(frame: bytes) -> bytes:
    """What a frame of one value holds, without length and line ends."""
    if frame[0] == 36:
        return frame[frame.index(b"\r\n") + 2 : -2]
    return frame[1:-2]


def _split(reply: bytes) -> tuple[bytes, list[bytes]]:
    """An aggregate's first line, and the raw frames of its members, of a map twice its count. Raises ReplyError."""
    line_end = reply.find(b"\r\n")
    if reply[0] not in AGGREGATE or line_end < 0:
        raise ReplyError(f"expected an aggregate, got {reply[:40]!r}")
    count = number_of(reply[1:line_end]) * (2 if reply[0] == _MAP else 1)
    at = line_end + 2
    members = []
    scanner = FrameScanner()
    for _ in range(count):
        if reply[at : at + 1] == b"$":  # nearly all are
            length_end = reply.index(b"\r\n", at)
            length = number_of(reply[at + 1 : length_end])
            end = length_end + 2 if length < 0 else length_end + length + 4
        else:
            end = scanner.end_of(reply, at)
        if end < 0 or end > len(reply):
            raise ReplyError("an aggregate ended early")
        members.append(reply[at:end])
        at = end
    return reply[: line_end + 2], members


def _frames(reply: bytes) -> Iterator[bytes]:
    """The first line of each aggregate, and each whole frame of one value, in order: joined, they are the reply."""
    at = 0
    scanner = FrameScanner()
    while at < len(reply):
        end = reply.index(b"\r\n", at) + 2 if reply[at] in AGGREGATE else scanner.end_of(reply, at)
        if end < 0:
            raise ReplyError("a reply ended early")
        yield reply[at:end]
        at = end


def _by_field(members: Sequence[bytes]) -> _Pairs:
    return sorted(zip(members[0::2], members[1::2], strict=True), key=lambda pair: payload(pair[0]))


def _member_scores(members: Sequence[bytes]) -> _Pairs:
    """Of ZRANGE WITHSCORES: flat in RESP2, an array for each in RESP3."""
    if members and members[0][0] in AGGREGATE:
        split = [_split(pair)[1] for pair in members]
        return [(member, score) for member, score in split]
    return list(zip(members[0::2], members[1::2], strict=True))


def _unsigned_zero(frame: bytes) -> bytes:
    """Of a score: a sorted set that is packed as a list keeps no sign of zero, one of the other encoding does."""
    if frame == b"$2\r\n-0\r\n":
        return b"$1\r\n0\r\n"
    return b",0\r\n" if frame == b",-0\r\n" else frame


def _text_of(frame: bytes) -> bytes:
    return payload(frame).partition(b"\0")[0]


def _is_wanted(pattern: glob.Pattern | None, frame: bytes) -> bool:
    return pattern is None or glob.matches(pattern, payload(frame))


def _scan_end(frames: Sequence[bytes]) -> bytes:
    return array([b"$1\r\n0\r\n", array(frames)])


def _originals(replaced: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """Frame of what was read -> frame of the client's key."""
    return {bulk(read): bulk(key) for key, read in replaced.items()}


_LINE_BREAKS: Final = bytes.maketrans(b"\r\n", b"  ")


def _with_names_in_error(reply: bytes, replaced: Mapping[bytes, bytes]) -> bytes:
    """Servers write a name up to its first NUL byte, and spaces for line breaks. The longest name is sought first."""
    for key, read in sorted(replaced.items(), key=lambda names: -len(names[1])):
        for shown_read, shown_key in ((read, key), (read.partition(b"\0")[0], key.partition(b"\0")[0])):
            reply = reply.replace(shown_read.translate(_LINE_BREAKS), shown_key.translate(_LINE_BREAKS))
    return reply
