"""SFT data from files, saved data sets, the Hub or TFDS, as one kind of `Example` whatever the column layout.

A malformed row (a wrong type, a missing field, broken JSON) stops the load with its file and line. A well-formed row
that cannot be trained on (no user turn, an empty response) is left out, and `Examples.summary()` names it.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from spin_jax.data.rows import read_rows
from spin_jax.errors import UserError

QUESTIONS = ("prompt", "question", "instruction", "query")
ANSWERS = ("response", "completion", "answer", "output")
ACCEPTED_COLUMNS = (
    "messages (role/content), conversations (from/value), real + generated, "
    f"instruction [+ input] + output, or one of {'/'.join(QUESTIONS)} + one of {'/'.join(ANSWERS)}"
)
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt x and its human response y, with the opponent's response y' where the source has one.

    Attributes:
        row: 0-based row number in the source, through all of its files; no two examples share one.
        prompt: messages up to and including the user turn that `response` answers.
        response: text of the real response.
        generated: text of the generated response (pairs layout only).
        truncated: the generated response was cut at the sampling budget, so it has no real end.
    """

    row: int
    prompt: tuple[Message, ...]
    response: str
    generated: str | None = None
    truncated: bool = False


@dataclasses.dataclass(frozen=True)
class Skip:
    """A well-formed row that cannot be used, and why."""

    row: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Examples:
    """What a source gave: the usable examples and, by row number, what was left out."""

    examples: list[Example]
    skipped: list[Skip]

    def summary(self, limit: int = 10) -> str:
        """Counts of used and skipped rows, one line per reason with its first `limit` row numbers."""
        total = len(self.examples) + len(self.skipped)
        lines = [f"{total:,} rows: {len(self.examples):,} used, {len(self.skipped):,} skipped"]
        rows_by_reason = collections.defaultdict(list)
        for skip in self.skipped:
            rows_by_reason[skip.reason].append(skip.row)
        for reason, rows in rows_by_reason.items():
            more = ", ..." if len(rows) > limit else ""
            lines.append(f"  {reason}: {len(rows):,} (rows {', '.join(map(str, rows[:limit]))}{more})")
        return "\n".join(lines)


class _Unusable(Exception):
    """Raised by a layout reader for a row to be counted and left out."""


def load_examples(source: str, *, split: str = "train", layout: str = "auto", turn: str = "last") -> Examples:
    """Read SFT data, decided by the form of `source`.

    Args:
        source: a `.jsonl`/`.ndjson`, `.json` (a list) or `.parquet` file (local or gs://); a directory of such files or
            one made by `Dataset.save_to_disk`; `tfds:NAME`; or a Hub id `org/name`, `org/name:config`, `hub:name`.
        split: split of a data set or directory (a single file is one split, whatever this says).
        layout: one of `LAYOUTS`, or "auto" to decide by the columns of the first row.
        turn: in a conversation, "last" takes the last assistant turn as the response and all before it as the prompt;
            "first" takes the first exchange only, as the paper does. Layouts with one response a row ignore it.

    Raises:
        UserError: the source cannot be read, a row is malformed, or no row at all can be used.
    """
    found = Examples([], [])
    for index, (where, row, known) in enumerate(_laid_out(source, split, layout, turn)):
        try:
            found.examples.append(_checked(LAYOUTS[known](row, index, turn)))
        except _Unusable as reason:
            found.skipped.append(Skip(index, str(reason)))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    if not found.examples:
        reasons = collections.Counter(skip.reason for skip in found.skipped)
        why = ", ".join(f"{reason} ({count:,} rows)" for reason, count in reasons.items())
        raise UserError(f"{source}: no row can be used: {why or 'there are no rows'}")
    return found


