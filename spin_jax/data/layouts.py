"""What a row's columns mean: a row in any known layout -> its turns, or why it cannot be used.

Columns and the keys of turns are told by those that hold something, row by row: Parquet and data sets that were joined
fill what a row lacks with null.
"""

from collections.abc import Callable, Mapping, Sequence

from spin_jax.errors import UserError

QUESTIONS = ("prompt", "question", "instruction", "query")
ANSWERS = ("response", "completion", "answer", "output")
CONTEXTS = ("input", "context")  # put after the question
SYSTEMS = ("system", "system_prompt", "system_message")
PREFERENCES = ("chosen", "rejected")  # two answers to choose between, which are not read
TOOLS = ("tools", "functions", "tool_calls", "function_call")  # of a row or of a turn
UNWANTED = ("label", "kto_tag")  # false where a response is one to avoid
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
ACCEPTED_COLUMNS = (
    "messages (role/content), conversations or conversation (from/value), real + generated, "
    f"instruction [+ input] + output, or one of {'/'.join(QUESTIONS)} + one of {'/'.join(ANSWERS)}"
)
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "ai", "bot", "chatbot", "model"), "assistant"),
}

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


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
        return [name for name in names if name in self.values and _holds(self.values[name])]

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
            what = repr(names[0]) if len(names) < 3 else f"among {', '.join(names)}"
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


def _holds(value: object, depth: int = 2) -> bool:
    if isinstance(value, str):
        return value != "" and not value.isspace()
    if isinstance(value, list | tuple | dict):
        inner = value.values() if isinstance(value, dict) else value
        return any(_holds(item, depth - 1) for item in inner) if depth else bool(value)
    return value is not None and value is not False


def message(role: str, content: str) -> Message:
    """A turn as everything behind the data knows it."""
    return {"role": role, "content": content}


# ---- layouts: a row -> its turns


def detect_layout(row: Fields, answered: bool = True, otherwise: str | None = None) -> str:
    """Name of the layout that a row's columns fit, the most specific first: those that hold something or, where these
    fit none, all. If not `answered`, a column of answers may be missing.

    Raises:
        UserError: they fit none, and there is no `otherwise`.
    """
    every = list(row.values)
    layout = _fitting(set(row.held(*every)), answered) or _fitting(set(every), answered) or otherwise
    if layout:
        return layout
    columns = f"columns {', '.join(every)} fit no known layout"
    if liked := row.held(*PREFERENCES):
        turns = row.values[liked[0]]
        is_whole = not row.held(*QUESTIONS) or (isinstance(turns, list) and len(turns) > 1)
        name = "messages" if is_whole else ANSWERS[0]
        raise UserError(f"{columns}: chosen and rejected are not read; to learn from one of them, call it {name}")
    raise UserError(f"{columns}; accepted: {ACCEPTED_COLUMNS}")


def _fitting(names: set[str], answered: bool) -> str | None:
    if not answered and not names & set(ANSWERS):
        names = names | {ANSWERS[0]}
    fits = {
        "pairs": {"real", "generated"} <= names,
        "messages": "messages" in names,
        "conversations": bool(names & {"conversations", "conversation"}),
        "alpaca": "instruction" in names and bool(names & {"output", "response"}),
        "prompt_response": bool(names & set(QUESTIONS) and names & set(ANSWERS)),
    }
    return next((layout for layout, fit in fits.items() if fit), None)


def read_conversation(row: Fields, *columns: str) -> list[Message]:
    """A column of turns, after the system text of another column where the row has one."""
    return _with_system(row, read_turns(row, *columns))


def _read_exchange(row: Fields, questions: Sequence[str], answers: Sequence[str]) -> list[Message]:
    """A question and, where `answers` has names, its answer: each a text, or a list of turns."""
    turns = [*_history(row), *_turns_of(row, "user", *questions)]
    texts = [turns[-1]["content"], *map(row.text, row.held(*CONTEXTS))]
    turns[-1] = message(turns[-1]["role"], "\n\n".join(text for text in texts if _holds(text)))
    answer = _turns_of(row, "assistant", *answers) if answers else []
    if any(turn["role"] != "assistant" for turn in answer):
        raise Unusable("a response that holds other turns than the assistant's")
    return _with_system(row, turns + answer)


def _turns_of(row: Fields, role: str, *columns: str) -> list[Message]:
    value = row.get(*columns)
    if isinstance(value, dict) or (isinstance(value, list) and all(isinstance(turn, dict) for turn in value)):
        return read_turns(row, *columns)
    return [message(role, row.text(*columns))]


# (row, whether an answer is wanted) -> its turns
LAYOUTS: dict[str, Callable[[Fields, bool], list[Message]]] = {
    "messages": lambda row, answered: read_conversation(row, "messages"),
    "conversations": lambda row, answered: read_conversation(row, "conversations", "conversation"),
    "prompt_response": lambda row, answered: _read_exchange(row, QUESTIONS, ANSWERS if answered else ()),
    "alpaca": lambda row, answered: _read_exchange(row, ("instruction",), ("output", "response") if answered else ()),
    "pairs": lambda row, answered: read_conversation(row, "real"),
}


def _with_system(row: Fields, turns: list[Message]) -> list[Message]:
    """The system text of a column goes before the turns, unless they begin with one of their own."""
    own = [turn for turn in turns[:1] if turn["role"] == "system"]
    if not row.held(*SYSTEMS) or (own and _holds(own[0]["content"])):
        return turns
    return [message("system", row.text(*SYSTEMS)), *turns[len(own) :]]


def _history(row: Fields) -> list[Message]:
    """Alpaca's earlier exchanges, [question, answer] each."""
    if not row.held("history"):
        return []
    pairs = row.get("history")
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        raise UserError("history must be a list of [question, answer] pairs")
    return [message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]


def _is_pair(pair: object) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


# ---- turns


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


# ---- from turns to what is learned


def exchange(row: Fields, turns: Sequence[Message], turn: str) -> tuple[tuple[Message, ...], str]:
    """(prompt messages, response text): the last response with all before it, or the first exchange.

    Raises:
        Unusable: there is no such response.
    """
    roles = [message["role"] for message in turns]
    elsewhere = f" ({' and '.join(row.held(*PREFERENCES))} are not read)" if row.held(*PREFERENCES) else ""
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
