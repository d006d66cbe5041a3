"""Read SFT data from files, saved data sets, the Hub or TFDS into `Example`s, whatever the column layout.

A malformed row (a wrong type, a missing field, broken JSON) stops the load; the message names all such rows. A
well-formed row that cannot be trained on (no user turn, a tool's turn, an empty response) is skipped;
`Examples.summary()` names it.
"""

import collections
import dataclasses
import logging
from collections.abc import Collection, Sequence

import numpy as np

from spin_jax.data.layouts import LAYOUTS
from spin_jax.data.layouts.columns import UNWANTED, Fields, Unusable, refuse_kinds
from spin_jax.data.layouts.interface import detect_layout
from spin_jax.data.layouts.turns import Message, asked, exchange, message, read_turns
from spin_jax.data.rows import Mistakes, make_all, read_rows
from spin_jax.errors import UserError

MANY_SKIPPED = 0.25  # warn when this share of the rows is skipped

_MENDED = "text that cannot be encoded (half an emoji, say) replaced by U+FFFD"
_NO_ROWS = "there are no rows in it: copy or download it again"

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt x and its human response y, with the opponent's response y' where the source has one.

    Attributes:
        row: 0-based row number in the source, counted through all of its files.
        prompt: messages up to and including the user turn that `response` answers.
        response: text of the real response.
        generated: text of the generated response; None where the layout has none.
        truncated: whether the sampling budget ended the generated response, which then has no real end.
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
    """The usable examples of a source, and what was noticed while reading it.

    Attributes:
        examples: in the source's order.
        skipped: rows that were left out.
        mended: numbers of rows whose text could not be encoded (see `encodable`).
        unused: columns that were not read. A key of a column's turns is written column[].key.
    """

    examples: list[Example] = dataclasses.field(default_factory=list)
    skipped: list[Skip] = dataclasses.field(default_factory=list)
    mended: list[int] = dataclasses.field(default_factory=list)
    unused: list[str] = dataclasses.field(default_factory=list)

    def summary(self, limit: int = 10) -> str:
        """Return lines for the log: how many rows are used and skipped, each reason with its first `limit` row numbers,
        mended rows, and unused columns."""
        total = len(self.examples) + len(self.skipped)
        lines = [f"{total:,} rows: {len(self.examples):,} used, {len(self.skipped):,} skipped"]
        rows_by_reason = collections.defaultdict(list)
        for skip in self.skipped:
            rows_by_reason[skip.reason].append(skip.row)
        lines += [f"  {reason}: {_listed(rows, limit)}" for reason, rows in rows_by_reason.items()]
        return "\n".join(lines + [f"  {note}" for note in _notes(self.mended, self.unused, limit)])

    def log(self, source: str) -> None:
        """Log the summary, and warn if many rows are skipped."""
        _LOG.info("%s: %s", source, self.summary())
        share = len(self.skipped) / max(1, len(self.examples) + len(self.skipped))
        if share >= MANY_SKIPPED:
            _LOG.warning("%s: %.0f%% of the rows cannot be used: %s", source, 100 * share, self._why())

    def refuse_none(self, source: str) -> None:
        """Refuse a source without a usable row.

        Raises:
            UserError: with the reasons for which rows were skipped.
        """
        if not self.examples:
            raise UserError(f"{source}: no row can be used: {self._why() or _NO_ROWS}")

    def _why(self) -> str:
        reasons = collections.Counter(skip.reason for skip in self.skipped)
        return ", ".join(f"{reason} ({count:,} rows)" for reason, count in reasons.most_common())


def _notes(mended: Sequence[int], unused: Sequence[str], limit: int = 10) -> list[str]:
    notes = [f"{_MENDED}: {_listed(mended, limit)}"] if mended else []
    return notes + ([f"columns not used: {', '.join(unused)}"] if unused else [])


def _listed(rows: Sequence[int], limit: int) -> str:
    more = ", ..." if len(rows) > limit else ""
    return f"{len(rows):,} (rows {', '.join(map(str, rows[:limit]))}{more})"


