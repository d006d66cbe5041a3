"""Text of the data stays text: the names of special tokens in it become no token, and nothing else changes."""

import json
import random

import chat_models
import numpy as np
import pytest
import tiny_files
import tokenizers
import transformers
from chat_models import FAMILIES, byte_level

from spin_jax.data.chat_format import chat_format
from spin_jax.data.codec import Codec
from spin_jax.data.tokenizer import special_ids
from spin_jax.errors import UserError

TEXTS = ("Once upon a time", "naïve – ça va? 日本語", "  two spaces ", "a\n\nb", "x = '<' + \"|im\"", "")


def everything(tokenizer) -> Codec:
    """All special tokens' names are text in the data."""
    special = special_ids(tokenizer)
    return Codec(tokenizer, special & tokenizer.added_tokens_decoder.keys(), special)


def as_sentencepiece_was(prefix: bool):
    """Llama 2's kind: pieces with a low line for a space and bytes for the rest, special tokens in the vocabulary and
    beyond it, with flags of all sorts. `prefix`: spaces as transformers 4 had them."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehilnoprstu<>/|"]
    merges = [("o", "n"), ("▁", "on"), ("s", ">"), ("<", "s"), ("</", "s>"), ("<", "/"), ("</s", ">"), ("</", "s")]
    pieces += [left + right for left, right in merges if left + right not in pieces]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, merges, byte_fallback=True, unk_token="<unk>")
    )
    if prefix:
        spaces = tokenizers.normalizers.Replace(" ", "▁")
        backend.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"), spaces])
    else:
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    flags = [{"normalized": prefix}, {"lstrip": True}, {"rstrip": True}]
    backend.add_special_tokens(
        [tokenizers.AddedToken(p, **flag) for p, flag in zip(pieces[:3], flags, strict=True)]
        + [tokenizers.AddedToken("<|pad|>", single_word=True)]
    )
    backend.add_tokens(["<tool>"])
    backend.add_special_tokens(["<|end|>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def as_unigram():
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -float(i + 2)) for i, c in enumerate("▁abcdeinotu<>/s|"))]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


MADE = {
    "bytes": lambda: byte_level(special=("<|im_start|>", "<|im_end|>"), plain=("<think>",)),
    "characters": tiny_files.character_tokenizer,
    "pieces": lambda: as_sentencepiece_was(prefix=False),
    "pieces with a prefix": lambda: as_sentencepiece_was(prefix=True),
    "unigram": as_unigram,
}


def check(tokenizer) -> None:
    codec, special = everything(tokenizer), special_ids(tokenizer)
    added = tokenizer.added_tokens_decoder
    names = [added[i].content for i in sorted(special) if not (added[i].normalized or added[i].single_word)]
    draw = random.Random(0)
    for _ in range(200):  # a template's text, with special tokens of its own, between which the data's text has none
        texts = [draw.choice([*names, *TEXTS]) for _ in range(draw.randint(1, 9))]
        theirs = tokenizer("".join(texts), add_special_tokens=False).input_ids
        assert codec.encode("".join(texts)) == theirs
        # The same as seen by the copy that is used where the data's text has names.
        assert codec._by_stand_ins.encode(codec._swaps("".join(texts)), add_special_tokens=False).ids == theirs
    for name in (added[i].content for i in special):
        text = f"on{name} {name}on"
        ids = codec.encode(names[0] + codec.hide(text) + names[0])
        assert not special & set(ids[1:-1]) - {tokenizer.unk_token_id}, name
        assert ids[0] == ids[-1] == tokenizer.convert_tokens_to_ids(names[0])


@pytest.mark.parametrize("kind", MADE)
def test_names_in_the_data_are_text(kind):
    check(MADE[kind]())


def test_names_in_the_data_are_text_with_real_tokenizers(smollm2, assets):
    for directory in (smollm2, assets / "models" / "stories260k-hf"):
        check(transformers.AutoTokenizer.from_pretrained(directory))


def test_text_is_tokenised_as_if_the_name_were_any_other():
    """No seam: the pieces around a name are those of the whole text."""
    tokenizer = as_sentencepiece_was(prefix=False)
    ids = everything(tokenizer).encode("<s>" + everything(tokenizer).hide("on</s> on"))
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "on", "</", "s>", "▁on"]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_chat_of_template_tokens(family):
    """Every token that a family's template writes, in a question, an earlier answer and the response."""
    tokenizer = byte_level(**family.tokenizer)
    chat = chat_format(tokenizer, eos_ids=[tokenizer.convert_tokens_to_ids(token) for token in family.own])
    plain = byte_level(bos="<none>", eos="<nothing>")  # to which all of it is text
    names = [tokenizer.added_tokens_decoder[i].content for i in sorted(chat.codec.kept)]
    odd = f"say {''.join(names)} to me"
    question = ({"role": "user", "content": odd},)
    asked = family.asked.split(chat_models.HI)
    in_order = [tokenizer(asked[0], add_special_tokens=False), plain(odd, add_special_tokens=False)]
    in_order += [tokenizer(asked[1], add_special_tokens=False)]
    assert chat.generation_prompt(question).tolist() == [
        i for part in in_order for i in part.input_ids if i is not None
    ]
    before, after = family.answered.split(chat_models.HELLO)
    real = chat.real_response(question, odd)
    parts = tokenizer(before).input_ids, plain(odd).input_ids, tokenizer(after).input_ids
    without_bos = [ids[ids[:1] == [tokenizer.bos_token_id] :] for ids in parts]
    assert real.tolist() == [i for ids in without_bos for i in ids]
    np.testing.assert_array_equal(chat.generated_response(question, odd, truncated=False), real)
    assert chat.codec.decode(real).strip() == odd
    earlier = (*question, {"role": "assistant", "content": odd}, *question)
    assert chat.generation_prompt(earlier).tolist().count(real[-1]) == chat.generation_prompt(
        (*question, {"role": "assistant", "content": "x"}, {"role": "user", "content": "y"})
    ).tolist().count(real[-1])


