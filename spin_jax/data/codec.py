"""Turn text into token ids and back. Keep "</s>" in the data's text as text: only the template writes special tokens.

A fast tokenizer reads the name of a special token as that token, whoever wrote it. So the names are kept apart:

1. `hide` replaces each name in the data's text by a stand-in, before the template is rendered with it. All names in the
   rendered text are then the template's.
2. `encode` swaps the two: stand-ins become names again, and the template's names become stand-ins.
3. A copy of the tokenizer, whose special tokens are called by their stand-ins, encodes the result.

Nearly all texts contain no stand-in. The tokenizer itself encodes those.
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

_MARK = "\U0010ffff"  # begins and ends a stand-in; a noncharacter, which Unicode keeps out of exchanged text


class BeyondVocabulary(UserError):
    """The tokenizer has an id for which the model has no embedding. No row is at fault, so it stops the load."""


@dataclasses.dataclass(frozen=True, eq=False)
class Codec:
    """A tokenizer that reads no special tokens from the data's text.

    Attributes:
        tokenizer: a fast tokenizer.
        kept: ids of added tokens whose names stay text in the data; empty with `config.data.parse_special_tokens`.
        silent: ids that `decode` leaves out of a response's text.
        vocab_size: the model's number of embeddings; ids must be below it. None: unknown, and not checked.
    """

    tokenizer: "PreTrainedTokenizerBase"
    kept: frozenset[int] = frozenset()
    silent: frozenset[int] = frozenset()
    vocab_size: int | None = None

    def hide(self, text: str) -> str:
        """Replace the names of special tokens in a text of the data by their stand-ins."""
        return self._pattern.sub(lambda found: self._names.get(found[0], "\ufffd"), text) if self._names else text

    def encode(self, text: str) -> list[int]:
        """Tokenise a text, all of whose parts from the data went through `hide`. Add no BOS, EOS or other tokens.

        Raises:
            BeyondVocabulary: the model has no embedding for an id.
        """
        return _encode(self, text)

    def encode_after(self, before: str, text: str) -> list[int]:
        """Tokenise `text` as it stands after `before`.

        If a token would straddle the two, tokenise `text` alone: a model that was asked with `before` could not write
        that token.
        """
        start, ids = self.encode(before), self.encode(before + text)
        return ids[len(start) :] if ids[: len(start)] == start else self.encode(text)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of sampled ids, without tidying its spaces."""
        shown = [i for i in map(int, ids) if i not in self.silent]
        return str(self.tokenizer.decode(shown, clean_up_tokenization_spaces=False))

    def check(self, ids: Iterable[int]) -> None:
        """Refuse ids without an embedding: on a device they would silently become other tokens, or NaN.

        Raises:
            BeyondVocabulary: with the first such id and its token.
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
        """{name: stand-in} of the kept tokens."""
        added = self.tokenizer.added_tokens_decoder
        return {added[i].content: f"{_MARK}{i}{_MARK}" for i in sorted(self.kept)}

    @functools.cached_property
    def _pattern(self) -> re.Pattern:
        longest_first = sorted(self._names, key=len, reverse=True)  # tokenizers take the longest name that fits
        return re.compile("|".join(map(re.escape, [*longest_first, _MARK])))

    @functools.cached_property
    def _swaps(self) -> Callable[[str], str]:
        """A function of text that replaces names by stand-ins, and stand-ins by names."""
        other = self._names | {stand_in: name for name, stand_in in self._names.items()}
        pattern = re.compile(f"{_MARK}[0-9]+{_MARK}|{self._pattern.pattern}")
        return lambda text: pattern.sub(lambda found: other.get(found[0], "\ufffd"), text)

    @functools.cached_property
    def _by_stand_ins(self) -> "tokenizers.Tokenizer":
        """A copy of the tokenizer, in which the kept tokens are called by their stand-ins."""
        import tokenizers

        described = json.loads(backend(self.tokenizer).to_str())
        described |= {"post_processor": None, "truncation": None, "padding": None}
        for token in described["added_tokens"]:
            if stand_in := self._names.get(token["content"]):
                # Find the stand-in whatever stands beside it: it is no text that a normalizer may change.
                token |= {"content": stand_in, "normalized": False, "single_word": False}
        _rename(described["model"], self._names)
        return tokenizers.Tokenizer.from_str(json.dumps(described))


# Keep the last text: a row's prompt is encoded three times running, to ask, to score and before its answer.
@functools.lru_cache(maxsize=1)
def _encode(codec: Codec, text: str) -> list[int]:
    if _MARK in text:
        ids = codec._by_stand_ins.encode(codec._swaps(text), add_special_tokens=False).ids
    else:
        # verbose=False: do not warn of texts longer than the model's window, which `fit` cuts.
        ids = codec.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    codec.check(ids)
    return ids


def _rename(model: dict, names: dict[str, str]) -> None:
    """Rename kept tokens to their stand-ins in a tokenizer's model, in place.

    The stand-in then has the token's id, and the name is text like any other, so no merge may build it.

    Args:
        model: the "model" of a tokenizer.json.
        names: {name: stand-in}.
    """
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in vocabulary.items()}
    else:  # a Unigram model lists [piece, score]
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):
        model["merges"] = [merge for merge in model["merges"] if names.keys().isdisjoint(_pieces(merge))]


def _pieces(merge: str | list[str]) -> tuple[str, str, str]:
    """The two pieces of a merge, written "left right" or [left, right], and what they make."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right, left + right