def load_examples(source: str, *, split: str = "train", layout: str = "auto", turn: str = "last") -> Examples:
    """Read SFT data.

    Args:
        source: a `.jsonl`/`.ndjson`, `.json` (a list) or `.parquet` file (local or gs://); a directory of such files or
            one made by `Dataset.save_to_disk`; `tfds:NAME`; or a Hub id `org/name`, `org/name:config`, `hub:name`.
        split: split of a data set or directory (a single file is one split, whatever this says).
        layout: one of `LAYOUTS`, or "auto" to choose by each row's columns.
        turn: which answer of a conversation is the response. "last": the last turn, with all turns before it as the
            prompt. "first": the first answer, with the turns up to it, as in the paper.

    Raises:
        UserError: the source cannot be read, a row is malformed, or no row can be used.
    """
    _check_options(layout, turn)
    found, mistakes, unused, known = Examples(), Mistakes(), {}, None
    for index, (place, row) in enumerate(read_rows(source, split)):
        try:
            fields, known, turns = _open(row, layout, known)
            example = _read_example(index, fields, known, turns, turn)
        except Unusable as reason:
            found.skipped.append(Skip(index, str(reason)))
        except UserError as error:
            mistakes.add(place, error)
        else:
            unused |= dict.fromkeys(fields.unused())
            found.examples.append(_encodable(example))
            found.mended.extend([index] if found.examples[-1] != example else [])
    mistakes.refuse()
    found.refuse_none(source)
    found.unused.extend(unused)
    return found


def load_prompts(
    source: str, *, split: str = "train", layout: str = "auto", turn: str = "last"
) -> list[str | list[Message]]:
    """Read prompts, one a row, from the sources and layouts of `load_examples`. Rows need no response.

    Log unused columns and mended rows. Skip no row: the order of the answers says which prompt each belongs to.

    Returns:
        for each row, its text, or a list of turns where the layout has turns or the row has several. They end in the
        last user turn, or with `turn="first"` in the first one. `as_messages` takes both.

    Raises:
        UserError: the source cannot be read, or a row has no prompt.
    """
    _check_options(layout, turn)
    prompts: list[str | list[Message]] = []
    mistakes, unused, mended, known = Mistakes(), {}, [], None
    for index, (place, row) in enumerate(read_rows(source, split)):
        try:
            fields, known, turns = _open(row, layout, known, answered=False)
            turns = asked(turns, "last" if LAYOUTS[known].generated else turn)
            _check_asked(turns)
        except (Unusable, UserError) as error:
            mistakes.add(place, error)
            continue
        unused |= dict.fromkeys(fields.unused())
        messages = _mended(turns)
        mended += [index] if messages != turns else []
        is_text = LAYOUTS[known].is_text and len(messages) == 1
        prompts.append(messages[0]["content"] if is_text else messages)
    mistakes.refuse()
    if not prompts:
        raise UserError(f"{source}: {_NO_ROWS}")
    for note in _notes(mended, list(unused)):
        _LOG.info("%s: %s", source, note)
    return prompts


def as_messages(prompt: str | Sequence[Message]) -> list[Message]:
    """Turn a prompt into messages with text that can be encoded; a string becomes one user turn.

    Raises:
        UserError: it is neither a string nor a list of turns of text, or it does not end in a user turn.
    """
    return _mended(_turns_of(prompt))


def read_prompts(prompts: Sequence[str | Sequence[Message]]) -> list[list[Message]]:
    """Apply `as_messages` to each prompt, and log which of them were mended.

    Raises:
        UserError: `as_messages` refuses some; it names all of them by their positions.
    """
    if isinstance(prompts, str):
        raise UserError("prompts must be a list: write [prompt] for one")
    given = make_all(_turns_of, prompts, "prompt ")
    read = list(map(_mended, given))
    for note in _notes([index for index, turns in enumerate(read) if turns != given[index]], []):
        _LOG.warning("prompts: %s", note)
    return read


