"""SFT data from files, saved data sets, the Hub or TFDS, as one kind of `Example` whatever the column layout.

A malformed row (a wrong type, a missing field, broken JSON) stops the load with its file and line. A well-formed row
that cannot be trained on (no user turn, an empty response) is left out, and `Examples.summary()` names it.
"""

import collections
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from etils import epath

from spin_jax.errors import UserError

QUESTIONS = ("prompt", "question", "instruction", "query")
ANSWERS = ("response", "completion", "answer", "output")
ACCEPTED_COLUMNS = (
    "messages (role/content), conversations (from/value), real + generated, "
    f"instruction [+ input] + output, or one of {'/'.join(QUESTIONS)} + one of {'/'.join(ANSWERS)}"
)
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
FILE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
SPLIT_NAMES = r"(train|test|validation|valid|val|dev|eval)([_.-]|$)"

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
    if layout != "auto" and layout not in LAYOUTS:
        raise UserError(f"unknown data layout {layout!r}: write auto or one of {', '.join(LAYOUTS)}")
    if turn not in ("last", "first"):
        raise UserError(f"unknown turn {turn!r}: write 'last' or 'first'")
    found = Examples([], [])
    for index, (where, row) in enumerate(_read_rows(source, split)):
        if not isinstance(row, dict):
            raise UserError(f"{where}: a row must be an object with named fields, not {type(row).__name__}")
        if layout == "auto":
            layout = detect_layout(list(row), where)
        try:
            found.examples.append(_checked(LAYOUTS[layout](row, index, turn)))
        except _Unusable as reason:
            found.skipped.append(Skip(index, str(reason)))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    if not found.examples:
        reasons = collections.Counter(skip.reason for skip in found.skipped)
        why = ", ".join(f"{reason} ({count:,} rows)" for reason, count in reasons.items())
        raise UserError(f"{source}: no row can be used: {why or 'there are no rows'}")
    return found


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


# ---- layouts: one row -> Example


def detect_layout(columns: Sequence[str], where: str) -> str:
    """Name of the layout that these columns fit, the most specific first. `where` names the row in the error."""
    names = set(columns)
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
    prompt = _text(row, _first_of(row, QUESTIONS))
    return Example(index, (_message("user", prompt),), _text(row, _first_of(row, ANSWERS)))


def _read_alpaca(row: dict, index: int, turn: str) -> Example:
    prompt = _text(row, "instruction")
    # Exporters leave `input` out of rows that have none, so the field is optional row by row.
    context = _text(row, "input") if "input" in row else ""
    if context.strip():
        prompt = f"{prompt}\n\n{context}"
    return Example(index, (_message("user", prompt),), _text(row, _first_of(row, ("output", "response"))))


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
    if not example.prompt[-1]["content"].strip():
        raise _Unusable("empty prompt")
    if not example.response.strip():
        raise _Unusable("empty response")
    return example


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


# ---- sources: a string -> (where, row) one after another


def _read_rows(source: str, split: str) -> Iterator[tuple[str, object]]:
    if source.startswith("tfds:"):
        return _read_tfds(source.removeprefix("tfds:"), split)
    if source.startswith("hub:"):
        return _read_hub(source.removeprefix("hub:"), split)
    path = epath.Path(source).expanduser()
    if path.is_dir():
        return _read_directory(path, split)
    if path.exists():
        return _read_file(path)
    if path.suffix in FILE_SUFFIXES or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source):
        raise UserError(f"{source}: no such file or directory (a Hub data set is written org/name or hub:name)")
    return _read_hub(source, split)


def _read_file(path: epath.Path) -> Iterator[tuple[str, object]]:
    if path.suffix not in FILE_SUFFIXES:
        raise UserError(f"{path}: cannot tell what this file is; name it {', '.join(FILE_SUFFIXES)}")
    return {".json": _read_json, ".parquet": _read_parquet}.get(path.suffix, _read_json_lines)(path)


def _read_json_lines(path: epath.Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # JSONDecodeError or UnicodeDecodeError
                raise UserError(f"{path}:{number}: not valid JSON: {error}") from None
            yield f"{path}:{number}", row


def _read_json(path: epath.Path) -> Iterator[tuple[str, object]]:
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error} (one object a line? then name it .jsonl)") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: must hold a list of rows, not {type(rows).__name__}")
    for index, row in enumerate(rows):
        yield f"{path} row {index}", row


