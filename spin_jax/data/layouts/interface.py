"""Define layouts, and find the one that a row has."""

import dataclasses
from collections.abc import Callable

from spin_jax.data.layouts import LAYOUTS
from spin_jax.data.layouts.columns import ANSWERS, PREFERENCES, QUESTIONS, Fields
from spin_jax.data.layouts.turns import Message
from spin_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the rows of one kind hold their conversation.

    In `fits` and `turns`, `answered` is False if only prompts are read, so that rows need no answer.

    Attributes:
        columns: describes the columns, for a user whose rows fit no layout.
        fits: (names of columns, answered) -> whether a row with these columns has this layout.
        turns: (row, answered) -> its turns, of which the last is the answer if `answered`. Raises Unusable for a row
            that cannot be trained on, and UserError for a malformed one.
        generated: row -> (turns that end in the opponent's response, whether that is truncated). None if rows of this
            layout have no generated response.
        is_text: whether users of this layout write a prompt of one turn as a text, and not as a list of turns.
    """

    columns: str
    fits: Callable[[set[str], bool], bool]
    turns: Callable[[Fields, bool], list[Message]]
    generated: Callable[[Fields], tuple[list[Message], bool]] | None = None
    is_text: bool = False


def detect_layout(row: Fields, answered: bool = True, otherwise: str | None = None) -> str:
    """Return the name of the layout that a row's columns fit. Ask the layout that was registered last first.

    Try the columns that are not empty; if they fit no layout, try all columns.

    Args:
        answered: False if a column of answers may be missing.
        otherwise: the layout to return if the row fits none.

    Raises:
        UserError: the row fits no layout, and there is no `otherwise`.
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