def _turns_of(prompt: str | Sequence[Message]) -> list[Message]:
    given = list(prompt) if isinstance(prompt, tuple) else prompt
    try:
        turns = [message("user", given)] if isinstance(given, str) else read_turns(Fields({"prompt": given}), "prompt")
        _check_asked(turns)
    except Unusable as reason:
        raise UserError(f"{reason} cannot be asked") from None
    if turns[-1]["role"] != "user":
        raise UserError("it ends in the assistant's turn: end it with the user's turn, which is to be answered")
    return turns


def encodable(text: str) -> str:
    """Replace lone surrogates, halves of a character that no encoding can write, by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _mended(turns: Sequence[Message]) -> list[Message]:
    return [message(turn["role"], encodable(turn["content"])) for turn in turns]


def _encodable(example: Example) -> Example:
    generated = None if example.generated is None else encodable(example.generated)
    response = encodable(example.response)
    return dataclasses.replace(example, prompt=tuple(_mended(example.prompt)), response=response, generated=generated)


def split_examples(
    examples: Sequence[Example], eval_rows: int, seed: int, train_rows: int = 0, without: Collection[int] = ()
) -> tuple[list[Example], list[Example]]:
    """Split examples into (train, held out), each in source order.

    Take them in the order of `drawn`: first the held-out rows, then the training rows. So the held-out rows do not
    depend on `train_rows`, and a smaller training set is part of a larger one.

    Args:
        eval_rows: how many to hold out.
        train_rows: how many to train on; 0 is all the others.
        without: rows to pass over.

    Raises:
        UserError: nothing is left to train on.
    """
    usable = [example for example in drawn(examples, seed) if example.row not in without]
    if not 0 <= eval_rows < len(usable):
        raise UserError(f"cannot hold out {eval_rows} of {len(usable)} examples: lower --config.data.eval_rows")
    train, held_out = usable[eval_rows:][: train_rows or None], usable[:eval_rows]
    return sorted(train, key=lambda example: example.row), sorted(held_out, key=lambda example: example.row)


def drawn(examples: Sequence[Example], seed: int) -> list[Example]:
    """Return the examples in the order in which `split_examples` draws them: a permutation that `seed` decides."""
    return [examples[i] for i in np.random.default_rng(seed).permutation(len(examples))]


def _check_options(layout: str, turn: str) -> None:
    if layout != "auto" and layout not in LAYOUTS:
        raise UserError(f"unknown data layout {layout!r}: write auto or one of {', '.join(LAYOUTS)}")
    if turn not in ("last", "first"):
        raise UserError(f"unknown turn {turn!r}: write 'last' or 'first'")


# ---- one row


def _open(row: object, layout: str, known: str | None, answered: bool = True) -> tuple[Fields, str, list[Message]]:
    """Return a row's fields, its layout and its turns. They end in an answer if `answered`.

    Args:
        known: layout of an earlier row. A row that fits no layout is read with it, so that the message says what the
            row lacks.
    """
    if isinstance(row, UserError):
        raise row
    if not isinstance(row, dict):
        raise UserError(f"a row must be an object with named fields, not {type(row).__name__}")
    fields = Fields(row)
    known = detect_layout(fields, answered, known) if layout == "auto" else layout
    refuse_kinds(fields, "row")
    return fields, known, LAYOUTS[known].turns(fields, answered)


def _read_example(index: int, fields: Fields, layout: str, turns: Sequence[Message], turn: str) -> Example:
    for name in UNWANTED:
        if fields.values.get(name) is False:
            raise Unusable(f"a response marked as unwanted ({name} is false)")
    read_generated = LAYOUTS[layout].generated
    prompt, response = exchange(fields, turns, "last" if read_generated else turn)
    _check_asked(prompt)
    if not response.strip():
        raise Unusable("empty response")
    if not read_generated:
        return Example(index, prompt, response)
    generated_turns, truncated = read_generated(fields)
    generated_prompt, generated = exchange(fields, generated_turns, "last")
    if prompt != generated_prompt:
        raise Unusable("real and generated answer different prompts")
    return Example(index, prompt, response, generated, truncated)  # an opponent may stop at once: empty is right


def _check_asked(prompt: Sequence[Message]) -> None:
    if not prompt[-1]["content"].strip():
        raise Unusable("empty prompt")
