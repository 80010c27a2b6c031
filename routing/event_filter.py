from dataclasses import dataclass
from fnmatch import fnmatchcase

from routing.timeline import Event


@dataclass(frozen=True, slots=True)
class EventFilter:
    kinds: tuple[str, ...] = ()
    shard: str = ""
    slot: int | None = None

    def matches(self, event: Event) -> bool:
        return (
            (not self.kinds or any(fnmatchcase(event.kind.value, kind) for kind in self.kinds))
            and (not self.shard or any(s.startswith(self.shard) for s in event.shards))
            and (self.slot is None or any(low <= self.slot <= high for low, high in event.slot_ranges))
        )
