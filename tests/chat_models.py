"""Tokenizers with the chat templates of model families, as their directories have them."""

import dataclasses

import tokenizers
import transformers


def byte_level(special=(), plain=(), bos="<s>", eos="</s>", template=None, named=(), adds_bos=False):
    """Every byte a token, so that text is exactly recoverable; pad is EOS, as in many released tokenizers.

    Args:
        special: added tokens that the backend, which is tokenizer.json, marks as special.
        plain: added tokens that it does not mark.
        named: those of them that tokenizer_config.json has in a list, as newer ones do.
        adds_bos: puts BOS in front of all it is given: formats must not let it, templates have their own.
    """
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([bos, *special])
    backend.add_tokens([tokenizers.AddedToken(token, special=False, normalized=False) for token in plain])
    if adds_bos:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    names = {"eos_token": eos, "pad_token": eos} if eos else {}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, extra_special_tokens=list(named), **names
    )
    tokenizer.chat_template = template
    return tokenizer


@dataclasses.dataclass(frozen=True)
class Family:
    """A chat model's tokenizer, and what is asked, answered and stopped at.

    Attributes:
        tokenizer: keywords of `byte_level`.
        own: stop ids of generation_config.json or config.json, as texts.
        asked: the prompt of `HI`.
        answered: the response `HELLO` to it.
        asked_again: the prompt of `CHAT`, which is HI, HELLO and AGAIN.
        stops: all ids at which sampling stops, as texts.
    """

    name: str
    tokenizer: dict
    own: tuple[str, ...]
    asked: str
    answered: str
    asked_again: str
    stops: tuple[str, ...]


HI, HELLO, AGAIN = "Hi there", "Hello.", "Who are you?"

