"""What is asked, what a response ends in and where sampling stops, for the chat templates of model families."""

import json

import chat_models
import numpy as np
import pytest
from chat_models import AGAIN, FAMILIES, HELLO, HI, byte_level

from spin_jax.data.chat_format import chat_format, load_chat
from spin_jax.errors import UserError

QUESTION = ({"role": "user", "content": HI},)
CHAT = (*QUESTION, {"role": "assistant", "content": HELLO}, {"role": "user", "content": AGAIN})


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_family(family, where, tmp_path):
    tokenizer = byte_level(**family.tokenizer)
    tokenizer.save_pretrained(tmp_path)
    own = [ids(tokenizer, token)[0] for token in family.own]
    eos = {"eos_token_id": own[0] if len(own) == 1 else own} if own else {}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / where).write_text(json.dumps({"model_type": "llama"} | eos))
    chat = load_chat(tmp_path, "chat", vocab_size=len(tokenizer))
    assert chat.generation_prompt(QUESTION).tolist() == ids(tokenizer, family.asked)
    assert chat.training_prompt(CHAT).tolist() == ids(tokenizer, family.asked_again)
    for prompt in (QUESTION, CHAT):
        assert chat.real_response(prompt, HELLO).tolist() == ids(tokenizer, family.answered)
        sampled = ids(tokenizer, family.answered)
        np.testing.assert_array_equal(chat.generated_response(prompt, sampled, truncated=False), sampled)
        np.testing.assert_array_equal(chat.generated_response(prompt, HELLO, truncated=False), sampled)
        assert chat.generated_response(prompt, HELLO, truncated=True).tolist() == ids(
            tokenizer, family.answered[: family.answered.index(HELLO) + len(HELLO)]
        )
    assert chat.stop_ids == tuple(ids(tokenizer, token)[0] for token in family.stops)
    assert set(sampled) & set(chat.stop_ids) == {sampled[-1]}
    assert chat.codec.decode(sampled).strip() == HELLO


def test_where_nothing_is_odd_prompts_are_what_transformers_renders():
    odd = ("never asks", "thinks only", "thoughts that")
    for family in FAMILIES:
        tokenizer = byte_level(**family.tokenizer)
        theirs = tokenizer.apply_chat_template(list(CHAT), add_generation_prompt=True, return_dict=False)
        ours = chat_format(tokenizer).training_prompt(CHAT).tolist()
        assert (ours == theirs) != any(words in family.name for words in odd), family.name


# ---- what a template may not do


@pytest.mark.parametrize(
    "template, message",
    [
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            "leaves the assistant's message out",
        ),
        ("{% for m in messages %}{{ m.content | upper + eos_token }}{% endfor %}", "or rewrites messages"),
        (
            "{% for m in messages %}{{ m.content + ('!' if messages|length == 1 else '?') }}{% endfor %}",
            "rewrites the prompt once the answer is there",
        ),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "chat template fails: TypeError"),
        ("{{ messages[7].content }}", "refuses these messages: list object has no element 7"),
        ("{% for m in messages %}{{ m.content }", "chat template is not Jinja"),
        (
            "{{ raise_exception('no\nturns') }}",
            "refuses these messages: no turns; mend it, or set --config.data.template=paper",
        ),
        (7, "chat_template is 7: write a template in Jinja"),
        ({"tool_use": "x", "rag": "y"}, r"chat templates \(tool_use, rag\) none is named default"),
    ],
)
def test_unusable_templates_are_refused_in_one_line(template, message):
    with pytest.raises(UserError, match=message) as refusal:
        chat_format(byte_level(template=template))
    assert "\n" not in str(refusal.value)


def test_a_template_of_one_exchange_is_used_as_it_is():
    template = (
        "{% if messages|length > 2 %}{{ raise_exception('one exchange') }}{% endif %}"
        "{% for m in messages %}{{ m.role[0] + ':' + m.content + eos_token }}{% endfor %}"
        "{{ 'a:' if add_generation_prompt }}"
    )
    tokenizer = byte_level(template=template)
    chat = chat_format(tokenizer)
    assert chat.generation_prompt(QUESTION).tolist() == ids(tokenizer, "u:Hi there</s>a:")
    assert chat.real_response(QUESTION, HELLO).tolist() == ids(tokenizer, "Hello.</s>")
    with pytest.raises(UserError, match="one exchange"):
        chat.generation_prompt(CHAT)


