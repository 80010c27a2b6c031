"""Proxies that share a setting, a password or a store sign session tokens alike; the others say that they do not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio

from proxy.store.interface import Put, StoreError, StoreRefusedError, StoreUnavailableError
from proxy.store.memory import MemoryStore
from proxy.store.records import TOKEN_SECRET, pack, unpack_token_secret
from proxy.store.sqlite import open_store
from proxy.topology.secret import token_secret
from tests.proxy.failing_store import FailingStore

WARNING = "session_tokens_hold_here_only"


class BrokenStore(MemoryStore):
    """Everything raises the given error."""

    def __init__(self, error: StoreError) -> None:
        super().__init__()
        self.error = error

    async def _enter(self) -> None:
        await super()._enter()
        raise self.error


async def test_the_setting_comes_first_and_touches_no_store() -> None:
    store = BrokenStore(StoreUnavailableError("never asked"))
    assert await token_secret(store, "schlüssel", "password") == "schlüssel".encode()


async def test_proxies_with_the_clusters_password_agree_without_a_store() -> None:
    """Also proxies of two releases: what is derived stays the same."""
    secret = await token_secret(BrokenStore(StoreUnavailableError("never asked")), "", "password")
    assert secret.hex() == "1684b6c981b13988ce43f9db883efdcdf582d9d26602f87845387590acf96e99"
    assert await token_secret(MemoryStore(), "", "passwore") != secret


async def test_a_password_is_slow_to_guess_and_keeps_nobody_waiting() -> None:
    """Clients get tokens, and must not find out the cluster's password from them."""
    begun, turns = time.perf_counter(), 0
    async with trio.open_nursery() as nursery:

        async def count_turns() -> None:
            nonlocal turns
            while True:
                await trio.sleep(0.001)
                turns += 1

        nursery.start_soon(count_turns)
        await token_secret(MemoryStore(), "", "password")
        nursery.cancel_scope.cancel()
    assert time.perf_counter() - begun > 0.005
    assert turns > 0


async def test_proxies_that_begin_at_once_on_one_store_agree() -> None:
    store, found = MemoryStore(), list[bytes]()

    async def begin() -> None:
        found.append(await token_secret(store, "", ""))

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(begin)
    assert len(found) == 8
    assert len(set(found)) == 1
    assert len(found[0]) == 32
    assert await token_secret(MemoryStore(), "", "") != found[0]


async def test_a_proxy_that_starts_again_has_the_same_secret(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        store = await open_store(tmp_path / "store.db")
        found.append(await token_secret(store, "", ""))
        await store.aclose()
    assert found[0] == found[1]


async def test_one_secret_is_kept_and_it_is_the_one_that_is_used(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    secret = await token_secret(store, "", "")
    entry = await store.get(TOKEN_SECRET)
    assert entry is not None
    assert unpack_token_secret(entry.value) == secret
    assert await store.revision() == 1
    assert not caplog.records


@pytest.mark.parametrize("error", [StoreUnavailableError("the disk is full"), StoreRefusedError("no store")])
async def test_without_a_store_each_proxy_has_its_own_and_says_so(
    error: StoreError, caplog: pytest.LogCaptureFixture
) -> None:
    """Promise 8: it starts, and promise 9: not silently with less than was asked for."""
    store = BrokenStore(error)
    secrets = {await token_secret(store, "", "") for _ in range(3)}
    assert {len(secret) for secret in secrets} == {32}
    assert len(secrets) == 3
    assert [record.getMessage() for record in caplog.records] == [WARNING] * 3
    assert caplog.records[0].levelname == "WARNING"
    assert caplog.records[0].steadyread_fields["reason"] is error  # type: ignore[attr-defined]


async def test_a_store_that_fails_between_the_look_and_the_commit_gives_a_secret_of_its_own(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = FailingStore()
    get = store.get

    async def get_and_go_down(key: str) -> object:
        found = await get(key)
        store.go_down()
        return found

    store.get = get_and_go_down  # type: ignore[method-assign, assignment]
    assert len(await token_secret(store, "", "")) == 32
    assert [record.getMessage() for record in caplog.records] == [WARNING]


async def test_a_damaged_secret_is_left_as_it_is_and_not_used(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever mends the store may have use of what is there; and the log does not tell it."""
    for value in (b"\xc1", pack(b"topsecret"), pack("topsecret"), pack(None), pack(b"")):
        caplog.clear()
        store = MemoryStore()
        await store.commit([Put(TOKEN_SECRET, value)])
        assert len(await token_secret(store, "", "")) == 32
        assert [record.getMessage() for record in caplog.records] == [WARNING]
        fields = caplog.records[0].steadyread_fields  # type: ignore[attr-defined]
        assert "the store's secret of session tokens is damaged" in str(fields["reason"])
        assert "topsecret" not in str(fields)
        entry = await store.get(TOKEN_SECRET)
        assert entry is not None
        assert entry.value == value