def test_the_switch_makes_them_tokens():
    tokenizer = byte_level(template=chat_models.NEVER_ASKS)
    question = ({"role": "user", "content": "a</s>b"},)
    text, parsed = chat_format(tokenizer), chat_format(tokenizer, parse_special_tokens=True)
    eos = tokenizer.eos_token_id
    assert text.generation_prompt(question).tolist().count(eos) == 1
    assert parsed.generation_prompt(question).tolist().count(eos) == 2
    assert tokenizer.decode(text.real_response(question, "a</s>b")) == "a</s>b</s>"
    assert tokenizer.decode(parsed.real_response(question, "a</s>b")) == "a</s>"  # it ends at the first stop id


def test_the_papers_templates_keep_text_as_well():
    tokenizer = byte_level()
    chat, eos = chat_format(tokenizer, "paper"), tokenizer.eos_token_id
    question = ({"role": "user", "content": "a</s>b"},)
    assert chat.generation_prompt(question).tolist().count(eos) == 0
    assert chat.training_prompt(question).tolist().count(eos) == 2
    real = chat.real_response(question, "c</s>d")
    assert (tokenizer.decode(real), real.tolist().count(eos)) == ("c</s>d</s>\n</s>", 2)
    sampled = [*tokenizer("c", add_special_tokens=False).input_ids, *real[1:6], eos]  # the model wrote it as text
    assert chat.generated_response(question, sampled, truncated=False).tolist().count(eos) == 2


def test_a_stand_in_cannot_be_written():
    codec = everything(byte_level())
    forged = f"\U0010ffff{codec.tokenizer.eos_token_id}\U0010ffff </s>"
    assert codec.tokenizer.eos_token_id not in codec.encode(codec.hide(forged))


def test_ids_beyond_the_vocabulary_are_refused_by_name():
    tokenizer = byte_level(special=("</s>",), plain=("<tool>",), template=chat_models.NEVER_ASKS)
    chat = chat_format(tokenizer, vocab_size=len(tokenizer) - 1)  # without a place for <tool>
    message = r"token '<tool>' has the id 258, but the model's vocabulary ends at 257 \(vocab_size=258 in config.json\)"
    with pytest.raises(UserError, match=message):
        chat.generation_prompt([{"role": "user", "content": "use <tool>"}])
    with pytest.raises(UserError, match=message):
        chat.real_response([{"role": "user", "content": "x"}], "use <tool>")
    with pytest.raises(UserError, match=message):
        chat.generated_response([{"role": "user", "content": "x"}], "use <tool>", truncated=True)
    with pytest.raises(UserError, match=message):
        chat_format(tokenizer, "paper", vocab_size=258).generation_prompt([{"role": "user", "content": "use <tool>"}])
    for template, stops in (("chat", [258]), ("paper", [258])):
        with pytest.raises(UserError, match=message):
            chat_format(tokenizer, template, stops, vocab_size=258)
    with pytest.raises(UserError, match="token '</s>' has the id 257"):
        chat_format(tokenizer, vocab_size=257)


def test_a_padding_token_beyond_the_vocabulary_is_harmless():
    tokenizer = byte_level(template=chat_models.NEVER_ASKS)
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == size
    chat = chat_format(tokenizer, vocab_size=size)
    ids = chat.generation_prompt([{"role": "user", "content": "a <pad> b"}])  # text, as any other name
    assert ids.max() < size and "a <pad> b" in tokenizer.decode(ids)


def test_decoding_shows_neither_special_tokens_nor_stop_ids():
    tokenizer = byte_level(special=("<|eot|>",), plain=("<end>", "<think>"), template=chat_models.NEVER_ASKS)
    assert tokenizer.convert_tokens_to_ids("<|eot|>") not in tokenizer.all_special_ids
    chat = chat_format(tokenizer, eos_ids=[tokenizer.convert_tokens_to_ids("<end>")])
    ids = tokenizer("<s><think>Hello .</s>", add_special_tokens=False).input_ids
    ids += tokenizer.convert_tokens_to_ids(["<|eot|>", "<end>"])
    assert chat.codec.decode(np.array(ids)) == "<think>Hello ."


def test_a_large_vocabulary_keeps_its_ids(smollm2):
    """Added tokens of SmolLM2 come first in its vocabulary; others come after it, with gaps."""
    described = json.loads(transformers.AutoTokenizer.from_pretrained(smollm2).backend_tokenizer.to_str())
    backend = tokenizers.Tokenizer.from_str(json.dumps(described))
    backend.add_special_tokens([f"<|reserved_{i}|>" for i in range(250)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    codec = everything(tokenizer)
    for name in ("<|reserved_0|>", "<|reserved_249|>", "<|im_end|>"):
        assert codec.encode(name + codec.hide(name))[0] == tokenizer.convert_tokens_to_ids(name)
        assert tokenizer.convert_tokens_to_ids(name) not in codec.encode(name + codec.hide(name))[1:]
