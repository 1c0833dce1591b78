"""Many values in one buffer: a million of them take their own bytes and eight more each, not an object each."""

from array import array
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

_Value = TypeVar("_Value")
_KEY = np.dtype("V32")


class Code(Protocol[_Value]):
    """How values become bytes, and come back equal."""

    def pack(self, value: _Value, /) -> bytes:
        """Its bytes."""
        ...

    def unpack(self, packed: bytes, /) -> _Value:
        """The value of these bytes."""
        ...


class Text:
    """Text of any kind, lone surrogates too: names of files may hold them."""

    def pack(self, value: str, /) -> bytes:
        """As UTF-8."""
        return value.encode("utf-8", "surrogatepass")

    def unpack(self, packed: bytes, /) -> str:
        """From UTF-8."""
        return packed.decode("utf-8", "surrogatepass")


class Raw:
    """Bytes as they are."""

    def pack(self, value: bytes, /) -> bytes:
        """The same."""
        return value

    def unpack(self, packed: bytes, /) -> bytes:
        """The same."""
        return packed


class Packed(Sequence[_Value]):
    """Values that are made again whenever they are asked for. It grows by `append`; equal to any sequence of equals."""

    def __init__(self, code: Code[_Value], values: Iterable[_Value] = ()) -> None:
        self._code, self._content, self._ends = code, bytearray(), array("Q", [0])
        for value in values:
            self.append(value)

    def append(self, value: _Value) -> None:
        """One more, at the end."""
        self._content += self._code.pack(value)
        self._ends.append(len(self._content))

    def at(self, places: Iterable[int]) -> "Packed[_Value]":
        """The values at these places, packed too."""
        found = Packed(self._code)
        for place in places:
            found._content += self._content[self._ends[place] : self._ends[place + 1]]
            found._ends.append(len(found._content))
        return found

    def __len__(self) -> int:
        """How many."""
        return len(self._ends) - 1

    @overload
    def __getitem__(self, place: int) -> _Value: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[_Value, ...]: ...

    def __getitem__(self, place: int | slice) -> _Value | tuple[_Value, ...]:
        """One of the values, or some as a tuple."""
        if isinstance(place, slice):
            return tuple(self[each] for each in range(len(self))[place])
        place = range(len(self))[place]
        return self._code.unpack(bytes(self._content[self._ends[place] : self._ends[place + 1]]))

    def __eq__(self, other: object) -> bool:
        """Whether the other is as long, and equal in every place."""
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # it grows

    def __repr__(self) -> str:
        """As a tuple's."""
        return repr(tuple(self))


def chosen(values: Sequence[_Value], places: Iterable[int]) -> Sequence[_Value]:
    """The values at these places: packed where they are, else as a tuple."""
    return values.at(places) if isinstance(values, Packed) else tuple(values[place] for place in places)


def table_of(keys: Iterable[bytes]) -> NDArray[np.void]:
    """Keys of 32 bytes as an array ``(n,)``."""
    content = bytearray()
    for key in keys:
        content += key
    return np.frombuffer(content, _KEY)


class Keys:
    """Keys of 32 bytes, each once, in order of first mention.

    table: the keys ``(n,)``. first: where in what was given each of them stood first, ``(n,)``.
    """

    def __init__(self, given: NDArray[np.void]) -> None:
        self._sorted, first = np.unique(given, return_index=True)
        order = np.argsort(first)
        self.first: NDArray[np.intp] = first[order]
        self.table: NDArray[np.void] = self._sorted[order]
        self._place = np.argsort(order)

    def __len__(self) -> int:
        """n, the number of keys."""
        return len(self.table)

    def find(self, keys: NDArray[np.void]) -> NDArray[np.intp]:
        """The place of each of ``keys`` ``(m,)`` in ``table``, or -1: ``(m,)``."""
        if not len(self):
            return np.full(len(keys), -1)
        near = np.searchsorted(self._sorted, keys).clip(max=len(self) - 1)
        return np.where(self._sorted[near] == keys, self._place[near], -1)
