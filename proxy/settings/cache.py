"""What must hold of the cache's settings beyond the limits of single options. Pure: it looks at values."""

from __future__ import annotations

from collections.abc import Iterator

from proxy.settings.fault import Fault
from proxy.settings.schema import parse_address
from proxy.settings.values import CacheSettings
from routing.topology import Address


def memcached_address(cache: CacheSettings) -> Address | None:
    """None: there is none. Raises ValueError that says what would be right."""
    return parse_address(cache.memcached, is_dialled=True) if cache.memcached else None


def cache_faults(cache: CacheSettings) -> Iterator[Fault]:
    """All that is wrong with them."""
    try:
        memcached_address(cache)
    except ValueError as error:
        yield Fault(("cache", "memcached"), cache.memcached, str(error))