@pytest.mark.parametrize(
    "template, message",
    [
        (chat_models.GEMMA, "refuses these messages: System role not supported$"),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.role + m.content + eos_token }}{% endfor %}",
            "leaves out or rewrites the text of the system's turn",
        ),
    ],
)
def test_system_turns_are_in_the_prompt_or_refused(template, message):
    system = ({"role": "system", "content": "Be brief."}, *QUESTION)
    tokenizer = byte_level(template=template, special=("<start_of_turn>", "<end_of_turn>"))
    chat = chat_format(tokenizer)
    with pytest.raises(UserError, match=message):
        chat.generation_prompt(system)
    chat.generation_prompt(QUESTION)
    taken = chat_format(byte_level(template=chat_models.LLAMA_2)).generation_prompt(system)
    assert taken.tolist() == ids(tokenizer, "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi there [/INST]")


def test_a_system_text_that_the_template_moves_to_the_last_turn():
    """Mistral 7B v0.3 has it in the user's turn while that is the last, and nowhere once the answer is there."""
    template = (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
        "{% endif %}{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') + m.content + '[/INST]' }}"
        "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = byte_level(special=("[INST]", "[/INST]"), template=template)
    chat, system = chat_format(tokenizer), {"role": "system", "content": "Be brief."}
    for prompt in ((system, *QUESTION), (system, *CHAT)):
        asked = chat.generation_prompt(prompt).tolist()
        assert tokenizer.decode(asked).endswith(f"[INST] Be brief.\n\n{prompt[-1]['content']}[/INST]")
        assert chat.real_response(prompt, f"{HELLO} ").tolist() == ids(tokenizer, " Hello.</s>")


def test_an_answer_that_the_template_rewrites_is_refused_and_earlier_thoughts_may_go():
    family = next(family for family in FAMILIES if family.name.startswith("qwen-3"))
    tokenizer = byte_level(**family.tokenizer)
    chat = chat_format(tokenizer)
    thought = "<think>\nhm\n</think>\n\nHello."
    with pytest.raises(UserError, match="rewrites the prompt once the answer is there"):
        chat.real_response(QUESTION, thought)
    earlier = (*QUESTION, {"role": "assistant", "content": thought}, CHAT[2])
    assert chat.generation_prompt(earlier).tolist() == ids(tokenizer, family.asked_again)
    shouting = chat_format(
        byte_level(template=chat_models.NEVER_ASKS.replace("m.content", "m.content | replace('bc', 'BC')"))
    )
    with pytest.raises(UserError, match="rewrites the answer"):
        shouting.real_response(QUESTION, "abc")
    with pytest.raises(UserError, match="rewrites the text of the user's turn"):
        shouting.generation_prompt([{"role": "user", "content": "abc"}])


def test_spaces_around_a_text_may_be_trimmed():
    tokenizer = byte_level(**FAMILIES[0].tokenizer)
    chat = chat_format(tokenizer)
    assert chat.generation_prompt([{"role": "user", "content": f" {HI}\n"}]).tolist() == ids(
        tokenizer, FAMILIES[0].asked
    )
    assert chat.real_response(QUESTION, f"\n{HELLO} ").tolist() == ids(tokenizer, FAMILIES[0].answered)


def test_the_clock_stands_still(caplog, tmp_path):
    template = (
        "\n  {% if not date_string is defined %}{% if strftime_now is defined %}"
        "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{% endif %}"
        "{% macro said(m) %}{{ m.content + ' (' + strftime_now('%A %H:%M') + ')' }}{% endmacro %}"
        "{{ '  Today: ' + date_string + '\n' }}"
        "{% for m in messages %}{{ m.role + ': ' + said(m) + eos_token }}{% endfor %}"
        "{{ 'assistant: ' if add_generation_prompt }}"
    )
    tokenizer = byte_level(template=template)
    stopped = template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'").replace(
        "strftime_now('%A %H:%M')", "'Friday 00:00'"
    )
    asked = byte_level(template=stopped).apply_chat_template(list(QUESTION), tokenize=False, add_generation_prompt=True)
    assert asked.endswith("  Today: 26 Jul 2024\nuser: Hi there (Friday 00:00)</s>assistant: ")
    assert chat_format(tokenizer).generation_prompt(QUESTION).tolist() == ids(tokenizer, asked)
    tokenizer.save_pretrained(tmp_path)
    load_chat(tmp_path, "chat")
    assert f"{tmp_path}: the chat template writes the date, which is always 26 Jul 2024 here" in caplog.text


def test_a_template_without_an_end_is_warned_of(caplog, tmp_path):
    byte_level(**FAMILIES[-1].tokenizer).save_pretrained(tmp_path)
    load_chat(tmp_path, "chat")
    assert "writes no token after an answer" in caplog.text


def test_a_byte_order_mark_is_not_in_the_prompt():
    tokenizer = byte_level(template="\ufeff" + chat_models.NEVER_ASKS)
    assert chat_format(tokenizer).generation_prompt(QUESTION).tolist() == ids(
        tokenizer, "<|user|>\nHi there</s>\n<|assistant|>\n"
    )
