"""The proxy's own copies of Lua scripts, which heal NOSCRIPT: a node that was added or promoted knows none."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import sha1

from proxy.protocol.encode import frame
from proxy.protocol.replies import decode

_EVAL_OF = {b"EVALSHA": b"EVAL", b"EVALSHA_RO": b"EVAL_RO"}


class ScriptCache:
    """Script bodies by SHA1, the least recently used dropped past ``bytes_max``.

    A script that was dropped is simply not healed: the client sees NOSCRIPT and loads it, as with any server.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._bodies: OrderedDict[bytes, bytes] = OrderedDict()  # lower-case hex digest -> body
        self._digests: dict[bytes, bytes] = {}  # body -> digest, so that a repeated EVAL is not hashed again
        self.healed_total = 0

    def remember(self, body: bytes) -> bytes:
        """Keep ``body``; its digest in lower-case hexadecimal."""
        digest = self._digests.get(body)
        if digest is not None:
            self._bodies.move_to_end(digest)
            return digest
        digest = sha1(body, usedforsecurity=False).hexdigest().encode()
        if len(body) <= self._bytes_max:
            self._bodies[digest] = body
            self._digests[body] = digest
            self._bytes += len(body)
            while self._bytes > self._bytes_max:
                _, dropped = self._bodies.popitem(last=False)
                del self._digests[dropped]
                self._bytes -= len(dropped)
        return digest

    def knows(self, digest: bytes) -> bool:
        return digest.lower() in self._bodies

    def clear(self) -> None:
        self._bodies.clear()
        self._digests.clear()
        self._bytes = 0

    def heal(self, raw: bytes) -> bytes | None:
        """The EVAL that does what the EVALSHA frame ``raw`` meant; None when it is none or unknown here."""
        arguments: list[bytes] = decode(raw)
        eval_name = _EVAL_OF.get(arguments[0].upper())
        if eval_name is None or len(arguments) < 2:
            return None
        body = self._bodies.get(arguments[1].lower())
        if body is None:
            return None
        self.healed_total += 1
        return frame([eval_name, body, *arguments[2:]])
