"""A row's columns and a turn's keys, by name; and the names of columns that cannot be learned from.

A column counts only in rows where it is not empty: Parquet, and data sets that were joined, fill what a row lacks with
null.
"""

from collections.abc import Mapping

from spin_jax.errors import UserError

QUESTIONS = ("prompt", "question", "instruction", "query")
ANSWERS = ("response", "completion", "answer", "output")
PREFERENCES = ("chosen", "rejected")  # read by the layout "preference"
TOOLS = ("tools", "functions", "tool_calls", "function_call")  # columns of a row, or keys of a turn
UNWANTED = ("label", "kto_tag")  # false if the response is one to avoid
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


class Unusable(Exception):
    """Raised for a well-formed row that cannot be trained on, with the reason. The row is counted and skipped."""


class Fields:
    """A row's columns, or a turn's keys, by name. Notes which are read, so that the others can be reported."""

    def __init__(self, values: Mapping[str, object]):
        self.values = values
        self._read: set[str] = set()
        self._inner: dict[str, None] = {}  # keys of turns that were not read

    def held(self, *names: str) -> list[str]:
        """Return those of `names` that are not empty (see `has_content`)."""
        return [name for name in names if name in self.values and has_content(self.values[name])]

    def unused(self) -> list[str]:
        """Return the names that are not empty and were not read. A key of a turn is written column[].key."""
        return self.held(*(name for name in self.values if name not in self._read)) + list(self._inner)

    def note_unused(self, column: str, turn: "Fields") -> None:
        """Add the keys of a turn that were not read."""
        for key in turn.unused():
            self._inner[f"{column}[].{key}"] = None

    def choose(self, *names: str) -> str:
        """Return the first of `names` that is not empty, else the first that exists. Note it as read.

        Raises:
            UserError: none exists.
        """
        there = self.held(*names) or [name for name in names if name in self.values]
        if not there:
            what = f"among {', '.join(names)}" if len(names) > 2 else repr(next(iter(names)))
            raise UserError(f"no field {what} (this row has: {', '.join(self.values)})")
        self._read.add(there[0])
        return there[0]

    def get(self, *names: str) -> object:
        """Return the value of the name that `choose` returns."""
        return self.values[self.choose(*names)]

    def text(self, *names: str) -> str:
        """Return the text of the name that `choose` returns; null becomes an empty text.

        Raises:
            UserError: it is not text.
        """
        name = self.choose(*names)
        value = self.values[name]
        if value is not None and not isinstance(value, str):
            raise UserError(f"field {name!r} must be text, not {type(value).__name__}")
        return value or ""


def has_content(value: object, depth: int = 2) -> bool:
    """Whether a value is more than null, false, blank text, or a list or dict of such values."""
    if isinstance(value, str):
        return value != "" and not value.isspace()
    if isinstance(value, list | tuple | dict):
        inner = value.values() if isinstance(value, dict) else value
        return any(has_content(item, depth - 1) for item in inner) if depth else bool(value)
    return value is not None and value is not False


def refuse_kinds(fields: Fields, whose: str) -> None:
    """Refuse tools and media in the columns of a row or the keys of a turn: no text that is scored contains them.

    Args:
        whose: "row" or "turn", for the reason.

    Raises:
        Unusable: there are some.
    """
    for name in fields.held(*TOOLS, *MEDIA):
        value = fields.get(name)
        if not isinstance(value, str) or value.strip() not in ("[]", "{}", "null"):  # text may be JSON
            raise Unusable(f"a {whose} with {name}")
