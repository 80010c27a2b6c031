"""What one node says of the whole cluster: the lines of CLUSTER NODES. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from routing.topology import Address


@dataclass(frozen=True, slots=True)
class NodeLine:
    """One line of CLUSTER NODES."""

    id: str
    address: Address
    flags: frozenset[str]
    primary_id: str  # "" for a primary
    is_linked: bool
    slots: frozenset[int]
    moving: tuple[str, ...]  # "[12->-id]" and "[12-<-id]": only in the teller's own line


@dataclass(frozen=True, slots=True)
class NodeMap:
    """One node's answer to CLUSTER NODES."""

    lines: tuple[NodeLine, ...]

    @property
    def agreement(self) -> frozenset[tuple[str, str, frozenset[int]]]:
        """What all nodes must show alike once a change has settled: id, primary, slots of every node."""
        return frozenset((line.id, line.primary_id, line.slots) for line in self.lines)

    @property
    def is_settled(self) -> bool:
        """No handshake is under way and the teller's own slots are not on the move.

        A Valkey replica repeats its primary's open slots, and keeps them if its link was down when they were closed.
        """
        return not any(
            (line.moving and not line.primary_id) or "handshake" in line.flags for line in self.lines
        )

    @property
    def primaries(self) -> tuple[NodeLine, ...]:
        """The primaries that work, as far as the teller knows, with or without slots."""
        return tuple(
            line
            for line in self.lines
            if not line.primary_id and not line.flags & {"fail", "handshake", "noaddr"}
        )

    def owned_by(self, node_id: str) -> frozenset[int]:
        """The node's slots; none when the teller does not know it."""
        return next((line.slots for line in self.lines if line.id == node_id), frozenset())

    @property
    def owned_by_teller(self) -> frozenset[int]:
        """The slots of the node that told."""
        return next((line.slots for line in self.lines if "myself" in line.flags), frozenset())

    def owner_of(self, slot: int) -> NodeLine:
        """The primary that owns the slot. Raises LookupError when none does."""
        for line in self.lines:
            if slot in line.slots:
                return line
        raise LookupError(f"no node owns slot {slot}")


def parse_nodes(text: bytes) -> NodeMap:
    """The answer to CLUSTER NODES, from Redis 6.2 to Valkey 9.1."""
    return NodeMap(tuple(_parse_line(line) for line in text.decode().splitlines() if line.strip()))


def _parse_line(line: str) -> NodeLine:
    # id ip:port@busport[,hostname[,aux=value]...] flags primary ping-sent pong-received epoch link [slots...]
    node_id, where, flags, primary_id, _, _, _, link, *fields = line.split(" ")
    slots: set[int] = set()
    for field in fields:
        if not field.startswith("["):
            first, _, last = field.partition("-")
            slots.update(range(int(first), int(last or first) + 1))
    return NodeLine(
        id=node_id,
        address=Address.parse(where.partition("@")[0]),
        flags=frozenset(flags.split(",")),
        primary_id="" if primary_id == "-" else primary_id,
        is_linked=link == "connected",
        slots=frozenset(slots),
        moving=tuple(field for field in fields if field.startswith("[")),
    )
