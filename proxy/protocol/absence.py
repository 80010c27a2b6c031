"""Whether a reply may come from a node that does not have the key: such a reply of a replica proves nothing."""

from __future__ import annotations

import re

# Replies that a key which is not there may get: nil, zero, nothing, "none"; TTL's -1 and -2; arrays of only these.
_NOTHING = rb"\$-1|\*-1|_|:0|:-1|:-2|#f|\+none|,-?0|\$0\r\n|[*%~]0"
_ABSENCE = re.compile(rb"(?:[*%~][0-9]+\r\n)?(?:(?:" + _NOTHING + rb")\r\n)+", re.DOTALL)


def could_mean_absence(reply: bytes) -> bool:
    """Whether the reply to a command on one key may come from a node that does not have the key; errors may, too.

    A key is on a node as a whole. So a reply with anything in it that a missing key cannot give shows that the key is
    there, and what else is missing in it is missing in the key.
    """
    return reply[0] == 45 or _ABSENCE.fullmatch(reply) is not None


def lacks_a_value(reply: bytes) -> bool:
    """Whether the reply to MGET may lack a key. Errs on the side of asking: a value may hold such bytes."""
    return reply[0] == 45 or b"$-1\r\n" in reply or b"_\r\n" in reply
