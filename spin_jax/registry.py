"""Names to things that are each in a file of their own, which is imported when its name is first used."""

import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from spin_jax.errors import UserError

T = TypeVar("T")


def no_refusal(*_: object) -> None:
    """The `refusal` of a thing that can always be used."""


class Registry(Mapping[str, T], Generic[T]):
    """A mapping whose entries are things, or the places of things: "package.module:name".

    Names are known without importing what they stand for. So the config's choices come from registries, and are read
    without jax.

    >>> squares = Registry({"sqrt": "math:sqrt"})
    >>> squares["sqrt"](9.0)
    3.0
    """

    def __init__(self, entries: Mapping[str, T | str]):
        self._entries: dict[str, Any] = dict(entries)

    def register(self, name: str, entry: T | str) -> None:
        """Add a thing or its place, or replace the one of that name."""
        self._entries[name] = entry

    def __getitem__(self, name: str) -> T:
        """
        Raises:
            UserError: what is to be there cannot be imported.
        """
        entry: Any = self._entries[name]
        if isinstance(entry, str):
            try:
                entry = self._entries[name] = pkgutil.resolve_name(entry)
            except (ImportError, AttributeError, ValueError) as error:
                raise UserError(
                    f"{name!r} is registered as {entry}, which cannot be imported ({error}): write package.module:name"
                ) from error
        return entry

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __reversed__(self) -> Iterator[str]:
        """The newest first."""
        return reversed(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
