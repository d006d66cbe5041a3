"""What tells one model from another: what is loaded, never a path, a time or a file beside it."""

import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny_files

from spin_jax import checkpoints
from spin_jax.checkpoints import fingerprints
from spin_jax.errors import UserError

PARTS = {"architecture", "weights", "tokenizer", "chat template", "stop ids"}


@pytest.fixture
def model(tmp_path) -> pathlib.Path:
    return tiny_files.write_model(tmp_path / "model")


def changed(before: dict[str, str], directory: pathlib.Path) -> set[str]:
    after = checkpoints.fingerprint(directory)
    assert after.keys() == before.keys() == PARTS
    return {part for part in PARTS if after[part] != before[part]}


def flip(file: pathlib.Path, position: int) -> None:
    """One bit of a file, which keeps its size."""
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def edit(file: pathlib.Path, **fields) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | fields))


def test_a_moved_or_resharded_copy_agrees(model, tmp_path):
    before = checkpoints.fingerprint(model)
    moved = shutil.move(model, tmp_path / "elsewhere" / "renamed")
    for file in pathlib.Path(moved).iterdir():
        os.utime(file, (1, 1))
    (moved / ".cache" / "huggingface").mkdir(parents=True)
    (moved / "README.md").write_text("a model card")
    (moved / "tokenizer_backup").mkdir()
    assert changed(before, moved) == set()
    config, params = checkpoints.load(moved)
    checkpoints.save(tmp_path / "sharded", config, params, source=moved, dtype=np.float32, max_shard_bytes=20_000)
    assert not (tmp_path / "sharded" / "model.safetensors").exists()
    assert changed(before, tmp_path / "sharded") == set()


def test_each_change_is_named(model):
    before = checkpoints.fingerprint(model)
    steps = [
        (lambda: flip(model / "model.safetensors", -1), {"weights"}),
        (lambda: edit(model / "tokenizer_config.json", model_max_length=77), {"weights", "tokenizer"}),
        (lambda: edit(model / "generation_config.json", eos_token_id=[1, 2]), {"weights", "tokenizer", "stop ids"}),
        (lambda: (model / "chat_template.jinja").write_text("x"), PARTS - {"architecture"}),
        (lambda: edit(model / "config.json", rope_theta=5e5, rope_parameters=None), PARTS),
    ]
    for step, expected in steps:
        step()
        assert changed(before, model) == expected


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"])
def test_a_template_wherever_it_is(model, name):
    before = checkpoints.fingerprint(model)
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("other")
    assert changed(before, model) == {"chat template"}
    edit(model / "tokenizer_config.json", chat_template="a third")
    assert changed(before, model) == {"chat template"}


def test_what_changes_nothing_that_is_loaded(model):
    before = checkpoints.fingerprint(model)
    edit(model / "config.json", transformers_version="0", torch_dtype="float16", use_cache=False, _name_or_path="x")
    edit(model / "generation_config.json", temperature=0.6)
    assert changed(before, model) == set()


def test_without_weights(model):
    every = checkpoints.fingerprint(model)
    (model / "model.safetensors").unlink()
    assert checkpoints.fingerprint(model, weights=False) == {part: every[part] for part in PARTS - {"weights"}}
    with pytest.raises(UserError, match="has neither model.safetensors nor"):
        checkpoints.fingerprint(model)


def test_large_weights_are_sampled_in_every_tensor(model, monkeypatch):
    """Past `_WHOLE` bytes: a tensor that was trained is seen, whichever it is, and most bytes are not read."""
    file = model / "model.safetensors"
    size = file.stat().st_size
    monkeypatch.setattr(fingerprints, "_WHOLE", size // 8)
    monkeypatch.setattr(fingerprints, "_BLOCK", 64)
    before = checkpoints.fingerprint(model)
    config, params = checkpoints.load(model)
    for name, _ in jax.tree.leaves_with_path(params):
        tuned = jax.tree.map_with_path(lambda path, x, name=name: x * 1.01 if path == name else x, params)
        checkpoints.save(model.parent / "tuned", config, tuned, source=model, dtype=np.float32)
        assert changed(before, model.parent / "tuned") == {"weights"}, name
    noticed = 0
    for position in range(-size // 2, -1, size // 120):
        flip(file, position)
        noticed += changed(before, model) == {"weights"}
        flip(file, position)
    assert 3 < noticed < 20