def _read_parquet(path: epath.Path) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    with path.open("rb") as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path}: not a Parquet file: {error}") from None
        index = 0
        for batch in table.iter_batches(batch_size=4096):
            for row in batch.to_pylist():
                yield f"{path} row {index}", row
                index += 1


def _read_directory(path: epath.Path, split: str) -> Iterator[tuple[str, object]]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _read_saved_dataset(path, split)
    folders = [folder for folder in (path, path / "data") if folder.is_dir()]
    files = sorted(file for folder in folders for file in folder.iterdir() if file.suffix in FILE_SUFFIXES)
    # train_sft-00000-of-00003.parquet is one shard of train_sft
    stems = {file: re.sub(r"-\d+-of-\d+.*", "", file.stem) for file in files}
    chosen = [file for file in files if stems[file] == split]
    variants = {stem for stem in stems.values() if re.match(rf"{re.escape(split)}[_.-]", stem)}
    if not chosen and len(variants) == 1:  # train_small.jsonl alone is the train split; train_sft with train_gen is not
        chosen = [file for file in files if stems[file] in variants]
    # Files that name no split at all are training data, as on the Hub.
    if split == "train" and not any(re.match(SPLIT_NAMES, stem) for stem in stems.values()):
        chosen = files
    if not chosen:
        names = ", ".join(file.name for file in files) or "none"
        raise UserError(f"{path}: no {'/'.join(FILE_SUFFIXES)} file of split {split!r}; files there: {names}")
    return (row for file in chosen for row in _read_file(file))


def _read_saved_dataset(path: epath.Path, split: str) -> Iterator[tuple[str, object]]:
    import datasets

    data = datasets.load_from_disk(str(path))
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(f"{path}: no split {split!r}; there are: {', '.join(data)}")
        data = data[split]
    return ((f"{path} row {index}", row) for index, row in enumerate(data))


def _read_hub(name: str, split: str) -> Iterator[tuple[str, object]]:
    import datasets

    repository, _, config = name.partition(":")
    try:
        data = datasets.load_dataset(repository, config or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # a RuntimeError: the data set is a script
        raise UserError(f"{name}: the Hub gave no split {split!r}: {_hub_advice(error)}") from error
    return ((f"{name} row {index}", row) for index, row in enumerate(data))


def _hub_advice(error: Exception) -> str:
    message = " ".join(str(error).split())
    if "gated" in message or "authenticated" in message:
        return "ask for access on its page, then run `hf auth login`"
    if isinstance(error, FileNotFoundError) and "offline" not in message.lower():
        return f"no such data set or local path ({message})"
    if isinstance(error, OSError):
        return "it cannot be reached from here; download the data set once and give its local path"
    return message


def _read_tfds(name: str, split: str) -> Iterator[tuple[str, object]]:
    try:
        import tensorflow_datasets
    except ImportError:
        raise UserError("reading tfds:... needs TensorFlow Datasets: pip install 'spin_jax[tfds]'") from None
    try:
        data = tensorflow_datasets.data_source(name, split=split)
    # No network or disk; a server that refuses; no such data set, configuration or split; data that was prepared
    # earlier in a format that cannot be read row by row. All else is a bug, and shown as one.
    except (OSError, tensorflow_datasets.download.DownloadError, ValueError, NotImplementedError) as error:
        advice = str(error).partition("\n")[0]  # the lines after it list every data set there is
        raise UserError(f"tfds:{name}: cannot load split {split!r}: {advice}") from error
    rows = (data[index] for index in range(len(data)))
    return (
        (f"tfds:{name} row {index}", {column: _plain(value) for column, value in row.items()})
        for index, row in enumerate(rows)
    )


def _plain(value: object) -> object:
    """A TFDS value as JSON would give it: text for bytes, a list of turns for TFDS's one dict of lists."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        columns = [_plain(column) for column in value.values()]
        return [dict(zip(value, turn, strict=True)) for turn in zip(*columns, strict=True)]
    return value
