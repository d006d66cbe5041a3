"""The automaton against plain search in the text, on real vocabularies."""

import chat_models
import numpy as np
import pytest
import tiny_files
from transformers import AutoTokenizer

from spin_jax.generation.stop_strings import stop_table, token_bytes

TEXTS = (
    "The end.\n\n### Instruction:\nDo it.",
    "naïve – ça va? 日本語 ### 日本",
    "aaab aab ab",
    "### ###\n\n\nUser:",
    " x",
)


def found_at(table_SV: np.ndarray, ids: list[int]) -> int | None:
    """After how many tokens the automaton is at its end."""
    state = 0
    for i, token in enumerate(ids):
        state = table_SV[state, token]
        if state == len(table_SV) - 1:
            return i + 1
    return None


def check(tokenizer, texts=TEXTS):
    pieces = token_bytes(tokenizer)
    for strings in (["###"], ["aab"], ["\n\n", "日本"], ["###\n", "## ", "User"], ["ça va?", "x"], ["ab", "b", "aaab"]):
        table_SV = stop_table(tokenizer, strings, len(tokenizer) + 5)
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            read = [b"".join(pieces[token] for token in ids[: i + 1]) for i in range(len(ids))]
            holds = [any(string.encode() in part for string in strings) for part in read]
            assert found_at(table_SV, ids) == (holds.index(True) + 1 if any(holds) else None), (strings, text)


def test_smollm2(smollm2):
    """Byte-level BPE: the bytes of tokens are those of the text."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(token_bytes(tokenizer)[token] for token in ids) == text.encode()
    check(tokenizer)


def test_pieces(assets):
    """SentencePiece with bytes; its text begins with a space."""
    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "stories260k-hf")
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(token_bytes(tokenizer)[token] for token in ids).strip() == text.strip().encode()
    check(tokenizer)


def test_characters():
    check(tiny_files.character_tokenizer(), ("aab", "no a ab", "user x", "b"))


def test_no_string_is_found_in_the_name_of_a_token_that_no_text_shows():
    """Whether tokenizer.json alone marks it as special, or it is a stop id that nothing marks."""
    tokenizer = chat_models.byte_level(special=("<|eot_id|>",), plain=("<|end|>", "<thé>"))
    eot, end, shown = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|end|>", "<thé>"])
    pieces = token_bytes(tokenizer, silent=[end])
    assert (pieces[eot], pieces[end], pieces[shown]) == (b"", b"", "<thé>".encode())
    table_SV = stop_table(tokenizer, ["eot", "end", "thé"], len(tokenizer), silent=[end])
    assert [found_at(table_SV, [token]) for token in (eot, end, shown)] == [None, None, 1]


def test_no_strings_no_table():
    assert stop_table(tiny_files.character_tokenizer(), (), 9) is None


@pytest.mark.parametrize("before", ["", "a", "aa", "aaa"])
def test_what_was_read_before_counts(before):
    tokenizer = tiny_files.character_tokenizer()
    ids = tokenizer(before + "aab", add_special_tokens=False)["input_ids"]
    assert found_at(stop_table(tokenizer, ["aab"], len(tokenizer)), ids) == len(ids)