LLAMA_3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
)
LLAMA_3_ASKS = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
LLAMA_3_TOKENS = {
    "bos": "<|begin_of_text|>",
    "eos": "<|end_of_text|>",
    "special": ("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
LLAMA_3_TURNS = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
CHATML_OMITS_THE_LAST_END = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% if not loop.last or add_generation_prompt %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TURNS = "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
CHATML_AGAIN = "Hello.<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# A system turn is the beginning of the first user turn.
GEMMA_3 = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set first = messages[0]['content'] + '\n\n' -%}"
    "{%- set turns = messages[1:] -%}{%- else -%}{%- set first = '' -%}{%- set turns = messages -%}{%- endif -%}"
    "{%- for turn in turns -%}{%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif -%}"
    "{{ '<start_of_turn>' + ('model' if turn['role'] == 'assistant' else turn['role']) + '\n' }}"
    "{{ (first if loop.first else '') + turn['content'] | trim + '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}{% for message in loop_messages %}"
    "{% set content = system + message['content'] if loop.index0 == 0 else message['content'] %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
QWEN_3 = (
    "{%- set ns = namespace(last=messages|length - 1) %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if message.role == 'assistant' %}{%- set thoughts = '' %}"
    "{%- if '</think>' in content %}"
    "{%- set thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or thoughts) %}"
    "{{- '<|im_start|>assistant\n<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
PHI_3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'User: ' + message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}{% else %}{{ message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
DEEPSEEK_R1 = (
    "{{ bos_token }}{%- for message in messages %}{%- if message['role'] == 'user' %}"
    "{{- '<｜User｜>' + message['content'] }}{%- elif message['role'] == 'assistant' %}"
    "{%- set content = message['content'] %}{%- if '</think>' in content %}"
    "{%- set content = content.split('</think>')[-1] %}{%- endif %}"
    "{{- '<｜Assistant｜>' + content + eos_token }}{%- endif %}{%- endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
DEEPSEEK_TOKENS = {
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "special": ("<｜end▁of▁sentence｜>",),
    "plain": ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
}
NEVER_ASKS = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
GLM = (
    "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CHATML_TOKENS = {"special": ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), "eos": "<|endoftext|>"}
FAMILIES = (
    Family(
        "llama-3, its end only in config.json and tokenizer.json",
        LLAMA_3_TOKENS | {"template": LLAMA_3 + "{% if add_generation_prompt %}" + LLAMA_3_ASKS + "{% endif %}"},
        ("<|eot_id|>",),
        LLAMA_3_TURNS,
        "Hello.<|eot_id|>",
        LLAMA_3_TURNS + "Hello.<|eot_id|>" + LLAMA_3_TURNS.removeprefix("<|begin_of_text|>").replace(HI, AGAIN),
        ("<|end_of_text|>", "<|eot_id|>"),
    ),
    Family(
        "llama-3, which always asks, and no file names its end",
        LLAMA_3_TOKENS | {"template": LLAMA_3 + LLAMA_3_ASKS},
        (),
        LLAMA_3_TURNS,
        "Hello.<|eot_id|>",
        LLAMA_3_TURNS + "Hello.<|eot_id|>" + LLAMA_3_TURNS.removeprefix("<|begin_of_text|>").replace(HI, AGAIN),
        ("<|end_of_text|>", "<|eot_id|>"),
    ),
    Family(
        "chatml without an end after the last message",
        CHATML_TOKENS | {"template": CHATML_OMITS_THE_LAST_END},
        (),
        CHATML_TURNS,
        "Hello.<|im_end|>",
        CHATML_TURNS + CHATML_AGAIN,
        ("<|endoftext|>", "<|im_end|>"),
    ),
    Family(
        "chatml with a default system turn and without an end after the last message",
        CHATML_TOKENS
        | {
            "template": "{% if messages[0].role != 'system' %}"
            "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML_OMITS_THE_LAST_END
        },
        ("<|im_end|>",),
        "<|im_start|>system\nBe kind.<|im_end|>\n" + CHATML_TURNS,
        "Hello.<|im_end|>",
        "<|im_start|>system\nBe kind.<|im_end|>\n" + CHATML_TURNS + CHATML_AGAIN,
        ("<|endoftext|>", "<|im_end|>"),
    ),
    Family(
        "chatml on tokens that are not marked as special",
        {
            "plain": ("<|im_start|>", "<|im_end|>"),
            "template": CHATML_OMITS_THE_LAST_END.replace("not loop.last or add_generation_prompt", "true"),
        },
        (),
        CHATML_TURNS,
        "Hello.<|im_end|>",
        CHATML_TURNS + CHATML_AGAIN,
        ("</s>", "<|im_end|>"),
    ),
    Family(
        "gemma",
        {"bos": "<bos>", "eos": "<eos>", "special": ("<start_of_turn>", "<end_of_turn>"), "template": GEMMA},
        ("<eos>", "<end_of_turn>"),
        "<bos><start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\n",
        "Hello.<end_of_turn>",
        "<bos><start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nWho are you?<end_of_turn>\n<start_of_turn>model\n",
        ("<eos>", "<end_of_turn>"),
    ),
    Family(
        "gemma 3",
        {
            "bos": "<bos>",
            "eos": "<eos>",
            "special": ("<start_of_turn>", "<end_of_turn>"),
            "adds_bos": True,
            "template": GEMMA_3,
        },
        ("<eos>", "<end_of_turn>"),
        "<bos><start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\n",
        "Hello.<end_of_turn>",
        "<bos><start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nWho are you?<end_of_turn>\n<start_of_turn>model\n",
        ("<eos>", "<end_of_turn>"),
    ),
    Family(
        "mistral",
        {"special": ("[INST]", "[/INST]"), "template": MISTRAL},
        ("</s>",),
        "<s>[INST] Hi there [/INST]",
        " Hello.</s>",
        "<s>[INST] Hi there [/INST] Hello.</s>[INST] Who are you? [/INST]",
        ("</s>",),
    ),
    Family(
        "llama-2",
        {"template": LLAMA_2},
        (),
        "<s>[INST] Hi there [/INST]",
        " Hello. </s>",
        "<s>[INST] Hi there [/INST] Hello. </s><s>[INST] Who are you? [/INST]",
        ("</s>",),
    ),
    Family(
        "qwen-3, which thinks only once an answer is there",
        {
            "eos": "<|im_end|>",
            "special": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
            "plain": ("<think>", "</think>"),
            "template": QWEN_3,
        },
        ("<|im_end|>", "<|endoftext|>"),
        CHATML_TURNS + "<think>\n\n</think>\n\n",
        "Hello.<|im_end|>",
        CHATML_TURNS + CHATML_AGAIN + "<think>\n\n</think>\n\n",
        ("<|im_end|>", "<|endoftext|>"),
    ),
    Family(
        "phi-3",
        {
            "eos": "<|endoftext|>",
            "special": ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
            "template": PHI_3,
        },
        ("<|endoftext|>",),
        "<|user|>\nHi there<|end|>\n<|assistant|>\n",
        "Hello.<|end|>",
        "<|user|>\nHi there<|end|>\n<|assistant|>\nHello.<|end|>\n<|user|>\nWho are you?<|end|>\n<|assistant|>\n",
        ("<|endoftext|>", "<|end|>"),
    ),
    Family(
        "deepseek",
        DEEPSEEK_TOKENS | {"template": DEEPSEEK},
        (),
        "<｜begin▁of▁sentence｜>User: Hi there\n\nAssistant:",
        " Hello.<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>User: Hi there\n\nAssistant: Hello.<｜end▁of▁sentence｜>"
        "User: Who are you?\n\nAssistant:",
        ("<｜end▁of▁sentence｜>",),
    ),
    Family(
        "deepseek-r1, which asks for thoughts that an answer does not have",
        DEEPSEEK_TOKENS | {"template": DEEPSEEK_R1},
        (),
        "<｜begin▁of▁sentence｜><｜User｜>Hi there<｜Assistant｜>",
        "Hello.<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜><｜User｜>Hi there<｜Assistant｜>Hello.<｜end▁of▁sentence｜>"
        "<｜User｜>Who are you?<｜Assistant｜>",
        ("<｜end▁of▁sentence｜>",),
    ),
    Family(
        "a template that never asks",
        {"template": NEVER_ASKS},
        (),
        "<|user|>\nHi there</s>\n<|assistant|>\n",
        "Hello.</s>",
        "<|user|>\nHi there</s>\n<|assistant|>\nHello.</s>\n<|user|>\nWho are you?</s>\n<|assistant|>\n",
        ("</s>",),
    ),
    Family(
        "glm, which ends where the next turn begins",
        {
            "eos": "<|endoftext|>",
            "special": ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|endoftext|>"),
            "template": GLM,
        },
        ("<|endoftext|>", "<|user|>"),
        "[gMASK]<sop><|user|>\nHi there<|assistant|>\n",
        "Hello.<|user|>",
        "[gMASK]<sop><|user|>\nHi there<|assistant|>\nHello.<|user|>\nWho are you?<|assistant|>\n",
        ("<|endoftext|>", "<|user|>"),
    ),
    Family(
        "no end at all: EOS is appended",
        CHATML_TOKENS | {"template": NO_END},
        (),
        "<|im_start|>user\nHi there\n<|im_start|>assistant\n",
        "Hello.\n<|endoftext|>",
        "<|im_start|>user\nHi there\n<|im_start|>assistant\nHello.\n"
        "<|im_start|>user\nWho are you?\n<|im_start|>assistant\n",
        ("<|endoftext|>",),
    ),
    Family(
        "no end at all, and another EOS in config.json than the tokenizer's",
        CHATML_TOKENS | {"template": NO_END},
        ("<|im_end|>",),
        "<|im_start|>user\nHi there\n<|im_start|>assistant\n",
        "Hello.\n<|im_end|>",
        "<|im_start|>user\nHi there\n<|im_start|>assistant\nHello.\n"
        "<|im_start|>user\nWho are you?\n<|im_start|>assistant\n",
        ("<|endoftext|>", "<|im_end|>"),
    ),
)
