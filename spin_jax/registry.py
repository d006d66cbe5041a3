"""A mapping from names to things in files of their own, each imported when its name is first used."""

import pkgutil
from collections import UserDict
from collections.abc import Iterator
from typing import Any

from spin_jax.errors import UserError


def no_refusal(*_: object) -> None:
    """The `refusal` of a thing that can always be used."""


class Registry(UserDict[str, Any]):
    """A mapping whose entries are things, or the places of things: "package.module:name".

    Names are known without importing what they stand for. So the config's choices come from registries, and are read
    without jax.

    >>> squares = Registry({"sqrt": "math:sqrt"})
    >>> squares["sqrt"](9.0)
    3.0
    """

    def register(self, name: str, entry: Any) -> None:
        """Add a thing or its place, or replace the one of that name."""
        self.data[name] = entry

    def __getitem__(self, name: str) -> Any:
        """
        Raises:
            UserError: what is to be there cannot be imported.
        """
        entry = self.data[name]
        if isinstance(entry, str):
            try:
                entry = self.data[name] = pkgutil.resolve_name(entry)
            except (ImportError, AttributeError, ValueError) as error:
                raise UserError(
                    f"{name!r} is registered as {entry}, which cannot be imported ({error}): write package.module:name"
                ) from error
        return entry

    def __reversed__(self) -> Iterator[str]:
        """The newest first."""
        return reversed(self.data)
