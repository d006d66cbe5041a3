"""SFT data from files, saved data sets, the Hub or TFDS, as one kind of `Example` whatever the column layout.

A malformed row (a wrong type, a missing field, broken JSON) stops the load, with the lines of all such rows. A
well-formed row that cannot be trained on (no user turn, a tool's turn, an empty response) is left out, and
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

MANY_SKIPPED = 0.25  # the share of rows left out that is worth a warning

_HALVES = "text that cannot be encoded (half an emoji, say) replaced by U+FFFD"
_NO_ROWS = "there are no rows in it: copy or download it again"

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt x and its human response y, with the opponent's response y' where the source has one.

    Attributes:
        row: 0-based row number in the source, through all of its files; no two examples share one.
        prompt: messages up to and including the user turn that `response` answers.
        response: text of the real response.
        generated: text of the generated response, where the layout has one.
        truncated: the generated response reached the sampling budget, so it has no real end.
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
    """What a source gave: the usable examples and, by row number, what was left out.

    Attributes:
        mended: rows with text that cannot be encoded (see `encodable`).
        unused: columns that no example was made of; keys of turns are written column[].key.
    """

    examples: list[Example] = dataclasses.field(default_factory=list)
    skipped: list[Skip] = dataclasses.field(default_factory=list)
    mended: list[int] = dataclasses.field(default_factory=list)
    unused: list[str] = dataclasses.field(default_factory=list)

    def summary(self, limit: int = 10) -> str:
        """Counts of used and skipped rows, one line per reason with its first `limit` row numbers, and what else was
        noticed."""
        total = len(self.examples) + len(self.skipped)
        lines = [f"{total:,} rows: {len(self.examples):,} used, {len(self.skipped):,} skipped"]
        rows_by_reason = collections.defaultdict(list)
        for skip in self.skipped:
            rows_by_reason[skip.reason].append(skip.row)
        lines += [f"  {reason}: {_listed(rows, limit)}" for reason, rows in rows_by_reason.items()]
        return "\n".join(lines + [f"  {note}" for note in _notes(self.mended, self.unused, limit)])

    def log(self, source: str) -> None:
        """The summary, and a warning if much was left out."""
        _LOG.info("%s: %s", source, self.summary())
        share = len(self.skipped) / max(1, len(self.examples) + len(self.skipped))
        if share >= MANY_SKIPPED:
            _LOG.warning("%s: %.0f%% of the rows cannot be used: %s", source, 100 * share, self._why())

    def refuse_none(self, source: str) -> None:
        """
        Raises:
            UserError: there is no example.
        """
        if not self.examples:
            raise UserError(f"{source}: no row can be used: {self._why() or _NO_ROWS}")

    def _why(self) -> str:
        reasons = collections.Counter(skip.reason for skip in self.skipped)
        return ", ".join(f"{reason} ({count:,} rows)" for reason, count in reasons.most_common())


def _notes(mended: Sequence[int], unused: Sequence[str], limit: int = 10) -> list[str]:
    notes = [f"{_HALVES}: {_listed(mended, limit)}"] if mended else []
    return notes + ([f"columns not used: {', '.join(unused)}"] if unused else [])


def _listed(rows: Sequence[int], limit: int) -> str:
    more = ", ..." if len(rows) > limit else ""
    return f"{len(rows):,} (rows {', '.join(map(str, rows[:limit]))}{more})"


def load_examples(source: str, *, split: str = "train", layout: str = "auto", turn: str = "last") -> Examples:
    """Read SFT data, decided by the form of `source`.

    Args:
        source: a `.jsonl`/`.ndjson`, `.json` (a list) or `.parquet` file (local or gs://); a directory of such files or
            one made by `Dataset.save_to_disk`; `tfds:NAME`; or a Hub id `org/name`, `org/name:config`, `hub:name`.
        split: split of a data set or directory (a single file is one split, whatever this says).
        layout: one of `LAYOUTS`, or "auto" to decide by the columns of each row.
        turn: in a conversation, "last" takes the last turn, an assistant's, as the response and all before it as the
            prompt; "first" takes the first exchange only, as the paper does.

    Raises:
        UserError: the source cannot be read, rows are malformed, or no row at all can be used.
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
    """Read what is to be answered, a prompt a row, from the sources and layouts of `load_examples`; no row needs an
    answer. What was not used or mended of them is logged.

    Returns:
        each row's text or, where the row has several turns or its layout has, those up to the last user turn
        (`turn="first"`: up to the first), as `as_messages` takes them.

    Raises:
        UserError: the source cannot be read, or rows have no prompt. None is left out: answers are told by their order.
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
    """A prompt as messages, in text that can be encoded: a string is one user turn.

    Raises:
        UserError: it is neither a string nor a list of turns of text.
    """
    return _mended(_turns_of(prompt))


def read_prompts(prompts: Sequence[str | Sequence[Message]]) -> list[list[Message]]:
    """`as_messages` of each; it is logged where text was mended.

    Raises:
        UserError: prompts are none; it names them by their positions.
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
        raise UserError("it ends in the assistant's turn: end it with the user's, which is what is answered")
    return turns


def encodable(text: str) -> str:
    """The text with U+FFFD for each half of a character (a surrogate without the other one), which no encoding has."""
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
    """(train, held out): disjoint, each in source order, the first of `drawn`; rows in `without` are passed over.

    The held-out rows do not depend on `train_rows` (0: all the others), and a smaller training set is part of a larger.
    """
    usable = [example for example in drawn(examples, seed) if example.row not in without]
    if not 0 <= eval_rows < len(usable):
        raise UserError(f"cannot hold out {eval_rows} of {len(usable)} examples: lower --config.data.eval_rows")
    train, held_out = usable[eval_rows:][: train_rows or None], usable[:eval_rows]
    return sorted(train, key=lambda example: example.row), sorted(held_out, key=lambda example: example.row)


def drawn(examples: Sequence[Example], seed: int) -> list[Example]:
    """The examples in the order in which they are drawn: one permutation, seeded with `seed`."""
    return [examples[i] for i in np.random.default_rng(seed).permutation(len(examples))]


def _check_options(layout: str, turn: str) -> None:
    if layout != "auto" and layout not in LAYOUTS:
        raise UserError(f"unknown data layout {layout!r}: write auto or one of {', '.join(LAYOUTS)}")
    if turn not in ("last", "first"):
        raise UserError(f"unknown turn {turn!r}: write 'last' or 'first'")


# ---- one row


def _open(row: object, layout: str, known: str | None, answered: bool = True) -> tuple[Fields, str, list[Message]]:
    """A row's fields, its layout and its turns, which end in an answer if `answered`; `known` is the layout of an
    earlier row, by which a row that fits none is told what it lacks."""
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
    return Example(index, prompt, response, generated, truncated)  # of an opponent that stopped at once it is empty


def _check_asked(prompt: Sequence[Message]) -> None:
    if not prompt[-1]["content"].strip():
        raise Unusable("empty prompt")
