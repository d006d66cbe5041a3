"""Read the turns of a conversation from a column, and split them into prompt and response."""

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
    """Make a turn in the form that all other code uses."""
    return {"role": role, "content": content}


def read_conversation(row: Fields, *columns: str) -> list[Message]:
    """Read a column of turns, and put the system text of another column before them if the row has one."""
    return with_system(row, read_turns(row, *columns))


def with_system(row: Fields, turns: list[Message]) -> list[Message]:
    """Put the system text of a column before the turns, unless they begin with one of their own."""
    own = [turn for turn in turns[:1] if turn["role"] == "system"]
    if not row.held(*SYSTEMS) or (own and has_content(own[0]["content"])):
        return turns
    return [message("system", row.text(*SYSTEMS)), *turns[len(own) :]]


def read_turns(row: Fields, *columns: str) -> list[Message]:
    """Read a column of turns, with keys role/content (Hugging Face) or from/value (ShareGPT), as messages.

    Raises:
        Unusable: there are no turns, or one has an unknown role, a tool call, or content other than text.
        UserError: it is not a column of turns.
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
    """Turn a dict of lists, as TFDS and `datasets` may hold turns, into a list of dicts. Return other values as is."""
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
    """Return the text of one item in a turn's list of contents."""
    kind = part.values.get("type") or next(iter(part.held(*MEDIA, "image_url")), "text")
    if kind not in ("text", "input_text", "output_text"):
        raise Unusable(f"a turn with {kind} content")
    return part.text("text")


def exchange(row: Fields, turns: Sequence[Message], turn: str) -> tuple[tuple[Message, ...], str]:
    """Split turns into (prompt messages, response text).

    Args:
        turn: "last": the last turn is the response, and all turns before it are the prompt. "first": the answer to the
            first user turn is the response.

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
    """Return a conversation up to its "first" or "last" user turn, without the answer.

    Raises:
        Unusable: there is no user turn.
    """
    users = [position for position, message in enumerate(turns) if message["role"] == "user"]
    if not users:
        raise Unusable("no user turn")
    return turns[: users[0 if turn == "first" else -1] + 1]
