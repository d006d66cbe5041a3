"""A config field: its default, its documentation, and the values that it may have; others are refused in one line."""

import dataclasses
import difflib
import itertools
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from spin_jax.errors import UserError, as_flag

MAX_INT = 2**31 - 1  # of an int32, in which jax counts; a seed becomes a random key through one
LENGTH = 2**20  # tokens, rows or slots: more than any device holds
SMALLEST = 1e-30  # above 0: float32, in which all is computed, makes 0 or infinity of much smaller ones

_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}

# Whether a field may have another value when a run is resumed.
FIXED = "fixed"  # not once the stage that reads it has begun (workdir.py says which that is)
FREE = "free"  # yes: it changes speed, memory or the length of the run, and nothing that is finished
CONTENT = "content"  # yes: it says where something is, and what is there is compared itself
BY_ITERATION = "by iteration"  # the entries of iterations that have not begun to train


class Bounds(NamedTuple):
    """An interval of numbers; its end is in it."""

    lowest: float
    highest: float
    inclusive: bool  # whether the lowest is in it


def at_least(lowest: float, highest: float = MAX_INT) -> Bounds:
    return Bounds(lowest, highest, True)


def above(lowest: float, highest: float = MAX_INT) -> Bounds:
    return Bounds(lowest, highest, False)


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of the config.

    Attributes:
        default: its value where nobody gives another; a value is of its type. A tuple of numbers has an entry an
            iteration, the last of which serves all later ones; an empty default is of texts.
        doc: what it is, with its unit, and why the default is what it is.
        choices: the words that it may be; "package:REGISTRY" stands for the names in a registry. None: any text.
        bounds: of a number, or of each entry of a tuple.
        resume: FIXED, FREE, CONTENT or BY_ITERATION.
        decodes: whether a sampled response depends on it, beside the model, the prompt and the seed.
    """

    default: object
    doc: str
    choices: tuple[str, ...] = ()
    bounds: Bounds | None = None
    resume: str = FIXED
    decodes: bool = False

    def words(self) -> tuple[str, ...]:
        """The words that a value may be. Registries are imported only here: their packages are on higher floors."""
        words = ((pkgutil.resolve_name(choice) if ":" in choice else (choice,)) for choice in self.choices)
        return tuple(itertools.chain.from_iterable(words))

    def check(self, name: str, value: Any) -> None:
        """Refuse a value that is not of the default's kind, or not among the choices or within the bounds.

        Raises:
            UserError: one line with the field, the value, and one that it could have.
        """
        given = as_flag(name, value)
        if not _is_like(value, self.default):
            what = _kind(self.default) + (", not text" if isinstance(value, str) else "")
            raise UserError(f"{given} must be {what}: write it as {as_flag(name, _example(value, self.default))}")
        words, values = self.words(), value if isinstance(value, tuple) else (value,)
        for word in values:
            if words and word not in words:
                raise UserError(f"{given} is not one of {', '.join(words)}{did_you_mean(word, words)}")
        if self.bounds:
            if not values:
                raise UserError(f"{given} is empty: write one value an iteration, as {as_flag(name, self.default)}")
            for one in values:
                _check_bounds(given, one, self.bounds)


def field(default: Any, doc: str, **what: Any) -> Any:
    """A `Field` as a field of a frozen section, such as `batch_size: int = field(64, "Pairs a step.")`."""
    return dataclasses.field(default=default, metadata={"field": Field(default, doc, **what)})


def check_names(names: Iterable[str], fields: Mapping[str, Field]) -> None:
    """Refuse what is no field.

    Raises:
        UserError: one line with a field that may have been meant.
    """
    for name in names:
        if name not in fields:
            if inner := [known for known in fields if known.startswith(f"{name}.")]:
                advice = f": it holds fields, such as --config.{inner[0]}"
            else:
                advice = did_you_mean(name, fields, "--config.")
            raise UserError(f"--config.{name} is not a field{advice}")


def did_you_mean(name: str, names: Iterable[str], prefix: str = "") -> str:
    """': did you mean X?' for the closest known name, or ''. One with the same last part is close: --config.beta for
    --config.spin.beta."""
    names = list(names)
    same = [known for known in names if known.rpartition(".")[2] == name.rpartition(".")[2]]
    close = difflib.get_close_matches(name, same, n=3, cutoff=0)
    close = close or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f": did you mean {' or '.join(prefix + known for known in close)}?" if close else ""


def _is_like(value: object, default: object) -> bool:
    if isinstance(default, tuple) and isinstance(value, tuple):
        return all(_is_like(one, default[0] if default else "") for one in value)
    if isinstance(value, bool):
        return isinstance(default, bool)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))


def _kind(default: object) -> str:
    if isinstance(default, tuple):
        return "a tuple of texts" if _is_of_texts(default) else "a tuple of numbers"
    return _KINDS[type(default)]


def _example(value: object, default: object) -> object:
    """A value of the right kind; as near to the one that was given as can be told."""
    if isinstance(default, int) and isinstance(value, float) and value.is_integer():
        return int(value)
    if _is_of_texts(default):
        return (value,) if isinstance(value, str) else (default or ("###",))
    return default


def _is_of_texts(default: object) -> bool:
    return isinstance(default, tuple) and all(isinstance(text, str) for text in default)


def _check_bounds(given: str, value: float, bounds: Bounds) -> None:
    if not value >= bounds.lowest or (value == bounds.lowest and not bounds.inclusive):
        raise UserError(f"{given} must be {'at least' if bounds.inclusive else 'above'} {bounds.lowest}")
    if value > bounds.highest:
        raise UserError(f"{given} must be at most {bounds.highest}")
    if 0 < value < SMALLEST:
        raise UserError(f"{given} is so small that float32 cannot hold it: write at least {SMALLEST}")
