"""Where the secret comes from that session tokens are signed with.

A token holds on another proxy if that one has the same secret. So what the proxies of a cluster share decides, the
first of these that is there:

    the setting            the operator gave all of them the same
    the cluster's password they all log in with it: nothing to set up. Who changes it ends the tokens that are out
    the topology store     those that share it agree: whoever comes first makes a random secret, and the others take it
    nothing                the store cannot be used: tokens hold on this proxy alone, and until it ends

A token can be taken away and its secret guessed at leisure, and it goes to clients, which must not learn the cluster's
password. So what is derived from the password is made slow to guess.
"""

from __future__ import annotations

import secrets
from hashlib import scrypt
from typing import Final

import trio

from proxy.log import get_logger
from proxy.store.interface import (
    ABSENT,
    ConflictError,
    Expect,
    Put,
    StoreRefusedError,
    StoreUnavailableError,
    TopologyStore,
)
from proxy.store.records import TOKEN_SECRET, TOKEN_SECRET_BYTES, pack_token_secret, unpack_token_secret

PURPOSE: Final = b"steadyread session token secret 1"  # the salt: all proxies must derive the same
# RFC 7914. Each guess costs 16 MiB and, measured, 40 to 60 ms; so does each start of a proxy.
SCRYPT_ROUNDS: Final = 2**14
SCRYPT_BLOCK: Final = 8

log = get_logger(__name__)


async def token_secret(store: TopologyStore, configured: str, cluster_password: str) -> bytes:
    """What this proxy signs session tokens with. "" as ``configured`` or ``cluster_password``: there is none.

    Raises nothing of the store's: a store that cannot be used is logged, and gives a secret of this proxy's own.
    If cancelled, the store may have got a secret, which the next to ask then finds.
    """
    if configured:
        return configured.encode()
    if cluster_password:
        return await trio.to_thread.run_sync(_derived, cluster_password, abandon_on_cancel=True)
    try:
        return await _shared(store)
    except (StoreUnavailableError, StoreRefusedError) as error:
        log.warning(
            "session_tokens_hold_here_only",
            reason=error,
            effect="other proxies, and this one after its next start, refuse them",
            remedy="mend the store and start again, or give all proxies of the cluster the same token secret",
        )
        return _random()


def _derived(password: str) -> bytes:
    return scrypt(
        password.encode(), salt=PURPOSE, n=SCRYPT_ROUNDS, r=SCRYPT_BLOCK, p=1, dklen=TOKEN_SECRET_BYTES
    )


async def _shared(store: TopologyStore) -> bytes:
    """The store's secret, made here if it has none."""
    while True:
        entry = await store.get(TOKEN_SECRET)
        if entry is not None:
            return unpack_token_secret(entry.value)
        secret = _random()
        try:
            await store.commit(
                [Put(TOKEN_SECRET, pack_token_secret(secret))], [Expect(TOKEN_SECRET, ABSENT)], durable=True
            )
        except ConflictError:
            continue  # another proxy made one meanwhile, and all take that
        return secret


def _random() -> bytes:
    return secrets.token_bytes(TOKEN_SECRET_BYTES)
