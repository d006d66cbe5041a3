import re

import chat_models
import numpy as np
import pytest

from spin_jax.data.chat_format import chat_format, fit
from spin_jax.data.sources import Example, load_examples
from spin_jax.data.tokenize import tokenise
from spin_jax.errors import UserError

transformers = pytest.importorskip("transformers")

ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant turns') }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt }}"
)
REWRITING = "{% for m in messages %}{{ m.content + ('!' if messages | length == 1 else '?') + eos_token }}{% endfor %}"
SILENT = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"

HI = ({"role": "user", "content": "Hi there"},)
CHAT = (*HI, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Who are you?"})


def byte_level(template: str | None, eos: str | None = "</s>"):
    extra = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    return chat_models.byte_level(("</s>", *extra), eos=eos, template=template, named=extra, adds_bos=True)


def text(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


# ---- the tokenizer's template


@pytest.mark.parametrize(
    "template, asked, answered",
    [
        (ZEPHYR, "<|user|>\nHi there</s>\n<|assistant|>\n", "Hello.</s>"),
        (LLAMA_2, "<s>[INST] Hi there [/INST]", " Hello. </s>"),
        (CHATML, "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n", "Hello.<|im_end|>"),
        (ENDLESS, "user: Hi there\nassistant: ", "Hello.\n</s>"),  # no stop id in the template: EOS is appended
    ],
)
def test_prompt_and_real_response(template, asked, answered):
    tokenizer = byte_level(template)
    chat = chat_format(tokenizer)
    assert text(tokenizer, chat.generation_prompt(HI)) == asked
    np.testing.assert_array_equal(chat.training_prompt(HI), chat.generation_prompt(HI))
    response = chat.real_response(HI, "Hello.")
    assert text(tokenizer, response) == answered
    assert response.dtype == chat.generation_prompt(HI).dtype == np.int32
    assert response[-1] in chat.stop_ids and not set(response[:-1]) & set(chat.stop_ids)


def test_stop_ids_are_eos_the_models_own_and_the_templates_end_of_turn():
    tokenizer = byte_level(CHATML)
    eos, end_of_turn, more = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>", "<|endoftext|>"])
    assert chat_format(tokenizer).stop_ids == (eos, end_of_turn)
    assert chat_format(tokenizer, eos_ids=[more, eos]).stop_ids == (eos, more, end_of_turn)
    assert chat_format(tokenizer, "paper", eos_ids=[more]).stop_ids == (eos, more)
    assert chat_format(byte_level(ENDLESS)).stop_ids == (eos,)


def test_several_turns_are_in_the_prompt():
    tokenizer = byte_level(ZEPHYR)
    asked = "<|user|>\nHi there</s>\n<|assistant|>\nHello.</s>\n<|user|>\nWho are you?</s>\n<|assistant|>\n"
    assert text(tokenizer, chat_format(tokenizer).generation_prompt(CHAT)) == asked


def test_sampled_ids_are_kept_as_they_are():
    tokenizer = byte_level(ZEPHYR)
    chat = chat_format(tokenizer)
    # Half a UTF-8 character: decoding and tokenising again would change it.
    cut = tokenizer("é", add_special_tokens=False).input_ids[:1]
    np.testing.assert_array_equal(chat.generated_response(HI, np.array(cut), truncated=True), cut)
    whole = [*cut, tokenizer.eos_token_id]
    np.testing.assert_array_equal(chat.generated_response(HI, whole, truncated=False), whole)
    stopped_at_once = whole[-1:]
    np.testing.assert_array_equal(chat.generated_response(HI, stopped_at_once, truncated=False), stopped_at_once)


@pytest.mark.parametrize("template", ["chat", "paper"])
def test_ids_that_contradict_finished_are_refused(template):
    tokenizer = byte_level(ZEPHYR)
    chat = chat_format(tokenizer, template)
    with pytest.raises(ValueError, match="truncated=False, but the sampled ids do not end in a stop id"):
        chat.generated_response(HI, [5], truncated=False)
    with pytest.raises(ValueError, match="truncated=True, but the sampled ids end in a stop id"):
        chat.generated_response(HI, [5, tokenizer.eos_token_id], truncated=True)


def test_generated_text_of_a_pairs_file_ends_only_if_it_was_finished():
    tokenizer = byte_level(LLAMA_2)
    chat = chat_format(tokenizer)
    np.testing.assert_array_equal(chat.generated_response(HI, "Yes.", truncated=False), chat.real_response(HI, "Yes."))
    assert text(tokenizer, chat.generated_response(HI, "Yes", truncated=True)) == " Yes"
    assert text(tokenizer, chat.generated_response(HI, "", truncated=True)) == " "


@pytest.mark.parametrize(
    "tokenizer, template, message",
    [
        (byte_level(None), "chat", "no chat template: .* or set --config.data.template=paper"),
        (byte_level(ZEPHYR, eos=None), "chat", "no eos_token: set one"),
        (byte_level(ZEPHYR), "zephyr", "unknown data.template 'zephyr': write 'chat' or 'paper'"),
        (byte_level(SILENT), "chat", "leaves the assistant's message out"),
    ],
)
def test_unusable_tokenizers_are_refused(tokenizer, template, message):
    with pytest.raises(UserError, match=message):
        chat_format(tokenizer, template)


def test_a_template_that_rewrites_the_prompt_is_refused():
    with pytest.raises(UserError, match="rewrites the prompt once the answer is there"):
        chat_format(byte_level(REWRITING)).real_response(HI, "Hello.")


def test_a_prompt_that_the_template_refuses_names_its_row():
    system = Example(17, ({"role": "system", "content": "Be brief."}, *HI), "Hello.")
    with pytest.raises(
        UserError, match="^row 17: .*chat template refuses these messages: only user and assistant turns"
    ):
        tokenise(chat_format(byte_level(LLAMA_2)), system)


# ---- the paper's pair of templates


def test_paper_templates():
    tokenizer = byte_level(None)
    chat = chat_format(tokenizer, "paper")
    assert text(tokenizer, chat.generation_prompt(HI)) == "### Instruction: Hi there\n\n### Response: "
    assert text(tokenizer, chat.training_prompt(HI)) == "<|system|>\n</s>\n<|user|>\nHi there</s>\n<|assistant|>\n"
    assert text(tokenizer, chat.real_response(HI, "Hello.")) == "Hello.</s>\n</s>"


def test_paper_generated_response_ends_only_if_the_model_ended():
    tokenizer = byte_level(None)
    chat = chat_format(tokenizer, "paper")
    ids = tokenizer("Hello", add_special_tokens=False).input_ids
    assert text(tokenizer, chat.generated_response(HI, np.array(ids), truncated=True)) == "Hello"
    assert (
        text(tokenizer, chat.generated_response(HI, [*ids, tokenizer.eos_token_id], truncated=False))
        == "Hello</s>\n</s>"
    )
    assert text(tokenizer, chat.generated_response(HI, "Hello", truncated=False)) == "Hello</s>\n</s>"


@pytest.mark.parametrize(
    "prompt, advice",
    [
        (CHAT, "no system turn: set --config.data.turn=first, or set --config.data.template=chat"),
        (
            ({"role": "system", "content": "Be brief."}, *HI),
            "no system turn: put the system's text into the user's turn",
        ),
    ],
)
def test_paper_templates_take_one_user_turn(prompt, advice):
    chat = chat_format(byte_level(None), "paper")
    for ask in (chat.generation_prompt, chat.training_prompt):
        with pytest.raises(UserError, match=advice):
            ask(prompt)


# ---- budgets


def test_fit_keeps_the_end_of_the_prompt_and_the_start_of_the_responses():
    prompt, real, generated = np.arange(10), np.arange(100, 106), np.arange(200, 203)
    fitted = fit(prompt, real, generated, max_length=8, max_prompt_length=4)
    np.testing.assert_array_equal(fitted.prompt, [6, 7, 8, 9])
    np.testing.assert_array_equal(fitted.responses[0], [100, 101, 102, 103])
    np.testing.assert_array_equal(fitted.responses[1], generated)
    assert fitted.prompt_truncated and fitted.truncated == (True, False)


def test_fit_leaves_what_fits_alone():
    prompt, real = np.arange(3), np.arange(100, 105)
    fitted = fit(prompt, real, max_length=8, max_prompt_length=4)
    np.testing.assert_array_equal(fitted.prompt, prompt)
    np.testing.assert_array_equal(fitted.responses[0], real)
    assert not fitted.prompt_truncated and fitted.truncated == (False,)


def test_fit_gives_a_short_prompts_room_to_the_response():
    assert len(fit(np.arange(1), np.arange(50), max_length=8, max_prompt_length=4).responses[0]) == 7


def test_fit_needs_room_for_a_response():
    with pytest.raises(UserError, match=r"max_prompt_length \(8\) must be positive and below max_length \(8\)"):
        fit(np.arange(3), np.arange(3), max_length=8, max_prompt_length=8)


# ---- real tokenizers


def test_smollm2_prompt_and_response_are_what_apply_chat_template_gives(smollm2, assets):
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    chat = chat_format(tokenizer)
    assert chat.stop_ids == (tokenizer.eos_token_id,) == (tokenizer.pad_token_id,)
    for example in load_examples(str(assets / "data" / "fastchat_dummy")).examples[:40]:
        turns = [*example.prompt, {"role": "assistant", "content": example.response}]
        asked = tokenizer.apply_chat_template(list(example.prompt), add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(turns, return_dict=False)
        assert text(tokenizer, whole[-2:]) == "<|im_end|>\n"
        prompt, response = chat.generation_prompt(example.prompt), chat.real_response(example.prompt, example.response)
        np.testing.assert_array_equal(prompt, asked)
        np.testing.assert_array_equal(np.concatenate([prompt, response]), whole[:-1])  # all but the last line break


def test_a_response_that_begins_with_a_line_break_leaves_the_prompt_as_it_was_asked(smollm2):
    """SmolLM2 has a token for two line breaks, which would reach over the end of the prompt."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    chat = chat_format(tokenizer)
    response = chat.real_response(HI, "\n\nHello")
    together = np.concatenate([chat.training_prompt(HI), response])
    assert text(tokenizer, together).endswith("<|im_start|>assistant\n\n\nHello<|im_end|>")
    straddling = tokenizer(text(tokenizer, together), add_special_tokens=False).input_ids
    assert straddling != together.tolist()  # so the case is real
    np.testing.assert_array_equal(together[: len(together) - len(response)], chat.generation_prompt(HI))


def test_sentencepiece_responses_have_no_space_that_no_model_writes(assets):
    """A SentencePiece tokenizer puts a space before any text it is given alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets / "models" / "stories260k-hf")
    tokenizer.chat_template = LLAMA_2
    chat = chat_format(tokenizer)
    prompt, response = chat.generation_prompt(HI), chat.real_response(HI, "Once upon a time")
    tokens = tokenizer.convert_ids_to_tokens(response.tolist())
    assert tokens == ["▁Once", "▁upon", "▁a", "▁time", "▁", "</s>"]
    whole = f"<s>[INST] {HI[0]['content']} [/INST] Once upon a time </s>"
    np.testing.assert_array_equal(
        np.concatenate([prompt, response]), tokenizer(whole, add_special_tokens=False).input_ids
    )
    assert np.count_nonzero(prompt == tokenizer.bos_token_id) == 1


def test_paper_templates_with_a_real_llama_tokenizer(assets):
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets / "models" / "stories260k-hf")
    chat = chat_format(tokenizer, "paper")
    for ids in (chat.generation_prompt(HI), chat.training_prompt(HI), chat.real_response(HI, "Hello.")):
        assert tokenizer.bos_token_id not in ids
    assert np.count_nonzero(chat.training_prompt(HI) == tokenizer.eos_token_id) == 2
    real = chat.real_response(HI, "Once upon a time")
    sampled = [*tokenizer("Once upon a time", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    np.testing.assert_array_equal(chat.generated_response(HI, sampled, truncated=False), real)
    assert re.fullmatch(r"Once upon a time</s> ?\n</s>", text(tokenizer, real))