def load_prompts(
    source: str, *, split: str = "train", layout: str = "auto", turn: str = "last"
) -> list[str | list[Message]]:
    """Read what is to be answered, a prompt a row, from the sources and layouts of `load_examples`; no row needs an
    answer.

    Returns:
        each row's text or, where the layout has turns, those up to the last user turn (`turn="first"`: up to the
        first), as `as_messages` takes them.

    Raises:
        UserError: the source cannot be read, or a row has no prompt. None is left out: answers are told by their order.
    """
    prompts: list[str | list[Message]] = []
    for where, row, known in _laid_out(source, split, layout, turn, answered=False):
        try:
            prompts.append(PROMPTS[known](row, turn))
            _check_asked(as_messages(prompts[-1]))
        except (_Unusable, UserError) as error:
            raise UserError(f"{where}: {error}") from None
    if not prompts:
        raise UserError(f"{source}: there are no rows")
    return prompts


def as_messages(prompt: str | Sequence[Message]) -> list[Message]:
    """A prompt as messages: text is one user turn."""
    return [_message("user", prompt)] if isinstance(prompt, str) else list(prompt)


def split_examples(
    examples: Sequence[Example], eval_rows: int, seed: int, train_rows: int = 0
) -> tuple[list[Example], list[Example]]:
    """(train, held out): disjoint, each in source order, drawn by one permutation seeded with `seed`.

    The held-out rows do not depend on `train_rows` (0: all the others), and a smaller training set is part of a larger.
    """
    if not 0 <= eval_rows < len(examples):
        raise UserError(f"cannot hold out {eval_rows} of {len(examples)} examples: ask for fewer held-out rows")
    order = np.random.default_rng(seed).permutation(len(examples))
    train = order[eval_rows:][: train_rows or None]
    return [examples[i] for i in sorted(train)], [examples[i] for i in sorted(order[:eval_rows])]


def _laid_out(
    source: str, split: str, layout: str, turn: str, answered: bool = True
) -> Iterator[tuple[str, dict, str]]:
    """(where, row, its layout) of each row."""
    if layout != "auto" and layout not in LAYOUTS:
        raise UserError(f"unknown data layout {layout!r}: write auto or one of {', '.join(LAYOUTS)}")
    if turn not in ("last", "first"):
        raise UserError(f"unknown turn {turn!r}: write 'last' or 'first'")
    for where, row in read_rows(source, split):
        if not isinstance(row, dict):
            raise UserError(f"{where}: a row must be an object with named fields, not {type(row).__name__}")
        if layout == "auto":
            layout = detect_layout(list(row), where, answered)
        yield where, row, layout


# ---- layouts: one row -> Example, or its prompt alone


def detect_layout(columns: Sequence[str], where: str, answered: bool = True) -> str:
    """Name of the layout that these columns fit, the most specific first. `where` names the row in the error; if not
    `answered`, a column of answers may be missing."""
    names = set(columns)
    if not answered and not names & set(ANSWERS):
        names.add(ANSWERS[0])
    fits = {
        "pairs": {"real", "generated"} <= names,
        "messages": "messages" in names,
        "conversations": "conversations" in names,
        "alpaca": "instruction" in names and bool(names & {"output", "response"}),
        "prompt_response": bool(names & set(QUESTIONS) and names & set(ANSWERS)),
    }
    for layout, fit in fits.items():
        if fit:
            return layout
    raise UserError(f"{where}: columns {', '.join(columns)} fit no known layout; accepted: {ACCEPTED_COLUMNS}")


def _read_conversation(column: str) -> Callable[[dict, int, str], Example]:
    def read(row: dict, index: int, turn: str) -> Example:
        prompt, response = _exchange(_turns(row, column), turn)
        return Example(index, prompt, response)

    return read


def _read_prompt_response(row: dict, index: int, turn: str) -> Example:
    return Example(index, (_message("user", _question(row)),), _text(row, _first_of(row, ANSWERS)))


def _read_alpaca(row: dict, index: int, turn: str) -> Example:
    return Example(index, (_message("user", _instruction(row)),), _text(row, _first_of(row, ("output", "response"))))


def _read_pair(row: dict, index: int, turn: str) -> Example:
    prompt, response = _exchange(_turns(row, "real"), "last")
    generated_prompt, generated = _exchange(_turns(row, "generated"), "last")
    if prompt != generated_prompt:
        raise _Unusable("real and generated answer different prompts")
    return Example(index, prompt, response, generated, truncated=bool(row.get("generated_truncated")))


