"""Model directories as people have them: what else they hold, what is damaged in them, how they are named."""

import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny_files
from etils import epath

from spin_jax import checkpoints
from spin_jax.checkpoints.directory import FETCHED, VARIANTS
from spin_jax.errors import UserError
from spin_jax.models import ModelConfig
from spin_jax.self_play.run import open_run

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CONFIG = (GOLDEN / "llama2" / "config.json").read_bytes()

# What stands beside a model, from Hub repositories and training programs; a name that ends in / is a folder.
BESIDE = """
tokenizer_backup/tokenizer.json tokenizer.json.d/ model.safetensors.d/ model-old.safetensors/ chat_template_old/x.jinja
original/consolidated.00.pth original/params.json original/tokenizer.model onnx/config.json onnx/model.onnx
.cache/huggingface/download/config.json.metadata .git/HEAD .gitattributes .DS_Store checkpoint-5/config.json
adapter_model.safetensors adapter_config.json consolidated.safetensors model.fp16.safetensors pytorch_model.bin
model.q4.gguf training_args.bin trainer_state.json optimizer.pt params.json README.md LICENSE config.json.bak
additional_chat_templates/notes.txt
""".split()
# What a tokenizer of one class or another is read from, and what belongs to it.
TOKENIZER = """
additional_chat_templates/tool_use.jinja added_tokens.json merges.txt processor_config.json qwen.tiktoken
sentencepiece.bpe.model special_tokens_map.json spiece.model tekken.json tokenization_mine.py tokenizer.model vocab.txt
""".split()
OURS = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
WRITTEN = {"config.json", "generation_config.json", "model.safetensors"}


@pytest.fixture
def checkpoint(tmp_path) -> pathlib.Path:
    return shutil.copytree(GOLDEN / "llama2", tmp_path / "checkpoint")


