"""Values that entries of a log refer to, under keys: within bounds of number and bytes."""

from __future__ import annotations

from prism_plan.errors import InputError, LimitReached
from runtime_adapter.control.store.messages import MIB

#: Keys, and bytes of all keys and values.
MAX_KEYS = 10_000
MAX_VALUE_BYTES = 512 * MIB


class KeyValues:
    """Values under keys, each with the number of further keys that hold its parts (0: none)."""

    def __init__(self, max_keys: int = MAX_KEYS, max_bytes: int = MAX_VALUE_BYTES) -> None:
        self._max_keys, self._max_bytes = max_keys, max_bytes
        self._values: dict[str, tuple[int, bytes]] = {}
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._values)

    def put(self, key: str, parts: int, data: bytes) -> None:
        """Write a value.

        Raises
        ------
        LimitReached
            There is no room for it.
        """
        old = self._values.get(key)
        grown = self.num_bytes + len(data) - (len(old[1]) if old else -len(key))
        if grown > self._max_bytes or (old is None and len(self._values) >= self._max_keys):
            raise LimitReached(
                f"the run's store is full: {len(self._values):,} values of {self.num_bytes:,} "
                f"bytes; it keeps up to {self._max_keys:,} of {self._max_bytes:,}"
            )
        self._values[key] = parts, data
        self.num_bytes = grown

    def get(self, key: str) -> tuple[int, bytes]:
        """Number of parts, and the value; raises InputError where it is not there."""
        if key not in self._values:
            raise InputError("is not there", source=f"the run's store: {key:.200}")
        return self._values[key]

    def has(self, key: str) -> bool:
        """Whether a value is there."""
        return key in self._values

    def delete(self, prefix: str) -> None:
        """Delete all values whose keys begin with ``prefix``."""
        for key in [key for key in self._values if key.startswith(prefix)]:
            self.num_bytes -= len(key) + len(self._values.pop(key)[1])
