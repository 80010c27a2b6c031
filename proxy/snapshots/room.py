"""Whether the servers have room for a snapshot: it opens only where nothing is evicted, and some memory is left.

A pre-image that a server evicts is a wrong answer later, so a policy that takes any key is refused. The volatile
policies never take a marker, and of pre-images only those of keys that have a TTL, and may be evicted themselves.
"""

from __future__ import annotations

from collections.abc import Mapping

from proxy.protocol.encode import command
from proxy.protocol.replies import ReplyError, ServerError, decode
from routing.topology import Address

INFO_MEMORY = command("INFO", "memory")
_SAFE_POLICIES = ("noeviction", "volatile-")  # a name, or how names begin


def refusals(replies: Mapping[Address, bytes], memory_percent_max: int) -> list[str]:
    """Why no snapshot may be opened, one sentence for each node; [] when one may.

    ``replies``: of each primary, its raw reply to INFO_MEMORY. What cannot be read is a refusal.
    """
    found = []
    for address, reply in sorted(replies.items()):
        refusal = _refusal(reply, memory_percent_max)
        if refusal:
            found.append(f"{address} {refusal}")
    return found


def _refusal(reply: bytes, memory_percent_max: int) -> str:
    try:
        text = decode(reply)
    except (ReplyError, ValueError) as error:
        return f"answered INFO memory with what cannot be read: {error}"
    if isinstance(text, ServerError):
        return f"does not tell its memory: {text}; let this proxy's user run INFO"
    fields: dict[bytes, bytes] = {}
    if isinstance(text, bytes):
        fields = dict(line.split(b":", 1) for line in text.splitlines() if b":" in line)
    policy = fields.get(b"maxmemory_policy", b"").decode(errors="replace")
    if (
        not policy
        or not fields.get(b"maxmemory", b"").isdigit()
        or not fields.get(b"used_memory", b"").isdigit()
    ):
        return "does not tell maxmemory, maxmemory_policy and used_memory in INFO memory"
    if not policy.startswith(_SAFE_POLICIES):
        return (
            f"evicts keys (maxmemory-policy {policy}), which could take a snapshot's data: "
            "set maxmemory-policy to noeviction"
        )
    maxmemory, used = int(fields[b"maxmemory"]), int(fields[b"used_memory"])
    if maxmemory and used * 100 > maxmemory * memory_percent_max:
        return (
            f"uses {-(-used * 100 // maxmemory)} % of its maxmemory, more than {memory_percent_max} %: free memory, "
            "raise maxmemory, or raise snapshots.memory_percent_max"
        )
    return ""
