"""Text to token ids and back. Text of the data that reads like a special token stays text.

A fast tokenizer makes a special token of each place where a text has its name, whoever wrote it there. So `hide` puts a
stand-in for each name that the data's text has, and the template is rendered with those. The names in what it renders
are then its own. `encode` swaps the two: the data has its names back, the template's are stand-ins, and the whole text
goes to a copy of the tokenizer that knows special tokens by their stand-ins alone. A text without stand-ins, as nearly
all are, goes to the tokenizer as it is.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from spin_jax.data.tokenizer import backend
from spin_jax.errors import UserError

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerBase

_MARK = "\U0010ffff"  # begins and ends a stand-in; Unicode keeps it out of all texts that are exchanged


class BeyondVocabulary(UserError):
    """The tokenizer and the model are not of one kind: a row that shows it is not at fault."""


@dataclasses.dataclass(frozen=True, eq=False)
class Codec:
    """A tokenizer, with what it must not read into the data's text.

    Attributes:
        tokenizer: a fast one.
        kept: ids of added tokens whose names stay text in the data; none with `config.data.parse_special_tokens`.
        silent: ids that a response's text does not show.
        vocab_size: of the model; no id may be as large. None: not known.
    """

    tokenizer: "PreTrainedTokenizerBase"
    kept: frozenset[int] = frozenset()
    silent: frozenset[int] = frozenset()
    vocab_size: int | None = None

    def hide(self, text: str) -> str:
        """A text of the data with stand-ins for the names of special tokens."""
        return self._pattern.sub(lambda found: self._names.get(found[0], "\ufffd"), text) if self._names else text

    def encode(self, text: str) -> list[int]:
        """The ids of a text in which what is from the data went through `hide`; nothing is added to them.

        Raises:
            BeyondVocabulary: the model has no embedding for an id.
        """
        return _encode(self, text)

    def encode_after(self, before: str, text: str) -> list[int]:
        """Ids of `text` as it stands after `before`; if a token would straddle the two, which no model asked with
        `before` could write, then of `text` alone."""
        start, ids = self.encode(before), self.encode(before + text)
        return ids[len(start) :] if ids[: len(start)] == start else self.encode(text)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of sampled ids, as it was written."""
        shown = [i for i in map(int, ids) if i not in self.silent]
        return str(self.tokenizer.decode(shown, clean_up_tokenization_spaces=False))

    def check(self, ids: Iterable[int]) -> None:
        """Refuse ids that the model has no embedding for: gathered on a device they would be other tokens, or NaN.

        Raises:
            BeyondVocabulary: the first of them, and the token that it stands for.
        """
        size = self.vocab_size
        if size is not None and (beyond := [i for i in ids if i >= size]):
            token = self.tokenizer.convert_ids_to_tokens(beyond[0])
            raise BeyondVocabulary(
                f"token {token!r} has the id {beyond[0]}, but the model's vocabulary ends at {size - 1} "
                f"(vocab_size={size} in config.json): use the tokenizer that the model was trained with, or "
                "give the model an embedding for it (resize_token_embeddings of transformers) and fine-tune it"
            )

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        """The name of each token that is kept -> its stand-in."""
        added = self.tokenizer.added_tokens_decoder
        return {added[i].content: f"{_MARK}{i}{_MARK}" for i in sorted(self.kept)}

    @functools.cached_property
    def _pattern(self) -> re.Pattern:
        longest_first = sorted(self._names, key=len, reverse=True)  # as tokenizers choose
        return re.compile("|".join(map(re.escape, [*longest_first, _MARK])))

    @functools.cached_property
    def _swaps(self) -> Callable[[str], str]:
        """Stand-ins for names, and names for stand-ins."""
        other = self._names | {stand_in: name for name, stand_in in self._names.items()}
        pattern = re.compile(f"{_MARK}[0-9]+{_MARK}|{self._pattern.pattern}")
        return lambda text: pattern.sub(lambda found: other.get(found[0], "\ufffd"), text)

    @functools.cached_property
    def _by_stand_ins(self) -> "tokenizers.Tokenizer":
        """A copy of the tokenizer to which tokens that are kept are known by their stand-ins."""
        import tokenizers

        described = json.loads(backend(self.tokenizer).to_str())
        described |= {"post_processor": None, "truncation": None, "padding": None}
        for token in described["added_tokens"]:
            if stand_in := self._names.get(token["content"]):  # the token whatever stands beside it
                token |= {"content": stand_in, "normalized": False, "single_word": False}
        _rename(described["model"], self._names)
        return tokenizers.Tokenizer.from_str(json.dumps(described))


@functools.lru_cache(maxsize=1)  # a row's prompt is asked for three times in a row: to ask, to score, to stand before
def _encode(codec: Codec, text: str) -> list[int]:
    if _MARK in text:
        ids = codec._by_stand_ins.encode(codec._swaps(text), add_special_tokens=False).ids
    else:
        # verbose=False: a text longer than the model's window is no news here, `fit` cuts it.
        ids = codec.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    codec.check(ids)
    return ids


def _rename(model: dict, names: dict[str, str]) -> None:
    """Renames pieces in a described model, so that a kept token has its id and its name is a text like any other."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in vocabulary.items()}
    else:  # of a Unigram
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):
        pairs = ((merge, merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"])
        model["merges"] = [merge for merge, (left, right) in pairs if not {left, right, left + right} & names.keys()]
