"""A model directory's tokenizer and stop ids: what is read, and damage refused in one line, with file and remedy."""

import json
import os
import pathlib
import subprocess
import sys

import chat_models
import pytest
from chat_models import byte_level

from spin_jax.data.chat_format import load_chat
from spin_jax.data.tokenizer import own_stop_ids
from spin_jax.errors import UserError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
HI = ({"role": "user", "content": "Hi"},)


@pytest.fixture
def model(tmp_path) -> pathlib.Path:
    """The directory of a model without its weights."""
    byte_level(special=("<|eot|>",), template=chat_models.NEVER_ASKS).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 257}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 258]}))
    return tmp_path


def edit(file: pathlib.Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def refusal(model: pathlib.Path) -> str:
    with pytest.raises(UserError) as refused:
        load_chat(model, "chat")
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ---- stop ids


@pytest.mark.parametrize(
    "generation, config, own",
    [
        ([257, 258], 257, (257, 258)),
        (258, 257, (258,)),
        (None, [258, 257], (258, 257)),
        ("absent", 258, (258,)),
        ("absent", None, ()),
    ],
)
def test_stop_ids_are_those_that_transformers_would_use(model, generation, config, own):
    (model / "generation_config.json").unlink()
    if generation != "absent":
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    edit(model / "config.json", eos_token_id=config)
    assert own_stop_ids(model) == own


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("value", ["</s>", "2", 2.0, -1, True, [257, "</s>"], [[257]], {"id": 2}])
def test_what_is_no_id_is_refused(model, name, value):
    (model / "generation_config.json").unlink()
    (model / name).write_text(json.dumps({"model_type": "llama", "eos_token_id": value}))
    assert refusal(model).startswith(f"{model / name}: eos_token_id={json.dumps(value)} must be a token's id or a list")


# ---- damage


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "content, why",
    [
        (b"", "empty"),
        (POINTER.encode(), "Git LFS pointer"),
        (b"\xef\xbb\xbf{}", "byte-order mark"),
        (b"\xff\xfe{\0}\0", "byte-order mark"),
        (b"[]", "JSON list, not an object"),
        (b"null", "JSON NoneType, not an object"),
        (b'{"model": ', "not JSON"),
        (b'{"a": "\xe9"}', "not JSON"),
    ],
)
def test_damaged_files_are_named(model, name, content, why):
    (model / name).write_bytes(content)
    assert refusal(model).startswith(f"{model / name}: ") and why in refusal(model)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content["model"]["vocab"].update(a="x"),
        lambda content: content["model"].update(merges=["q zz"]),  # tokenizers raises plain Exceptions
        lambda content: content.pop("model"),
        lambda content: content.update(added_tokens=5),
        lambda content: content.update(pre_tokenizer={"type": "Nobody's"}),
    ],
)
def test_a_tokenizer_json_that_is_json_and_damaged(model, damage):
    content = json.loads((model / "tokenizer.json").read_text())
    damage(content)
    (model / "tokenizer.json").write_text(json.dumps(content))
    assert refusal(model).startswith(f"{model / 'tokenizer.json'} or a file beside it is damaged (")


def test_an_empty_vocabulary(model):
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"].update(vocab={}, merges=[])
    (model / "tokenizer.json").write_text(json.dumps(content))
    (model / "generation_config.json").unlink()
    edit(model / "config.json", eos_token_id=None)
    assert "makes no token of a word: its vocabulary is damaged" in refusal(model)


def test_fields_of_the_wrong_kind(model):
    edit(model / "tokenizer_config.json", eos_token=5)
    assert "a file beside it is damaged (TypeError: Special token eos_token has to be" in refusal(model)


def test_a_config_json_that_transformers_does_not_take(model):
    edit(model / "config.json", tie_word_embeddings=None)
    assert refusal(model).startswith(f"{model / 'config.json'}: transformers does not take it (StrictDataclassField")
    assert "tie_word_embeddings" in refusal(model)


