"""Preference data: two responses to a prompt, `chosen` over `rejected`, in the layouts of TRL.

The chosen response is read as the real one, and the rejected one in the place of the opponent's: with the logistic
loss, that is DPO (arXiv 2305.18290).
"""

from collections.abc import Callable

from spin_jax.data.layouts.columns import PREFERENCES, QUESTIONS, Fields, Unusable
from spin_jax.data.layouts.exchanges import exchange_layout
from spin_jax.data.layouts.interface import Layout
from spin_jax.data.layouts.turns import Message, read_conversation

CHOSEN, REJECTED = PREFERENCES


def _conversation_of(column: str) -> Callable[[Fields, bool], list[Message]]:
    """(row, answered) -> the turns that end in the response of a column. The column is a whole conversation ("implicit
    prompt") where its first turn is not the assistant's; the prompt is a column of its own ("explicit prompt") else."""
    explicit = exchange_layout(column, QUESTIONS, (column,)).turns

    def turns(row: Fields, answered: bool) -> list[Message]:
        if isinstance(row.values.get(column), list):
            whole = read_conversation(row, column)
            if whole[-1]["role"] != "assistant" or any(turn["role"] == "user" for turn in whole):
                return whole
        return explicit(row, answered)

    return turns


_chosen, _rejected = map(_conversation_of, PREFERENCES)


def _generated(row: Fields) -> tuple[list[Message], bool]:
    turns = _rejected(row, True)
    if not turns[-1]["content"].strip():
        raise Unusable(f"empty {REJECTED}")
    return turns, False


# By name alone: such rows often have `messages`, too, and who fine-tunes on those wants no rejected response.
preference = Layout(
    f"{CHOSEN} + {REJECTED} [+ one of {'/'.join(QUESTIONS)}], if --config.data.layout=preference",
    fits=lambda names, answered: False,
    turns=_chosen,
    generated=_generated,
)
