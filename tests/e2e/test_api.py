import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_files

import spin_jax
from spin_jax.runtime.metric_writer import read_metrics


@pytest.fixture(scope="module")
def model(tiny_model) -> spin_jax.Model:
    return spin_jax.load(tiny_model)


def test_an_answer_depends_on_its_place_and_the_seed_alone(model):
    settings = {"max_new_tokens": 6, "seed": 3}
    alone, many = model.sample(["abc"], **settings), model.sample(["abc", "hgfedcb"], **settings)
    assert all(isinstance(answer, str) and 0 < len(answer) <= 6 for answer in many)
    assert alone[0] == many[0]
    assert model.sample([[{"role": "user", "content": "abc"}]], **settings) == alone
    assert model.sample(["abc"], max_new_tokens=6, seed=4) != alone


def test_greedy_answers_have_no_seed(model):
    greedy = [model.sample(["abc"], max_new_tokens=6, temperature=0, seed=seed) for seed in range(2)]
    assert greedy[0] == greedy[1] == model.sample(["abc"], max_new_tokens=6, top_k=1)


def test_half_a_character_is_replaced_and_counted(model, caplog):
    settings = {"max_new_tokens": 4, "temperature": 0}
    assert model.sample(["a\ud83d", "b"], **settings) == model.sample(["a\ufffd", "b"], **settings)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "prompts: text that cannot be encoded (half an emoji, say) replaced by U+FFFD: 1 (rows 0)"
    ]


def test_nothing_asked_nothing_answered(model):
    assert model.sample([]) == []


def test_an_engine_draws_what_sample_does_and_any_further_responses(model):
    prompts = model.encode(["abc", "hgfedcb"])
    engine = model.engine(max_new_tokens=6, responses=2)
    drawn = engine.generate(model.params, prompts, seed=3)
    assert [(one.row, one.number) for one in drawn] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    texts = [model.decode(one.tokens) for one in drawn]
    assert texts[::2] == model.sample(["abc", "hgfedcb"], max_new_tokens=6, seed=3)
    assert [model.decode(one.tokens) for one in engine.generate(model.params, {1: prompts[1]}, seed=3)] == texts[2:]


def test_logprobs_are_of_the_text_and_its_end(model):
    prompts, responses = ["abc", "h"], [["cba", "abc", ""], ["h"]]
    logps = model.logprobs(prompts, responses)
    ids = [[[*model.chat.codec.encode(text), *model.chat.stop_ids[:1]] for text in row] for row in responses]
    scorer = model.scorer(compute_dtype="float32")
    expected = scorer.logprobs(model.params, model.encode(prompts), ids)
    np.testing.assert_allclose(logps, expected, atol=1e-4)
    assert logps.shape == (2, 3) and np.isnan(logps[1, 1:]).all()
    np.testing.assert_allclose(model.logprobs(prompts, ["abc", "h"]), [logps[0, 1], logps[1, 0]], atol=1e-4)
    assert model.logprobs([], []).shape == (0,)


def test_a_model_computes_on_the_devices_that_hold_its_params(model, tiny_model):
    spread = spin_jax.load(tiny_model, devices=jax.devices())
    assert len(spread.params["lm_head"].sharding.device_set) == 8 == spread.engine().execution.mesh.size
    prompts = ["abc", "hgfedcb", "d"]
    settings = {"max_new_tokens": 6, "temperature": 0}
    assert spread.sample(prompts, **settings) == model.sample(prompts, **settings)
    responses = [["cba", "c"], ["b"], ["d", "dd"]]
    np.testing.assert_allclose(spread.logprobs(prompts, responses), model.logprobs(prompts, responses), atol=1e-3)


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        (["abc"], ["a", "b"], "1 prompts, 2 responses: give one, or a list, for each prompt"),
        (["abc", " "], ["a", "b"], "prompt 1: empty prompt cannot be asked"),
        ("abc", ["a", "b", "c"], "prompts must be a list"),
    ],
)
def test_scoring_mistakes_are_one_line(model, prompts, responses, message):
    with pytest.raises(spin_jax.UserError, match=message):
        model.logprobs(prompts, responses)


def test_saving_and_loading_changes_nothing(model, tmp_path):
    model.save(tmp_path / "saved")
    loaded = spin_jax.load(tmp_path / "saved")
    assert loaded.config == model.config and loaded.chat.stop_ids == model.chat.stop_ids
    np.testing.assert_array_equal(loaded.params["embed"]["embedding"], model.params["embed"]["embedding"])
    saved = (tmp_path / "saved" / "model.safetensors").read_bytes()
    assert saved == (model.directory / "model.safetensors").read_bytes()


