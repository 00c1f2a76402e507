"""What was used last, kept up to a limit: skeletons, documents, orders of epochs, decode steps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """Values by key that weigh at most `most` together; the least recently used go first.

    `weigh(value)` is what one weighs; by default each weighs 1.
    """

    def __init__(self, most: int, weigh: Callable[[Value], int] = lambda _: 1):
        self.kept: OrderedDict[Key, Value] = OrderedDict()
        self._most, self._weigh, self._weight = most, weigh, 0

    def fetch(self, key: Key, build: Callable[[], Value]) -> Value:
        """The value of a key, built unless it is kept. Nothing is kept if it cannot be built."""
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        self._shrink(self._most - 1)  # before: values may be as large as memory allows
        value = self.kept[key] = build()
        self._weight += self._weigh(value)
        self._shrink(self._most)
        return value

    def _shrink(self, most: int) -> None:
        while self.kept and self._weight > most:
            _, oldest = self.kept.popitem(last=False)
            self._weight -= self._weigh(oldest)
