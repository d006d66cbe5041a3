"""What the chat format finds, said where it is used: in a run, by `generate`, from Python; before weights are read."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import tiny_files

import spin_jax
from spin_jax import checkpoints
from spin_jax.self_play.algorithm import self_play
from spin_jax.self_play.run import open_run


def chat_model(directory: pathlib.Path, tiny_model: pathlib.Path, **changes) -> pathlib.Path:
    """The tiny model with another tokenizer: `changes` are its chat_template, and `added` tokens."""
    shutil.copytree(tiny_model, directory)
    tokenizer = tiny_files.character_tokenizer()
    tokenizer.chat_template = changes.get("chat_template", tiny_files.TEMPLATE)
    tokenizer.add_tokens(changes.get("added", []))
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("row", [{"prompt": "a<7>", "response": "b"}, {"prompt": "a", "response": "b<7>"}])
def test_rows_with_tokens_beyond_the_embedding_stop_a_run_before_weights_are_read(tiny_model, tmp_path, row):
    model = chat_model(tmp_path / "model", tiny_model, added=[f"<{i}>" for i in range(9)])
    (model / "model.safetensors").write_bytes(b"")
    data = tiny_files.write_jsonl(tmp_path / "rows.jsonl", [*tiny_files.make_rows(), row])
    beyond = r"row 24: token '<7>' has the id 106, but the model's vocabulary ends at 103 \(vocab_size=104 in"
    with pytest.raises(spin_jax.UserError, match=beyond):
        open_run(tiny_files.make_config(model, data), tmp_path / "run")
    if "<7>" in row["prompt"]:
        with pytest.raises(spin_jax.UserError, match=beyond):
            spin_jax.answer(model, data, tmp_path / "answers.jsonl", tiny_files.SETTINGS)


def test_an_end_beyond_the_embedding_is_refused_by_load_before_weights(tiny_model, tmp_path):
    template = tiny_files.TEMPLATE.replace("eos_token", "'<8>'")
    model = chat_model(tmp_path / "model", tiny_model, added=[f"<{i}>" for i in range(9)], chat_template=template)
    (model / "model.safetensors").write_bytes(b"")
    with pytest.raises(spin_jax.UserError, match="token '<8>' has the id 107, but the model's vocabulary ends at 103"):
        spin_jax.load(model)


def test_a_prompt_with_tokens_beyond_the_embedding_is_not_sampled_from(tiny_model, tmp_path):
    model = spin_jax.load(chat_model(tmp_path / "model", tiny_model, added=[f"<{i}>" for i in range(9)]))
    with pytest.raises(spin_jax.UserError, match="^prompt 1, 2: token '<8>' has the id 107"):
        model.sample(["abc", "a<8>", "b<8>"])


def test_a_run_says_how_many_prompts_lose_their_beginning(tiny_model, tiny_data, tmp_path, caplog):
    config = tiny_files.make_config(tiny_model, tiny_data, {"data.max_prompt_length": 9})
    run = open_run(config, tmp_path)
    cut = [row for row, tokens in run.tokens.items() if len(tokens.asked) > 9]
    assert 0 < len(cut) < len(run.tokens)
    assert (
        f"{tiny_data}: {len(cut)} of 24 prompts lose their beginning (BOS, a system turn), being longer than "
        f"--config.data.max_prompt_length=9, the first in row {min(cut)}:"
    ) in caplog.text


def test_text_stays_text_in_a_run_and_the_switch_changes_its_token_ids(tiny_model, tmp_path):
    rows = [{"prompt": f"a</s>{row}", "response": f"b</s>{row}"} for row in range(24)]
    data = tiny_files.write_jsonl(tmp_path / "rows.jsonl", rows)
    text = open_run(tiny_files.make_config(tiny_model, data), tmp_path / "text")
    shutil.copytree(tmp_path / "text", tmp_path / "parsed")  # with its token ids
    (tmp_path / "parsed" / "config.json").unlink()
    changes = {"data.parse_special_tokens": True}
    parsed = open_run(tiny_files.make_config(tiny_model, data, changes), tmp_path / "parsed")
    decode, eos = text.chat.codec.tokenizer.decode, text.chat.codec.tokenizer.eos_token_id
    for row in (0, 9):
        assert decode(text.tokens[row].real) == f"b</s>{row}</s>" and decode(parsed.tokens[row].real) == "b</s>"
        counts = [np.count_nonzero(run.tokens[row].asked == eos) for run in (text, parsed)]
        assert counts == [1, 2]


def test_paper_from_python(tiny_model, tmp_path):
    """What the refusal of a tokenizer without a chat template advises."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    with pytest.raises(spin_jax.UserError, match='or set template="paper"$'):
        spin_jax.load(model)
    loaded = spin_jax.load(model, template="paper")
    assert len(loaded.sample(["abc"], max_new_tokens=4)) == 1
    overrides = {**tiny_files.SETTINGS, "iterations": 1}
    trained = spin_jax.spin(loaded, tiny_files.make_rows(), tmp_path / "run", overrides)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data.template"] == "paper"
    assert trained.chat.name == "paper"
    np.testing.assert_array_equal(
        trained.chat.generation_prompt([{"role": "user", "content": "abc"}]),
        loaded.chat.codec.encode("### Instruction: abc\n\n### Response: "),
    )


def test_named_templates_are_in_the_model_that_a_run_makes(tiny_model, tiny_data, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    config = tiny_files.make_config(model, tiny_data, {"iterations": 1})
    self_play(config, tmp_path / "run")
    made = tmp_path / "run" / "iteration_0" / "model"
    assert (made / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"
    assert spin_jax.load(made).chat.codec.tokenizer.chat_template.keys() == {"default", "tool_use"}


@pytest.mark.parametrize("cap, warns", [(1, True), (60, False)])
def test_a_model_that_hardly_ends_is_told_of_once(tiny_model, tiny_data, tmp_path, caplog, cap, warns):
    params = checkpoints.load(tiny_model)[1]
    if not warns:  # a model that ends soon
        config = checkpoints.read_config(tiny_model)
        params["lm_head"] = 0 * params["lm_head"]
        checkpoints.save(tmp_path / "model", config, params, source=tiny_model, dtype=np.float32)
    changes = {"iterations": 2, "generate.max_new_tokens": cap, "generate.temperature": 0.3, "data.max_length": 80}
    config = tiny_files.make_config(tmp_path / "model" if not warns else tiny_model, tiny_data, changes)
    self_play(config, tmp_path / "run", ["generate"])
    said = [r.message for r in caplog.records if "responses ended:" in r.message]
    assert len(said) == warns
    if warns:
        assert said[0].endswith("or it was never trained to end") and "--config.generate.max_new_tokens=1 is" in said[0]