def test_a_link_whose_file_is_gone(model):
    (model / "tokenizer_config.json").unlink()
    (model / "tokenizer_config.json").symlink_to("nowhere")
    assert refusal(model) == f"{model / 'tokenizer_config.json'}: not found"


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/rag.jinja"])
def test_a_template_that_is_no_text(model, name):
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes(b"\xff\xfe{")
    assert refusal(model).startswith(f"{model / name}: cannot be read as text: save it as UTF-8")


def test_code_of_others_is_not_run_and_nothing_is_asked(model):
    edit(model / "tokenizer_config.json", tokenizer_class="Theirs", auto_map={"AutoTokenizer": ["theirs.Theirs", None]})
    (model / "theirs.py").write_text("raise SystemExit('it ran')")
    assert "auto_map names code of the model's own, which is not run" in refusal(model)


def test_no_tokenizer_at_all(model):
    (model / "tokenizer.json").unlink()
    assert (
        refusal(model)
        == f"{model}: no tokenizer can be loaded, as it has no tokenizer.json: copy the model's tokenizer files"
    )


# ---- templates with names


def test_the_default_of_several_templates(model):
    templates = {"default": chat_models.NEVER_ASKS.replace("<|'", "<<'"), "tool_use": "tools"}
    (model / "chat_template.jinja").unlink()
    edit(model / "tokenizer_config.json", chat_template=[{"name": n, "template": t} for n, t in templates.items()])
    chat = load_chat(model, "chat")
    assert chat.codec.tokenizer.decode(chat.generation_prompt(HI)).endswith("Hi</s>\n<<assistant|>\n")
    edit(model / "tokenizer_config.json", chat_template=None)
    (model / "chat_template.jinja").write_text(templates["default"])
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    np_same = load_chat(model, "chat").generation_prompt(HI).tolist()
    assert np_same == chat.generation_prompt(HI).tolist()
    (model / "chat_template.jinja").unlink()
    assert "of the tokenizer's chat templates (tool_use) none is named default" in refusal(model)


# ---- tokenizer.model


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> pathlib.Path:
    """A directory whose tokenizer is a SentencePiece model alone."""
    sentencepiece = pytest.importorskip("sentencepiece")
    directory = tmp_path_factory.mktemp("pieces")
    (directory / "text").write_text("once upon a time there was a quick brown fox\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text"),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": chat_models.LLAMA_2}
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} | names))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    return directory


def test_a_sentencepiece_model_alone(pieces):
    chat = load_chat(pieces, "chat")
    assert chat.stop_ids == (2,)
    assert chat.codec.decode(chat.real_response(HI, "once upon </s> a time")) == "once upon </s> a time "


@pytest.mark.parametrize("missing", ["sentencepiece", "google.protobuf"])
def test_without_sentencepiece_the_extra_is_named(pieces, missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from spin_jax.data.chat_format import load_chat\nimport pathlib\n"
        f"load_chat(pathlib.Path({str(pieces)!r}), 'chat')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=120)
    assert run.stderr.splitlines()[-1] == (
        f"spin_jax.errors.UserError: {pieces / 'tokenizer.model'}: without a tokenizer.json it is read with "
        "sentencepiece, which is not installed: pip install 'spin_jax[sentencepiece]'"
    )
    setup = (pathlib.Path(__file__).parents[2] / "setup.py").read_text()
    assert '"sentencepiece": ["sentencepiece' in setup


@pytest.mark.parametrize(
    "content, why",
    [
        (b"", "empty"),
        (POINTER.encode(), "Git LFS pointer"),
        (b"IQ== 0\nIg== 1\nIw== 2\n" * 9, "is a tiktoken file"),
        (b"\x0a\x0e\x0a\x05\xff\xfe" * 20, "no SentencePiece model can be read from it"),
    ],
)
def test_a_tokenizer_model_that_is_none(pieces, tmp_path, content, why):
    for name in ("tokenizer_config.json", "config.json"):
        (tmp_path / name).write_text((pieces / name).read_text())
    (tmp_path / "tokenizer.model").write_bytes(content)
    assert refusal(tmp_path).startswith(f"{tmp_path / 'tokenizer.model'}: ") and why in refusal(tmp_path)