@pytest.fixture
def crowded(tmp_path) -> pathlib.Path:
    """A model that runs, in a directory with everything that people have beside one."""
    directory = tiny_files.write_model(tmp_path / "crowded [1] {a} *")
    for name in (*BESIDE, *TOKENIZER):
        file = directory / name
        (file if name.endswith("/") else file.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            file.write_text("{}" if name.endswith(".json") else f"{name}\n")
    (directory / "tokenizer_old.json").symlink_to("nowhere")
    (directory / "itself").symlink_to(".")
    return directory


def files_of(directory: pathlib.Path) -> set[str]:
    return {str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()}


def refusal(directory: pathlib.Path) -> str:
    with pytest.raises(UserError) as error:
        checkpoints.load(directory)
    assert "\n" not in str(error.value) and str(directory) in str(error.value)
    return str(error.value)


# ---- What stands beside a model


def test_what_stands_beside_a_model_changes_nothing(crowded, tmp_path):
    plain = tiny_files.write_model(tmp_path / "plain")
    jax.tree.map(np.testing.assert_array_equal, checkpoints.load(crowded)[1], checkpoints.load(plain)[1])
    data = tiny_files.write_jsonl(tmp_path / "rows.jsonl", tiny_files.make_rows())
    runs = [open_run(tiny_files.make_config(model, data), tmp_path / model.name / "run") for model in (crowded, plain)]
    for row, tokens in runs[1].tokens.items():
        np.testing.assert_equal(runs[0].tokens[row], tokens)
    assert checkpoints.fingerprint(crowded)["weights"] == checkpoints.fingerprint(plain)["weights"]


def test_an_export_has_the_tokenizer_and_its_templates_alone(crowded, tmp_path):
    config, params = checkpoints.load(crowded)
    checkpoints.save(tmp_path / "out", config, params, source=crowded)
    assert files_of(tmp_path / "out") == OURS | WRITTEN | set(TOKENIZER)
    for name in (*OURS, *TOKENIZER):
        assert (tmp_path / "out" / name).read_bytes() == (crowded / name).read_bytes()


def test_an_export_has_nothing_of_an_older_tokenizer(crowded, tmp_path):
    """transformers would take a template's file before that of tokenizer_config.json."""
    config, params = checkpoints.load(crowded)
    checkpoints.save(tmp_path / "out", config, params, source=crowded)
    (tmp_path / "out" / "notes.txt").write_text("the user's own")
    plain = tiny_files.write_model(tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    checkpoints.save(tmp_path / "out", config, params, source=plain)
    assert files_of(tmp_path / "out") == (OURS | WRITTEN | {"notes.txt"}) - {"chat_template.jinja"}


def test_an_export_travels_whole_to_an_object_store_and_back(crowded, tmp_path, monkeypatch):
    config, params = checkpoints.load(crowded)
    monkeypatch.setattr("spin_jax.checkpoints.directory.is_remote", lambda path: True)
    with checkpoints.uploaded(epath.Path(tmp_path / "store" / "model")) as local:
        checkpoints.save(local, config, params, source=crowded, dtype=np.float32)
    assert files_of(tmp_path / "store" / "model") == OURS | WRITTEN | set(TOKENIZER)
    with checkpoints.downloaded(epath.Path(crowded)) as local:
        jax.tree.map(np.testing.assert_array_equal, checkpoints.load(local)[1], params)


def test_everything_that_generation_config_says_is_kept(checkpoint, tmp_path):
    said = {"eos_token_id": [2, 5], "temperature": 0.6, "top_k": 7, "suppress_tokens": [1], "mine": {"a": [None]}}
    (checkpoint / "generation_config.json").write_text(json.dumps(said))
    checkpoints.save(tmp_path / "out", *checkpoints.load(checkpoint), source=checkpoint)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {key: written[key] for key in said} == said


def test_an_export_from_a_source_that_has_gone_is_refused(checkpoint, tmp_path):
    """It would have no tokenizer."""
    config, params = checkpoints.load(checkpoint)
    shutil.rmtree(checkpoint)
    with pytest.raises(UserError, match="config.json: not found"):
        checkpoints.save(tmp_path / "out", config, params, source=checkpoint)


def test_the_hubs_cache_of_links_is_a_model(checkpoint, tmp_path):
    """Blobs by their hash, read-only, and a snapshot of links to them."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    (checkpoint / "tokenizer.json").write_text("{}")
    for i, file in enumerate(checkpoint.iterdir()):
        shutil.copy(file, blobs / str(i)).chmod(0o444)
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    config, params = checkpoints.load(snapshot)
    for _ in range(2):  # the second overwrites what the first has written
        checkpoints.save(tmp_path / "out", config, params, source=snapshot, dtype=np.float32)
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert checkpoints.fingerprint(snapshot) == checkpoints.fingerprint(checkpoint)
    assert f"such as {snapshot}" in refusal(snapshot.parents[1])
    (blobs / str([file.name for file in checkpoint.iterdir()].index("model.safetensors"))).unlink()
    assert "model.safetensors: a link whose file is gone" in refusal(snapshot)


def test_one_file_is_read_before_shards(checkpoint, caplog):
    """As transformers does it, and it is said."""
    config, params = checkpoints.load(checkpoint)
    other = jax.tree.map(lambda x: x + 1, params)
    checkpoints.save(checkpoint.parent / "sharded", config, other, dtype=np.float32, max_shard_bytes=20_000)
    for file in (checkpoint.parent / "sharded").glob("model*"):
        shutil.copy(file, checkpoint)
    jax.tree.map(np.testing.assert_array_equal, checkpoints.load(checkpoint)[1], params)
    assert "has both model.safetensors, which is read" in caplog.text


def test_what_is_fetched_from_the_hub():
    from huggingface_hub.utils import filter_repo_objects

    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    adapter = {"adapter_config.json", "adapter_model.safetensors"}  # small, and where no model is a start as well
    needed = {*WRITTEN, *OURS, *TOKENIZER, *shards, *adapter}
    large = {name for name in BESIDE if name.endswith((".safetensors", ".pth", ".onnx", ".bin", ".gguf", ".pt"))}
    large -= adapter
    fetched = set(filter_repo_objects({*needed, *BESIDE}, allow_patterns=FETCHED, ignore_patterns=VARIANTS))
    assert fetched >= needed and not fetched & large


# ---- What is damaged

DAMAGED = {
    b"": "empty",
    b" \n": "empty",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n": "git lfs pull",
    b"\xef\xbb\xbf" + CONFIG: "byte-order mark",
    CONFIG.decode().encode("utf-16"): "byte-order mark",
    b"[1]": "JSON list",
    b"{": "not JSON",
    b"null": "not an object",
    CONFIG[:50]: "not JSON",
    b'{"a": "\xe9"}': "not JSON",
    b"[" * 100_000: "not JSON",
    b"<!doctype html>": "not JSON",
}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_json_file_is_named(checkpoint, tmp_path, name, content):
    (checkpoint / name).write_bytes(content)
    if name == "model.safetensors.index.json":
        (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UserError) as error:
        checkpoints.save(tmp_path / "out", *checkpoints.load(checkpoint), source=checkpoint)
    assert str(error.value).startswith(f"{checkpoint / name}: ") and DAMAGED[content] in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=str(checkpoint / name)):
        checkpoints.fingerprint(checkpoint)


def test_a_link_whose_file_is_gone_is_not_an_absent_file(checkpoint, tmp_path):
    (checkpoint / "generation_config.json").unlink()
    (checkpoint / "generation_config.json").symlink_to("nowhere")
    with pytest.raises(UserError, match="generation_config.json: not found"):
        checkpoints.save(tmp_path / "out", *checkpoints.load(checkpoint), source=checkpoint)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 5}, {"a": {"b": "c"}}, "model.safetensors"])
def test_an_index_that_maps_no_tensors_to_files(checkpoint, weight_map):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "weight_map does not give each tensor" in refusal(checkpoint)


def test_an_index_that_names_what_is_no_file(tmp_path):
    checkpoints.save(tmp_path, *checkpoints.load(GOLDEN / "llama2"), max_shard_bytes=20_000)
    second = next(tmp_path.glob("model-00002*"))
    second.unlink()
    assert f"{second}: not found" in refusal(tmp_path)
    second.mkdir()
    assert f"{second}: not found" in refusal(tmp_path)


def test_a_tensor_in_two_shards_is_named(tmp_path):
    checkpoints.save(tmp_path, *checkpoints.load(GOLDEN / "llama2"), max_shard_bytes=20_000)
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    tensors = safetensors.numpy.load_file(second) | {"model.norm.weight": np.ones(32, np.float32)}
    safetensors.numpy.save_file(tensors, second)
    tensors = safetensors.numpy.load_file(first) | {"model.norm.weight": np.zeros(32, np.float32)}
    safetensors.numpy.save_file(tensors, first)
    assert f"{second}: holds model.norm.weight, as {first.name} does" in refusal(tmp_path)


@pytest.mark.parametrize(
    "names, expected",
    [
        ("adapter_config.json adapter_model.safetensors", "merge_and_unload"),
        ("config.json adapter_config.json adapter_model.safetensors", "merge_and_unload"),
        ("model.Q4_K_M.gguf", "GGUF"),
        ("params.json consolidated.00.pth tokenizer.model", "maker's own names"),
        ("config.json consolidated.safetensors", "maker's own names"),
        ("config.json model.fp16.safetensors", "rename the one that you want to model.safetensors"),
        ("config.json model-00001-of-00002.safetensors", "has weights without model.safetensors.index.json"),
        ("config.json pytorch_model-00001-of-00002.bin", "safe_serialization=True"),
        ("config.json training_args.bin", "has neither model.safetensors nor"),
        ("model.safetensors onnx/config.json", "config.json: not found"),
        ("", "config.json: not found"),
        ("checkpoint-500/config.json checkpoint-1000/config.json", "such as {}/checkpoint-1000"),
        ("iteration_0/model/config.json metrics.jsonl", "such as {}/iteration_0/model"),
    ],
)
def test_what_is_there_in_the_place_of_a_model(tmp_path, names, expected):
    for name in names.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(CONFIG)
    assert expected.format(tmp_path) in refusal(tmp_path)


def test_a_runs_workdir_is_not_its_model(tmp_path):
    """It has a config.json, that of the run."""
    (tmp_path / "config.json").write_text('{"seed": 0}')
    assert f"{tmp_path / 'config.json'}: has no model_type" in refusal(tmp_path)
    shutil.copytree(GOLDEN / "llama2", tmp_path / "iteration_0" / "model")
    assert f"such as {tmp_path}/iteration_0/model" in refusal(tmp_path)


# ---- How a model is named


def test_a_directory_goes_before_a_repository_of_its_name(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, "owner/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("owner/name", "owner/name/", "./owner/name//", "~/owner/name", pathlib.Path("owner/name")):
        assert checkpoints.resolve(name).samefile(tmp_path / "owner" / "name")
    with pytest.raises(UserError, match="a directory has no revision"):
        checkpoints.resolve("owner/name", "main")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("absent", "did not give it"),
        ("./absent", "no such directory"),
        ("/absent", "no such directory"),
        ("a/b/c", "owner/name"),
        ("~/absent", "no such directory"),
        ("~nobody_of_this_name/absent", "no such directory"),
        ("checkpoint/config.json", "a file; name the directory that holds it: checkpoint"),
        ("checkpoint/model.safetensors/", "a file; name the directory that holds it: checkpoint"),
        ("loop", "a link that leads to no directory"),
        ("loop/", "a link that leads to no directory"),
        ("gs://bucket/model", "copy the model to this machine"),
        ("https://huggingface.co/nobody/nothing", "^nobody/nothing: no directory here"),
        ("nobody/nothing/", "^nobody/nothing: no directory here.*hf auth login"),
        ("", "no such directory"),
        ("a\0b", "no such directory"),
        ("x" * 5000, "did not give it"),
    ],
)
def test_names_that_lead_to_no_model(checkpoint, monkeypatch, name, expected):
    monkeypatch.chdir(checkpoint.parent)
    os.symlink("loop", "loop")
    with pytest.raises(UserError, match=expected) as error:
        checkpoints.resolve(name)
    assert "\n" not in str(error.value)


def test_a_revision_that_the_hub_does_not_give():
    with pytest.raises(UserError, match="nobody/nothing at revision 'v1': no directory here.*hf auth login"):
        checkpoints.resolve("nobody/nothing", "v1")


def test_hub_names_are_found_in_the_cache(tmp_path, monkeypatch):
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(GOLDEN / "llama2", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert checkpoints.resolve("someone/tiny") == repository / "snapshots" / commit
    config, _ = checkpoints.load("someone/tiny", revision=commit)
    assert isinstance(config, ModelConfig)
