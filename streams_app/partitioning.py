"""The partition of a key, as Kafka's Java clients choose it (murmur2)."""

from __future__ import annotations

from functools import lru_cache

from aiokafka.partitioner import murmur2


@lru_cache(maxsize=65_536)
def partition_of(key: bytes, partitions: int) -> int:
    """The partition of ``key`` in a topic of ``partitions`` partitions."""
    return int((murmur2(key) & 0x7FFFFFFF) % partitions)
