"""Stop strings as an automaton over tokens: whether a response's text holds one is known inside the decode loop.

A string can be cut into tokens in many ways, and its end may lie in the middle of one. So the automaton reads bytes
(A. Aho, M. Corasick, "Efficient string matching", 1975), and is then stepped through all bytes of each token: one table
of the next state, by state and token.
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
    """The automaton that finds any of `strings`, int32 [states, vocab_size]: the state after a state and a token.

    State 0 is the beginning; the last one says that a string was found, and is never left. None without strings.
    `silent` are ids that no text shows, besides special tokens.
    """
    if not strings:
        return None
    pieces = [*token_bytes(tokenizer, silent), *[b""] * vocab_size][:vocab_size]
    return table_of([string.encode() for string in strings], pieces)


def table_of(strings: Sequence[bytes], pieces: Sequence[bytes]) -> np.ndarray:
    """The table, given what each token adds to a text."""
    by_byte_AU = _automaton(strings)
    longest = max(map(len, pieces))
    bytes_VU = np.array([list(piece.ljust(longest, b"\0")) for piece in pieces], np.int32)
    lengths_V = np.array(list(map(len, pieces)))
    states_AV = np.repeat(np.arange(len(by_byte_AU), dtype=np.int32)[:, None], len(pieces), axis=1)
    for i in range(longest):
        states_AV = np.where(i < lengths_V, by_byte_AU[states_AV, bytes_VU[:, i]], states_AV)
    return states_AV.astype(np.int32)


def _automaton(strings: Sequence[bytes]) -> np.ndarray:
    """The state after a state and a byte, int32 [states, 256]. A state is the longest end of what was read that begins
    one of the strings."""
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
    """What each token adds to a text, by id; nothing for special tokens and those that are `silent`."""
    decoder = json.dumps(json.loads(backend(tokenizer).to_str())["decoder"])
    of = _byte_level if '"ByteLevel"' in decoder else _pieces
    unseen, added = special_ids(tokenizer).union(silent), tokenizer.added_tokens_decoder
    pieces = [b""] * (1 + max(tokenizer.get_vocab().values()))
    for token, i in tokenizer.get_vocab().items():
        if i not in unseen:  # an added token is written as it reads
            pieces[i] = token.encode() if i in added else of(token)
    return pieces


def _byte_level(token: str) -> bytes:
    """Of byte-level BPE, which writes each byte as a character that can be seen."""
    characters = _characters()
    return b"".join(characters.get(c, c.encode()) for c in token)


@functools.cache
def _characters() -> dict[str, bytes]:
    """GPT-2's: printable bytes are themselves, the others the characters from 256 on, in order."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(b): bytes([b]) for b in seen} | {chr(256 + i): bytes([b]) for i, b in enumerate(others)}


def _pieces(token: str) -> bytes:
    """Of SentencePiece, which writes a space as a low line and a byte without a piece of its own as <0x0A>."""
    if token.startswith("<0x") and token.endswith(">") and len(token) == 6:
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