def test_spin_on_a_list_is_the_run_on_a_file(model, finished, tmp_path):
    overrides = {**tiny_files.SETTINGS, "iterations": 1}
    trained = spin_jax.spin(model, tiny_files.make_rows(), tmp_path, overrides)
    assert trained.directory == tmp_path / "iteration_0" / "model"
    of_the_file = spin_jax.load(finished.workdir / "iteration_0" / "model")
    np.testing.assert_array_equal(trained.params["lm_head"], of_the_file.params["lm_head"])
    assert len(read_metrics(tmp_path / "iteration_0" / "metrics.jsonl")) == 2
    # Called again, it is done already; with other examples, it is another run.
    again = spin_jax.spin(model, tiny_files.make_rows(), tmp_path, overrides)
    np.testing.assert_array_equal(again.params["lm_head"], trained.params["lm_head"])
    with pytest.raises(spin_jax.UserError, match="examples.jsonl holds other examples"):
        spin_jax.spin(model, tiny_files.make_rows()[1:], tmp_path, overrides)
    assert len((tmp_path / "examples.jsonl").read_text().splitlines()) == len(tiny_files.make_rows())


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"train.batchsize": 8}, '"train.batchsize" is not a field: did you mean "train.batch_size"?'),
        (
            {"spin.beta": "0.1"},
            '"spin.beta": 0.1 must be a tuple of numbers, not text: write it as "spin.beta": (0.1,)',
        ),
        ({"spin.loss": "hings"}, '"spin.loss": "hings" is not one of logistic'),
        ({"iterations": 0}, '"iterations": 0 must be at least 1'),
        ({"seed": 2**31}, '"seed": 2147483648 must be at most 2147483647'),
        ({"train.epochs": 10**400}, '"train.epochs": '),
        (
            {"mesh.tensor": 3},
            '"mesh.data": 1 "mesh.fsdp": -1 "mesh.tensor": 3 do not make 8 devices: write "mesh.fsdp": 8 ',
        ),
        ({}, "24 rows x 2 epochs do not fill one batch of 64"),  # before anything is sampled
    ],
)
def test_mistakes_are_one_line(model, tmp_path, overrides, message):
    with pytest.raises(spin_jax.UserError) as refused:
        spin_jax.spin(model, tiny_files.make_rows(), tmp_path, overrides)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)
    assert not (tmp_path / "iteration_0").exists()


def test_an_example_that_is_wrong_is_named(model, tmp_path):
    rows = [*tiny_files.make_rows(), {"prompt": 5, "response": "x"}]
    with pytest.raises(spin_jax.UserError, match=r"examples.jsonl.*25.*"):
        spin_jax.spin(model, rows, tmp_path, tiny_files.SETTINGS)


@pytest.mark.parametrize(
    ("examples", "overrides", "message"),
    [
        ("rows.jsonl", {}, "examples must be a list of rows, not 'rows.jsonl': read the file first"),
        (["abc"], {}, "example 0 is no row of JSON"),
        ([{"prompt": "a", "response": {1, 2}}], {}, "example 0 is no row of JSON (Object of type set"),
        ([], {"data.train": "rows.jsonl"}, '"data.train" is what `model` and `examples` say: leave it out'),
    ],
)
def test_what_is_no_list_of_rows_is_refused_before_anything_is_written(model, tmp_path, examples, overrides, message):
    with pytest.raises(spin_jax.UserError) as refused:
        spin_jax.spin(model, examples, tmp_path / "run", overrides)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_directory_without_a_model_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_files.HUGGINGFACE))
    with pytest.raises(spin_jax.UserError) as refused:
        spin_jax.load(tmp_path)
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


def test_the_model_in_memory_is_what_plays(model, tmp_path):
    changed = dataclasses.replace(model, params=jax.tree.map(lambda x: x * 0.5, model.params))
    spin_jax.spin(changed, tiny_files.make_rows(), tmp_path, {**tiny_files.SETTINGS, "iterations": 1})
    start = spin_jax.load(tmp_path / "start")
    np.testing.assert_array_equal(start.params["lm_head"], changed.params["lm_head"])


@pytest.mark.parametrize(
    "prompts, settings, message",
    [
        ("abc", {}, "prompts must be a list"),
        (["abc", " "], {}, "prompt 1: empty prompt cannot be asked"),
        ([[{"role": who, "content": "a"} for who in ("user", "assistant")]], {}, "ends in the assistant's turn"),
        (["abc"], {"max_new_tokens": 0}, "^max_new_tokens=0 must be at least 1"),
        (["abc"], {"temperature": -1.0}, "^temperature=-1.0 must be at least 0"),
        (["abc"], {"max_new_tokens": 2.5}, "^max_new_tokens=2.5 must be a whole number"),
        (["abc"], {"top_p": 1.5}, "^top_p=1.5 must be at most 1"),
        (["abc"], {"seed": 2**31}, "^seed=2147483648 must be at most 2147483647"),
    ],
)
def test_sampling_mistakes_are_one_line(model, prompts, settings, message):
    with pytest.raises(spin_jax.UserError, match=message):
        model.sample(prompts, **settings)


def test_a_field_that_engines_do_not_have_is_refused(model):
    with pytest.raises(spin_jax.UserError, match="tempature.*temperature"):
        model.engine(tempature=0.5)
