"""Turns of a conversation: read from a column, after a system text; and what of them is learned."""

from collections.abc import Sequence

from spin_jax.data.layouts.columns import MEDIA, PREFERENCES, Fields, Unusable, has_content, refuse_kinds
from spin_jax.errors import UserError

SYSTEMS = ("system", "system_prompt", "system_message")
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "ai", "bot", "chatbot", "model"), "assistant"),
}

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


def message(role: str, content: str) -> Message:
    """A turn as everything behind the data knows it."""
    return {"role": role, "content": content}


def read_conversation(row: Fields, *columns: str) -> list[Message]:
    """A column of turns, after the system text of another column where the row has one."""
    return with_system(row, read_turns(row, *columns))


def with_system(row: Fields, turns: list[Message]) -> list[Message]:
    """The system text of a column goes before the turns, unless they begin with one of their own."""
    own = [turn for turn in turns[:1] if turn["role"] == "system"]
    if not row.held(*SYSTEMS) or (own and has_content(own[0]["content"])):
        return turns
    return [message("system", row.text(*SYSTEMS)), *turns[len(own) :]]


def read_turns(row: Fields, *columns: str) -> list[Message]:
    """A column of turns, in role/content (Hugging Face) or from/value (ShareGPT) words, as messages.

    Raises:
        Unusable: there are none, or one has a role, a tool's call or a kind of content that is not text.
        UserError: it is no column of turns.
    """
    column = row.choose(*columns)
    turns = _as_list(row.values[column])
    if not turns:
        raise Unusable(f"empty {column}")
    if isinstance(turns, list) and column.startswith("conversation") and all(isinstance(turn, str) for turn in turns):
        return [message(("user", "assistant")[position % 2], text) for position, text in enumerate(turns)]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{column} must be a list of turns such as {{'role': 'user', 'content': '...'}}")
    messages = []
    for position, keys in enumerate(turns):
        turn = Fields(keys)
        try:
            messages.append(_read_turn(turn))
        except UserError as error:
            raise UserError(f"{column}[{position}]: {error}") from None
        row.note_unused(column, turn)
    return messages


def _as_list(turns: object) -> object:
    """TFDS and `datasets` may hold a list of turns as one dict of lists."""
    if isinstance(turns, dict) and all(isinstance(values, list) for values in turns.values()):
        if len({len(values) for values in turns.values()}) == 1:
            return [dict(zip(turns, turn, strict=True)) for turn in zip(*turns.values(), strict=True)]
    return turns


def _read_turn(turn: Fields) -> Message:
    role = turn.text("role", "from")
    if role.strip().lower() not in ROLES:
        raise Unusable(f"a turn with role {role!r}")
    refuse_kinds(turn, "turn")
    content = turn.get("content", "value")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        content = "".join(_part(Fields(part)) for part in content)
    else:
        content = turn.text("content", "value")
    return message(ROLES[role.strip().lower()], content)


def _part(part: Fields) -> str:
    """The text of one item in a turn's list of contents."""
    kind = part.values.get("type") or next(iter(part.held(*MEDIA, "image_url")), "text")
    if kind not in ("text", "input_text", "output_text"):
        raise Unusable(f"a turn with {kind} content")
    return part.text("text")


def exchange(row: Fields, turns: Sequence[Message], turn: str) -> tuple[tuple[Message, ...], str]:
    """(prompt messages, response text): the last response with all before it, or the first exchange.

    Raises:
        Unusable: there is no such response.
    """
    roles = [message["role"] for message in turns]
    unread = [name for name in row.unused() if name in PREFERENCES]
    elsewhere = f" ({' and '.join(unread)} are not read)" if unread else ""
    if "user" not in roles:
        raise Unusable("no user turn")
    if "assistant" not in roles:
        raise Unusable(f"no assistant turn{elsewhere}")
    if turn == "last" and roles[-1] != "assistant":
        raise Unusable(f"the last turn is the {roles[-1]}'s, without a response{elsewhere}")
    answer = roles.index("user") + 1 if turn == "first" else len(roles) - 1
    if roles[answer - 1 : answer + 1] != ["user", "assistant"]:
        raise Unusable(f"the {turn} response does not follow a user turn")
    return tuple(turns[:answer]), turns[answer]["content"]


def asked(turns: list[Message], turn: str) -> list[Message]:
    """A conversation up to its first or last user turn, whether that is answered or not.

    Raises:
        Unusable: there is no user turn.
    """
    users = [position for position, message in enumerate(turns) if message["role"] == "user"]
    if not users:
        raise Unusable("no user turn")
    return turns[: users[0 if turn == "first" else -1] + 1]
