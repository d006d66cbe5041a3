"""Pairs, each a prompt with its responses: as token ids, and on disk in the authors' Parquet layout."""

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

import numpy as np
from etils import epath

from spin_jax.data.sources import Example
from spin_jax.errors import UserError
from spin_jax.runtime.files import reading, write_whole

_MODEL = b"spin_jax_model"  # in a pairs file's metadata


@dataclasses.dataclass(frozen=True)
class Pair:
    """One prompt x with its responses, as int32 ids of shape [tokens].

    Attributes:
        row: row number of the example in its source.
        iteration: self-play iteration t whose opponent wrote the generated response; -1 without one.
        prompt: x, within the prompt budget.
        responses: in the order of the objective's names; for SPIN the real response y and the generated y'. A response
            has a stop id only if it really ended.
        truncated: for each response, whether a budget ended it, so that it has no stop id.
    """

    row: int
    iteration: int
    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    truncated: tuple[bool, ...]


TokenIds = Sequence[int] | np.ndarray  # of one text


def token_ids(ids: TokenIds, vocab_size: int, what: str) -> np.ndarray:
    """Check a caller's token ids, and return them as int32 [tokens].

    Raises:
        UserError: there are none, or one is beyond the vocabulary, and would become another token, or NaN, on a device.
    """
    array = np.asarray(ids)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise UserError(f"{what} must be a list of token ids, one at least")
    if not 0 <= array.min() <= array.max() < vocab_size:
        raise UserError(f"{what} has token ids {array.min()} to {array.max()}: the model's are 0 to {vocab_size - 1}")
    return array.astype(np.int32)


RESPONSES = ("real", "generated")  # the responses of a run's pairs, in order
ALL_RESPONSES = (*RESPONSES, "proto")  # self_play.pairs.with_proto adds the last, if an objective needs it


def choose(pair: Pair, names: Sequence[str]) -> Pair:
    """Return the pair with only those of its responses that are named (names of ALL_RESPONSES)."""
    places = [ALL_RESPONSES.index(name) for name in names]
    responses, truncated = (tuple(values[i] for i in places) for values in (pair.responses, pair.truncated))
    return dataclasses.replace(pair, responses=responses, truncated=truncated)


def whole_sequence(pair: Pair) -> Pair:
    """Return a pair whose prompt is the first token, and whose response is all that follows: the rest of the prompt and
    the real response. Training on it learns the prompt, too."""
    tokens = np.concatenate([pair.prompt, pair.responses[0]])
    return dataclasses.replace(pair, prompt=tokens[:1], responses=(tokens[1:],), truncated=pair.truncated[:1])


def write_pairs_parquet(
    path: epath.PathLike,
    examples: Sequence[Example],
    columns: Mapping[str, Sequence] | None = None,
    model: Mapping[str, str] | None = None,
) -> None:
    """Write examples with generated responses in the authors' layout (data sets UCLA-AGI/SPIN_iter0 to 3).

    Columns `real` and `generated` are lists of {"role", "content"} turns: the prompt's, then the response. Columns of
    our own are `row`, `generated_truncated`, and those of `columns`. The file is written whole or not at all.
    `load_examples` reads it back.

    Args:
        columns: name -> a value for each example, such as the sampled ids.
        model: identifies the model that wrote the responses; stored in the file's metadata.
    """
    import pyarrow
    import pyarrow.parquet

    turns = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))

    def conversations(responses: Sequence[str]) -> pyarrow.Array:
        answers = ({"role": "assistant", "content": response} for response in responses)
        return pyarrow.array([[*e.prompt, answer] for e, answer in zip(examples, answers, strict=True)], turns)

    table = pyarrow.table(
        {
            "real": conversations([example.response for example in examples]),
            "generated": conversations([example.generated or "" for example in examples]),
            "row": pyarrow.array([example.row for example in examples], pyarrow.int64()),
            "generated_truncated": pyarrow.array([example.truncated for example in examples], pyarrow.bool_()),
            **(columns or {}),
        }
    )
    if model:
        table = table.replace_schema_metadata({_MODEL: json.dumps(dict(model))})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    write_whole(path, file.getvalue())


def read_sampled(path: epath.PathLike) -> dict[int, list[tuple[np.ndarray, bool]]]:
    """Read the sampled token ids from a pairs file of a run: {row: [(token ids, truncated), ...]}.

    Raises:
        UserError: the file is damaged.
    """
    import pyarrow.parquet

    columns = ["row", "generated_tokens", "generated_truncated"]
    with _reading(path) as file:
        table = pyarrow.parquet.read_table(file, columns=columns).to_pydict()
        sampled: dict[int, list[tuple[np.ndarray, bool]]] = {}
        for row, tokens, truncated in zip(*(table[column] for column in columns), strict=True):
            sampled.setdefault(row, []).append((np.array(tokens, np.int32), truncated))
    return sampled


def read_model(path: epath.PathLike) -> dict[str, str]:
    """Read what identifies the model that wrote a pairs file's responses; empty if the file does not say."""
    import pyarrow.parquet

    with _reading(path) as file:
        return json.loads((pyarrow.parquet.read_schema(file).metadata or {}).get(_MODEL, "{}"))


@contextlib.contextmanager
def _reading(path: epath.PathLike) -> Iterator[IO]:
    with reading(path, "delete it, and the generate stage makes it anew"), epath.Path(path).open("rb") as file:
        yield file
