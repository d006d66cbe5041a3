"""Rows whose conversation is a column of turns."""

from spin_jax.data.layouts.columns import Fields
from spin_jax.data.layouts.interface import Layout
from spin_jax.data.layouts.turns import Message, read_conversation

_SHAREGPT = ("conversations", "conversation")


def _generated(row: Fields) -> tuple[list[Message], bool]:
    truncated = "generated_truncated" in row.values and bool(row.get("generated_truncated"))
    return read_conversation(row, "generated"), truncated


messages = Layout(
    "messages (role/content)",
    fits=lambda names, answered: "messages" in names,
    turns=lambda row, answered: read_conversation(row, "messages"),
)
conversations = Layout(
    "conversations or conversation (from/value)",
    fits=lambda names, answered: not names.isdisjoint(_SHAREGPT),
    turns=lambda row, answered: read_conversation(row, *_SHAREGPT),
)
# The authors' (data sets UCLA-AGI/SPIN_iter0 to 3), which `data.pairs` writes.
pairs = Layout(
    "real + generated",
    fits=lambda names, answered: {"real", "generated"} <= names,
    turns=lambda row, answered: read_conversation(row, "real"),
    generated=_generated,
)