LAYOUTS: dict[str, Callable[[dict, int, str], Example]] = {
    "messages": _read_conversation("messages"),
    "conversations": _read_conversation("conversations"),
    "prompt_response": _read_prompt_response,
    "alpaca": _read_alpaca,
    "pairs": _read_pair,
}


PROMPTS: dict[str, Callable[[dict, str], str | list[Message]]] = {
    "messages": lambda row, turn: _asked(_turns(row, "messages"), turn),
    "conversations": lambda row, turn: _asked(_turns(row, "conversations"), turn),
    "prompt_response": lambda row, turn: _question(row),
    "alpaca": lambda row, turn: _instruction(row),
    "pairs": lambda row, turn: _asked(_turns(row, "real"), "last"),
}


def _question(row: dict) -> str:
    return _text(row, _first_of(row, QUESTIONS))


def _instruction(row: dict) -> str:
    instruction = _text(row, "instruction")
    # Exporters leave `input` out of rows that have none, so the field is optional row by row.
    context = _text(row, "input") if "input" in row else ""
    return f"{instruction}\n\n{context}" if context.strip() else instruction


def _asked(turns: list[Message], turn: str) -> list[Message]:
    """A conversation up to its first or last user turn, whether that is answered or not."""
    users = [position for position, message in enumerate(turns) if message["role"] == "user"]
    if not users:
        raise _Unusable("no user turn")
    return turns[: users[0 if turn == "first" else -1] + 1]


def _exchange(turns: list[Message], turn: str) -> tuple[tuple[Message, ...], str]:
    """Cut a conversation into (prompt messages, response text)."""
    roles = [message["role"] for message in turns]
    if "user" not in roles:
        raise _Unusable("no user turn")
    if "assistant" not in roles:
        raise _Unusable("no assistant turn")
    answer = roles.index("user") + 1 if turn == "first" else len(roles) - 1 - roles[::-1].index("assistant")
    if roles[answer - 1 : answer + 1] != ["user", "assistant"]:
        raise _Unusable(f"the {turn} response does not follow a user turn")
    return tuple(turns[:answer]), turns[answer]["content"]


def _checked(example: Example) -> Example:
    """Refuse what cannot be trained on. An empty generated response is fine: the opponent may stop at once."""
    _check_asked(example.prompt)
    if not example.response.strip():
        raise _Unusable("empty response")
    return example


def _check_asked(prompt: Sequence[Message]) -> None:
    if not prompt[-1]["content"].strip():
        raise _Unusable("empty prompt")


def _turns(row: dict, column: str) -> list[Message]:
    """A column of turns, in role/content (Hugging Face) or from/value (ShareGPT) words, as messages."""
    turns = _field(row, column)
    if turns is None:
        raise _Unusable(f"empty {column}")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{column} must be a list of turns such as {{'role': 'user', 'content': '...'}}")
    messages = []
    for position, turn in enumerate(turns):
        role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
        try:
            role, content = _text(turn, role_key), _text(turn, content_key)
        except UserError as error:
            raise UserError(f"{column}[{position}]: {error}") from None
        if role not in ROLES:
            raise _Unusable(f"a turn with role {role!r}")
        messages.append(_message(ROLES[role], content))
    return messages


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _field(row: dict, name: str) -> object:
    if name not in row:
        raise UserError(f"no field {name!r} (this row has: {', '.join(row)})")
    return row[name]


def _text(row: dict, name: str) -> str:
    value = _field(row, name)
    if value is None:  # a null cell is an empty one
        return ""
    if not isinstance(value, str):
        raise UserError(f"field {name!r} must be text, not {type(value).__name__}")
    return value


def _first_of(row: dict, names: Sequence[str]) -> str:
    for name in names:
        if name in row:
            return name
    raise UserError(f"no field among {', '.join(names)} (this row has: {', '.join(row)})")
