"""A row's columns and a turn's keys by name, and those of which nothing can be learned.

They are told by those that hold something, row by row: Parquet and data sets that were joined fill what a row lacks
with null.
"""

from collections.abc import Mapping

from spin_jax.errors import UserError

QUESTIONS = ("prompt", "question", "instruction", "query")
ANSWERS = ("response", "completion", "answer", "output")
PREFERENCES = ("chosen", "rejected")  # two answers to choose between: the layout "preference" reads them
TOOLS = ("tools", "functions", "tool_calls", "function_call")  # of a row or of a turn
UNWANTED = ("label", "kto_tag")  # false where a response is one to avoid
MEDIA = ("image", "images", "video", "videos", "audio", "audios")


class Unusable(Exception):
    """A well-formed row that cannot be trained on, and why: it is counted and left out."""


class Fields:
    """A row's columns, or a turn's keys, by name; it notes which are read, so that the others can be told."""

    def __init__(self, values: Mapping[str, object]):
        self.values = values
        self._read: set[str] = set()
        self._inner: dict[str, None] = {}  # keys of turns that nobody read

    def held(self, *names: str) -> list[str]:
        """Those of `names` that have more than null, an empty text or an empty list."""
        return [name for name in names if name in self.values and has_content(self.values[name])]

    def unused(self) -> list[str]:
        """Names that hold something and were not read, keys of turns among them as column[].key."""
        return self.held(*(name for name in self.values if name not in self._read)) + list(self._inner)

    def note_unused(self, column: str, turn: "Fields") -> None:
        """Add the keys of a turn that were not read."""
        for key in turn.unused():
            self._inner[f"{column}[].{key}"] = None

    def choose(self, *names: str) -> str:
        """The first of `names` that holds something, else the first that is there; it counts as read.

        Raises:
            UserError: none is there.
        """
        there = self.held(*names) or [name for name in names if name in self.values]
        if not there:
            what = f"among {', '.join(names)}" if len(names) > 2 else repr(next(iter(names)))
            raise UserError(f"no field {what} (this row has: {', '.join(self.values)})")
        self._read.add(there[0])
        return there[0]

    def get(self, *names: str) -> object:
        """The value of the chosen one of `names`."""
        return self.values[self.choose(*names)]

    def text(self, *names: str) -> str:
        """The text of the chosen one of `names`; null is an empty one."""
        name = self.choose(*names)
        value = self.values[name]
        if value is not None and not isinstance(value, str):
            raise UserError(f"field {name!r} must be text, not {type(value).__name__}")
        return value or ""


def has_content(value: object, depth: int = 2) -> bool:
    """Whether a value is more than null, an empty text, or a list or dict of such."""
    if isinstance(value, str):
        return value != "" and not value.isspace()
    if isinstance(value, list | tuple | dict):
        inner = value.values() if isinstance(value, dict) else value
        return any(has_content(item, depth - 1) for item in inner) if depth else bool(value)
    return value is not None and value is not False


def refuse_kinds(fields: Fields, whose: str) -> None:
    """Refuse tools and media, in the columns of a row or the keys of a turn: they are no part of the text that is
    scored.

    Raises:
        Unusable: there are some.
    """
    for name in fields.held(*TOOLS, *MEDIA):
        value = fields.get(name)
        if not isinstance(value, str) or value.strip() not in ("[]", "{}", "null"):  # text may be JSON
            raise Unusable(f"a {whose} with {name}")
