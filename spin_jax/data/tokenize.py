"""Tokenise a run's examples: once, by all processes together. Keep the ids in the workdir for later starts."""

import contextlib
import hashlib
import importlib.metadata
import inspect
import io
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from spin_jax import checkpoints
from spin_jax.data import chat_format as chat_lib
from spin_jax.data import codec, tokenizer
from spin_jax.data import template as template_lib
from spin_jax.data.chat_format import ChatFormat
from spin_jax.data.sources import Example, Skip
from spin_jax.errors import UserError
from spin_jax.runtime import multihost
from spin_jax.runtime.files import write_whole


class Tokenised(NamedTuple):
    """The ids of an example that are the same in all iterations: int32 [tokens] each, not yet cut to a budget.

    Attributes:
        asked: the prompt that the opponent is asked with.
        prompt: the prompt that precedes a response when policy and opponent are scored.
        real: the human response, with its end.
    """

    asked: np.ndarray
    prompt: np.ndarray
    real: np.ndarray

    @property
    def longest_prompt(self) -> int:
        """Number of tokens in the longer one of `asked` and `prompt`."""
        return max(len(self.asked), len(self.prompt))


def tokenise(chat: ChatFormat, example: Example) -> Tokenised:
    """Tokenise an example.

    Raises:
        UserError: the template refuses the row; its number is in the message.
    """
    tokens = _tokenise(chat, example)
    if isinstance(tokens, Skip):
        raise UserError(f"row {tokens.row}: {tokens.reason}")
    return tokens


def _tokenise(chat: ChatFormat, example: Example) -> Tokenised | Skip:
    try:
        return Tokenised(
            chat.generation_prompt(example.prompt),
            chat.training_prompt(example.prompt),
            chat.real_response(example.prompt, example.response),
        )
    except codec.BeyondVocabulary as error:  # the tokenizer does not fit the model: do not go on without this row
        raise UserError(f"row {example.row}: {error}") from None
    except UserError as error:
        return Skip(example.row, str(error))


def tokenise_once(
    path: epath.Path,
    directory: epath.Path,
    template: str,
    chat: ChatFormat,
    examples: Sequence[Example],
    enough: int | None = None,
) -> list[Tokenised | Skip]:
    """Tokenise each example, or say why the template refuses it. Each process makes a share, and process 0 writes.

    Read the ids from the file at `path`, if that was made from the same texts, tokenizer, template and code. Else make
    them, and write them there.

    Args:
        directory: of the tokenizer.
        template: `config.data.template`.
        enough: stop after so many examples were tokenised; None is all.
    """
    key = _key(directory, template, chat, examples, enough)
    kept = _read(path, key, examples)
    if all(multihost.gather(kept is not None)) and kept is not None:
        return kept
    made: list[Tokenised | Skip] = []
    wanted = missing = len(examples) if enough is None else enough
    while missing and (next_ones := examples[len(made) :][:missing]):
        made += multihost.parallel_map(lambda example: _tokenise(chat, example), next_ones)
        missing = wanted - sum(isinstance(tokens, Tokenised) for tokens in made)
    multihost.on_process_zero(lambda: _write(path, key, made))
    return made


def _key(
    directory: epath.Path, template: str, chat: ChatFormat, examples: Sequence[Example], enough: int | None
) -> str:
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers")]
    texts = [(e.prompt, e.response) for e in examples]
    found = [chat.stop_ids, sorted(chat.codec.kept), chat.codec.vocab_size]
    made_of = [checkpoints.fingerprint(directory, weights=False), template, found, versions, enough, texts]
    digest = hashlib.sha256(json.dumps(made_of).encode())
    for module in (chat_lib, codec, template_lib, tokenizer):
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()


def _read(path: epath.Path, key: str, examples: Sequence[Example]) -> list[Tokenised | Skip] | None:
    """Read the file; None if it is missing or damaged, or has another key."""
    with contextlib.suppress(Exception):  # zipfile, zlib, pickle and numpy raise what they like
        with np.load(io.BytesIO(path.read_bytes())) as stored:
            if str(stored["key"]) == key:
                rows = np.split(stored["ids"], np.cumsum(stored["lengths"])[:-1])
                refused = json.loads(str(stored["refused"]))
                made: list[Tokenised | Skip] = [Tokenised(*rows[i : i + 3]) for i in range(0, len(rows), 3)]
                for position, reason in refused.items():
                    made[int(position)] = Skip(examples[int(position)].row, reason)
                return made
    return None


def _write(path: epath.Path, key: str, made: Sequence[Tokenised | Skip]) -> None:
    refused = {position: tokens.reason for position, tokens in enumerate(made) if isinstance(tokens, Skip)}
    nothing = Tokenised(*[np.zeros(0, np.int32)] * 3)
    rows = [ids for tokens in made for ids in (nothing if isinstance(tokens, Skip) else tokens)]
    file = io.BytesIO()
    lengths = [len(ids) for ids in rows]
    np.savez(file, key=key, refused=json.dumps(refused), lengths=lengths, ids=np.concatenate(rows))
    write_whole(path, file.getvalue())
