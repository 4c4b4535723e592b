"""Which of millions of texts were there before, in little memory."""

from __future__ import annotations

from array import array
from hashlib import blake2b


class TextTable:
    """64-bit keys, each with a value of one byte: open addressing with linear probing, at most two thirds full."""

    def __init__(self) -> None:
        self._n = 0
        self._make(2**12)

    def put(self, key: int, value: int) -> int | None:
        """The value kept for `key`; None if it is new, and `value` is kept now."""
        key = key or 1  # 0 marks a free slot
        keys, at = self._keys, key & self._mask
        while (found := keys[at]) != key:
            if not found:
                break
            at = (at + 1) & self._mask
        else:
            return self._values[at]
        keys[at], self._values[at] = key, value
        self._n += 1
        if 3 * self._n > 2 * len(keys):
            self._grow()
        return None

    def _make(self, size: int) -> None:
        self._mask = size - 1
        self._keys = array("Q", bytes(8 * size))
        self._values = bytearray(size)

    def _grow(self) -> None:
        old_keys, old_values = self._keys, self._values
        self._make(2 * len(old_keys))
        keys, values, mask = self._keys, self._values, self._mask
        for key, value in zip(old_keys, old_values, strict=True):
            if key:
                at = key & mask
                while keys[at]:
                    at = (at + 1) & mask
                keys[at], values[at] = key, value


def text_hash(text: str) -> int:
    """64 bits of a hash that is equal for texts that differ in case only."""
    return int.from_bytes(blake2b(text.casefold().encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
