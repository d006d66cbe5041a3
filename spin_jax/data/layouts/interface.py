"""What a layout is, and which one a row has."""

import dataclasses
from collections.abc import Callable

from spin_jax.data.layouts import LAYOUTS
from spin_jax.data.layouts.columns import ANSWERS, PREFERENCES, QUESTIONS, Fields
from spin_jax.data.layouts.turns import Message
from spin_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where rows of a kind hold their conversation. `answered` is false where prompts alone are read.

    Attributes:
        columns: what they are called, for a user whose rows fit no layout.
        fits: (names of columns, answered) -> whether a row with these columns has this layout.
        turns: (row, answered) -> its turns, the last of them the answer if one is wanted. Raises Unusable for a row
            that cannot be trained on, UserError for a malformed one.
        generated: row -> (turns that end in the opponent's response, whether that was truncated), where rows have one.
        is_text: whether a prompt of one turn is a text to its user, and not a list of turns.
    """

    columns: str
    fits: Callable[[set[str], bool], bool]
    turns: Callable[[Fields, bool], list[Message]]
    generated: Callable[[Fields], tuple[list[Message], bool]] | None = None
    is_text: bool = False


def detect_layout(row: Fields, answered: bool = True, otherwise: str | None = None) -> str:
    """Name of the layout that a row's columns fit: those that hold something or, where these fit none, all. The layout
    that was registered last is asked first. If not `answered`, a column of answers may be missing.

    Raises:
        UserError: they fit none, and there is no `otherwise`.
    """
    every = list(row.values)
    for names in (set(row.held(*every)), set(every)):
        for layout in reversed(LAYOUTS):
            if LAYOUTS[layout].fits(names, answered):
                return layout
    if otherwise:
        return otherwise
    columns = f"columns {', '.join(every)} fit no known layout"
    if liked := row.held(*PREFERENCES):
        turns = row.values[liked[0]]
        is_whole = not row.held(*QUESTIONS) or (isinstance(turns, list) and len(turns) > 1)
        name = "messages" if is_whole else ANSWERS[0]
        raise UserError(
            f"{columns}: chosen and rejected are not read; to learn from both (DPO), set "
            f"--config.data.layout=preference; to learn from one of them, call it {name}"
        )
    raise UserError(f"{columns}; accepted: {', or '.join(LAYOUTS[name].columns for name in reversed(LAYOUTS))}")
