"""Rows that have a column for the question and one for the answer: each a text, or a list of turns."""

from collections.abc import Sequence

from spin_jax.data.layouts.columns import ANSWERS, QUESTIONS, Fields, Unusable, has_content
from spin_jax.data.layouts.interface import Layout
from spin_jax.data.layouts.turns import Message, message, read_turns, with_system
from spin_jax.errors import UserError

_CONTEXTS = ("input", "context")  # put after the question
_ALPACA = ("output", "response")


def exchange_layout(columns: str, questions: Sequence[str], answers: Sequence[str]) -> Layout:
    """Make the layout of rows that have a column of `questions` and one of `answers`."""

    def fits(names: set[str], answered: bool) -> bool:
        has_answer = not names.isdisjoint(answers) or (not answered and names.isdisjoint(ANSWERS))
        return has_answer and not names.isdisjoint(questions)

    def turns(row: Fields, answered: bool) -> list[Message]:
        turns = [*_history(row), *_turns_of(row, "user", *questions)]
        texts = [turns[-1]["content"], *map(row.text, row.held(*_CONTEXTS))]
        turns[-1] = message(turns[-1]["role"], "\n\n".join(text for text in texts if has_content(text)))
        answer = _turns_of(row, "assistant", *answers) if answered else []
        if any(turn["role"] != "assistant" for turn in answer):
            raise Unusable("a response that holds other turns than the assistant's")
        return with_system(row, turns + answer)

    return Layout(columns, fits, turns, is_text=True)


def _turns_of(row: Fields, role: str, *columns: str) -> list[Message]:
    value = row.get(*columns)
    if isinstance(value, dict) or (isinstance(value, list) and all(isinstance(turn, dict) for turn in value)):
        return read_turns(row, *columns)
    return [message(role, row.text(*columns))]


def _history(row: Fields) -> list[Message]:
    """Read Alpaca's earlier exchanges, each [question, answer], as turns."""
    if not row.held("history"):
        return []
    pairs = row.get("history")
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list | tuple) and [type(text) for text in pair] == [str, str] for pair in pairs
    ):
        raise UserError("history must be a list of [question, answer] pairs")
    return [message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]


alpaca = exchange_layout("instruction [+ input] + output", ("instruction",), _ALPACA)
prompt_response = exchange_layout(f"one of {'/'.join(QUESTIONS)} + one of {'/'.join(ANSWERS)}", QUESTIONS, ANSWERS)
