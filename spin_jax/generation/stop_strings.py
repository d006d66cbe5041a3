"""Find stop strings inside the decode loop, with an automaton over tokens.

A string can be cut into tokens in many ways, and can end in the middle of a token. So build an automaton over bytes
(A. Aho, M. Corasick, "Efficient string matching", 1975), and step it through the bytes of each token. The result is one
table: state and token -> next state.
"""

import functools
import json
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from spin_jax.data.tokenizer import backend, special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stop_table(
    tokenizer: "PreTrainedTokenizerBase", strings: Sequence[str], vocab_size: int, silent: Collection[int] = ()
) -> np.ndarray | None:
    """Build the automaton that finds any of `strings`: int32 [states, vocab_size], the state after a state and a token.

    State 0 is the beginning. The last state says that a string was found, and is never left.

    Args:
        silent: ids that decode to no text, besides special tokens.

    Returns:
        the table; None without strings.
    """
    if not strings:
        return None
    pieces = [*token_bytes(tokenizer, silent), *[b""] * vocab_size][:vocab_size]
    return table_of([string.encode() for string in strings], pieces)


def table_of(strings: Sequence[bytes], pieces: Sequence[bytes]) -> np.ndarray:
    """Build the table from the bytes that each token adds to a text."""
    by_byte_AU = _automaton(strings)
    longest = max(map(len, pieces))
    bytes_VU = np.array([list(piece.ljust(longest, b"\0")) for piece in pieces], np.int32)
    lengths_V = np.array(list(map(len, pieces)))
    states_AV = np.repeat(np.arange(len(by_byte_AU), dtype=np.int32)[:, None], len(pieces), axis=1)
    for i in range(longest):
        states_AV = np.where(i < lengths_V, by_byte_AU[states_AV, bytes_VU[:, i]], states_AV)
    return states_AV.astype(np.int32)


def _automaton(strings: Sequence[bytes]) -> np.ndarray:
    """Build int32 [states, 256], the state after a state and a byte. A state stands for the longest end of the text so
    far that begins one of the strings."""
    begun = sorted({string[:i] for string in strings for i in range(len(string))}, key=len)
    number = {prefix: state for state, prefix in enumerate(begun)}
    found = len(begun)
    table = np.full((found + 1, 256), found, np.int32)
    for prefix, state in number.items():
        for byte in range(256):
            read = prefix + bytes([byte])
            ends = (read[i:] for i in range(len(read) + 1))
            table[state, byte] = (
                found if read.endswith(tuple(strings)) else next(number[e] for e in ends if e in number)
            )
    return table


def token_bytes(tokenizer: "PreTrainedTokenizerBase", silent: Collection[int] = ()) -> list[bytes]:
    """Return the bytes that each token adds to a text, by id. Special and `silent` tokens add none."""
    decoder = json.dumps(json.loads(backend(tokenizer).to_str())["decoder"])
    of = _byte_level if '"ByteLevel"' in decoder else _pieces
    unseen, added = special_ids(tokenizer).union(silent), tokenizer.added_tokens_decoder
    pieces = [b""] * (1 + max(tokenizer.get_vocab().values()))
    for token, i in tokenizer.get_vocab().items():
        if i not in unseen:  # an added token's name is its text
            pieces[i] = token.encode() if i in added else of(token)
    return pieces


def _byte_level(token: str) -> bytes:
    """Bytes of a byte-level BPE token, which writes each byte as a visible character."""
    characters = _characters()
    return b"".join(characters.get(c, c.encode()) for c in token)


@functools.cache
def _characters() -> dict[str, bytes]:
    """GPT-2's {character: byte}: printable bytes stand for themselves, the others are the characters from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(b): bytes([b]) for b in seen} | {chr(256 + i): bytes([b]) for i, b in enumerate(others)}


def _pieces(token: str) -> bytes:
    """Bytes of a SentencePiece token, which writes a space as a low line, and a byte without a piece as <0x0A>."""
    if token.startswith("<0x") and token.endswith(">") and len(token) == 6:
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
