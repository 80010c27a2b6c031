"""Hash slots: which of the 16384 slots a key belongs to.

Source: the Redis Cluster specification, "Key distribution model" and "Hash tags".
"""

from binascii import crc_hqx

SLOT_COUNT = 16384


def slot_of(key: bytes) -> int:
    """The slot of ``key``, 0..16383: CRC16 (XMODEM) of the key, or of its hash tag when it has one.

    A hash tag is what stands between the first ``{`` and the first ``}`` after it, when that is not empty.
    """
    start = key.find(b"{")
    if start >= 0:
        end = key.find(b"}", start + 1)
        if end > start + 1:
            key = key[start + 1 : end]
    return crc_hqx(key, 0) & 16383
