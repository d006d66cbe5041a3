"""Names to things that are each in a file of their own, which is imported when its name is first used."""

import importlib
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping whose entries are written as "package.module:name"; `register` adds one of a user's own.

    >>> squares = Registry({"sqrt": "math:sqrt"})
    >>> squares["sqrt"](9.0)
    3.0
    """

    def __init__(self, places: Mapping[str, str]):
        self._places = dict(places)
        self._things: dict[str, T] = {}

    def register(self, name: str, thing: T) -> None:
        """Add an entry, or take the place of one."""
        self._things[name] = thing

    def __getitem__(self, name: str) -> T:
        if name not in self._things:
            module, _, attribute = self._places[name].partition(":")
            self._things[name] = getattr(importlib.import_module(module), attribute)
        return self._things[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._places, *self._things]))

    def __len__(self) -> int:
        return len({*self._places, *self._things})
