"""The entries of a log that a store keeps: the newest, within bounds of number and bytes."""

from __future__ import annotations

from collections import deque

from runtime_adapter.control.store.messages import MIB

#: Entries, and bytes of their texts, that are kept for readers who have not read them yet.
MAX_ENTRIES = 4_000
MAX_ENTRY_BYTES = 64 * MIB
#: Bytes of an entry; entries and bytes of one answer, whose reader asks again for the rest.
MAX_TEXT_BYTES = 3 * MIB
MAX_READ_ENTRIES = 2_000
MAX_READ_BYTES = MIB // 2


class EntryLog:
    """Texts of entries, numbered from 0; the oldest are dropped where they are too many."""

    def __init__(self, max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_ENTRY_BYTES) -> None:
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._entries: deque[str] = deque()
        self._bytes = 0
        self._first = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def last(self) -> int:
        """The number of the last entry, -1 if there is none."""
        return self._first + len(self._entries) - 1

    def append(self, text: str) -> int:
        """Append an entry; returns its number."""
        self._entries.append(text)
        self._bytes += len(text)
        while len(self._entries) > self._max_entries or (
            self._bytes > self._max_bytes and len(self._entries) > 1
        ):
            self._bytes -= len(self._entries.popleft())
            self._first += 1
        return self.last

    def can_continue(self, after: int) -> bool:
        """Whether every entry after a number is kept, and that number was reached."""
        return self._first - 1 <= after <= self.last

    def read(self, after: int) -> list[list[int | str]]:
        """``[number, text]`` of the first entries after a number, as many as fit an answer."""
        found: list[list[int | str]] = []
        size = 0
        for number in range(after + 1, self.last + 1):
            text = self._entries[number - self._first]
            size += len(text)
            if found and (size > MAX_READ_BYTES or len(found) >= MAX_READ_ENTRIES):
                break
            found.append([number, text])
        return found
