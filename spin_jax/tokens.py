"""The token ids of a run's examples: made once, by all processes together, and kept in the workdir for later starts."""

import contextlib
import hashlib
import importlib.metadata
import io
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from spin_jax import hosts, models
from spin_jax.data import chat as chat_lib
from spin_jax.data.chat import ChatFormat
from spin_jax.data.sources import Example
from spin_jax.errors import UserError
from spin_jax.files import write_whole


class Tokenised(NamedTuple):
    """What of an example is the same in all iterations: int32 ids [tokens] each, not yet cut to a budget.

    Attributes:
        asked: what the opponent is asked with.
        prompt: what precedes a response when policy and opponent are scored.
        real: the human response, with its end.
    """

    asked: np.ndarray
    prompt: np.ndarray
    real: np.ndarray


def tokenise(chat: ChatFormat, example: Example) -> Tokenised:
    """The ids of an example.

    Raises:
        UserError: the template refuses the row; its number is in the message.
    """
    try:
        return Tokenised(
            chat.generation_prompt(example.prompt),
            chat.training_prompt(example.prompt),
            chat.real_response(example.prompt, example.response),
        )
    except UserError as error:
        raise UserError(f"row {example.row}: {error}") from None


def tokenise_once(
    path: epath.Path, directory: epath.Path, template: str, chat: ChatFormat, examples: Sequence[Example]
) -> list[Tokenised]:
    """`tokenise` of each example: read from the file at `path` where it was made of the same, else made and kept there.

    The same are the texts, the files of the tokenizer in `directory`, `template` (`config.data.template`), and the code
    that reads them. Of several processes each makes a share, and the first one writes.
    """
    key = _key(directory, template, examples)
    kept = _read(path, key)
    if all(hosts.gather(kept is not None)):
        return kept
    made = hosts.shared(lambda example: tokenise(chat, example), examples)
    hosts.on_first(lambda: _write(path, key, made))
    return made


def _key(directory: epath.Path, template: str, examples: Sequence[Example]) -> str:
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers")]
    texts = [(e.prompt, e.response) for e in examples]
    made_of = [models.fingerprint(directory, weights=False), template, versions, texts]
    digest = hashlib.sha256(json.dumps(made_of).encode())
    digest.update(pathlib.Path(chat_lib.__file__).read_bytes())
    return digest.hexdigest()


def _read(path: epath.Path, key: str) -> list[Tokenised] | None:
    """What is kept, if it was made of the same; a damaged file is as good as none."""
    with contextlib.suppress(Exception):  # zipfile, zlib, pickle and numpy raise what they like
        with np.load(io.BytesIO(path.read_bytes())) as stored:
            if str(stored["key"]) == key:
                rows = np.split(stored["ids"], np.cumsum(stored["lengths"])[:-1])
                return [Tokenised(*rows[i : i + 3]) for i in range(0, len(rows), 3)]
    return None


def _write(path: epath.Path, key: str, made: Sequence[Tokenised]) -> None:
    rows = [ids for tokens in made for ids in tokens]
    file = io.BytesIO()
    np.savez(file, key=key, lengths=[len(ids) for ids in rows], ids=np.concatenate(rows))
    write_whole(path, file.getvalue())
