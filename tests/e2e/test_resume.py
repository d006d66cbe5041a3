"""Going on in a workdir: what may be another than before, what may not, and what of it is damaged."""

import json
import pathlib
import re
import shutil

import numpy as np
import pytest
import tiny_files

import spin_jax
from spin_jax.data.pairs import read_model
from spin_jax.devices import accelerators
from spin_jax.errors import UserError
from spin_jax.reports.summary import read_summary
from spin_jax.runtime import lease
from spin_jax.self_play.algorithm import self_play
from spin_jax.self_play.run import open_run


@pytest.fixture
def workdir(finished, tmp_path) -> pathlib.Path:
    """A copy of a finished run of two iterations."""
    return shutil.copytree(finished.workdir, tmp_path / "run")


@pytest.fixture
def model(tiny_model, tmp_path) -> pathlib.Path:
    """A copy of its start."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def untrain(workdir: pathlib.Path) -> None:
    """As if iteration 1 had stopped before it was trained."""
    shutil.rmtree(workdir / "iteration_1" / "model")
    (workdir / "iteration_1" / "result.json").unlink()


def refusal(config, workdir) -> str:
    with pytest.raises(UserError) as refused:
        self_play(config, workdir)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def edit(file: pathlib.Path, **fields) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | fields))


def flip(file: pathlib.Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


# ---- the start, and what it wrote


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (lambda model: flip(model / "model.safetensors"), "weights"),
        (lambda model: edit(model / "tokenizer_config.json", model_max_length=77), "tokenizer"),
        (lambda model: (model / "chat_template.jinja").write_text("{# new #}" + tiny_files.TEMPLATE), "chat template"),
        (lambda model: edit(model / "generation_config.json", eos_token_id=[97, 5]), "stop ids"),
    ],
    ids=["weights", "tokenizer", "template", "stop ids"],
)
def test_a_start_that_changed_is_refused_with_what_changed(finished, workdir, model, tiny_data, change, changed):
    config = tiny_files.make_config(model, tiny_data, {"evaluate.evaluators": ("auto",)})
    assert self_play(config, workdir) == finished.rows
    change(model)
    untrain(workdir)
    assert refusal(config, workdir) == (
        f"{model} is not the model that {workdir} was started with (changed: {changed}): put it back, or give another "
        "--workdir"
    )
    shutil.rmtree(workdir / "iteration_0")
    shutil.rmtree(workdir / "iteration_1")
    open_run(config, workdir)  # nothing in it is of the old start


def test_the_same_model_and_data_may_lie_elsewhere(finished, workdir, model, tiny_data, tmp_path, monkeypatch):
    data = shutil.copy(tiny_data, tmp_path / "renamed.jsonl")
    untrain(workdir)
    monkeypatch.chdir(tmp_path)
    config = tiny_files.make_config(
        pathlib.Path("model"), pathlib.Path("renamed.jsonl"), {"evaluate.evaluators": ("auto",)}
    )
    assert self_play(config, workdir) == finished.rows
    noted = json.loads((workdir / "config.json").read_text())
    assert (noted["model.path"], noted["data.train"]) == ("model", pathlib.Path(data).name)


def test_responses_of_another_model_are_not_trained_on(finished, workdir):
    """Whoever trains an iteration anew, otherwise than before, has the next one's responses of the old model."""
    responses = workdir / "iteration_1" / "generated"
    identity = read_model(responses / "pairs.parquet")
    assert identity["weights"] != read_model(workdir / "iteration_0" / "generated" / "pairs.parquet")["weights"]
    flip(workdir / "iteration_0" / "model" / "model.safetensors")
    untrain(workdir)
    assert refusal(finished.config, workdir) == (
        f"{responses / 'pairs.parquet'} was written by another model than that in {workdir / 'iteration_0' / 'model'} "
        f"(changed: weights): delete {responses}, and go on"
    )


def test_responses_that_another_model_began_are_not_gone_on_with(finished, workdir):
    generated = workdir / "iteration_1" / "generated"
    shutil.rmtree(workdir / "iteration_1")
    generated.mkdir(parents=True)
    (generated / "part-00000.p000.jsonl").write_text("")
    edit(generated / "settings.json", **{"model (weights)": "of another"})
    message = refusal(finished.config, workdir)
    assert message.startswith(f"{generated} holds responses of another model (") and "model (weights)" in message


def test_spin_with_another_model_in_the_same_workdir_is_refused(workdir, tiny_model, tmp_path):
    model, rows = spin_jax.load(tiny_model), tiny_files.make_rows()
    settings = tiny_files.SETTINGS | {"iterations": 1}
    workdir = tmp_path / "spun"
    trained = spin_jax.spin(model, rows, workdir, settings)
    moved = shutil.move(workdir, tmp_path / "moved")
    again = spin_jax.spin(model, rows, moved, settings)
    np.testing.assert_array_equal(again.params["lm_head"], trained.params["lm_head"])
    with pytest.raises(UserError, match=r"moved/start holds another model: give another workdir, or the model that it"):
        spin_jax.spin(trained, rows, moved, settings)


# ---- settings


def changes_accepted(workdir, model, data, **changes) -> bool:
    try:
        open_run(tiny_files.make_config(model, data, changes), workdir)
    except UserError as error:
        assert "holds a run with other settings" in str(error)
        return False
    return True


def test_sizes_that_change_no_result_may_change(workdir, tiny_model, tiny_data):
    sizes = {"batch_size": 16, "prefill_batch_size": 8, "tail_batch_size": 1, "prompt_bucket": 64}
    changes = {f"generate.{name}": size for name, size in sizes.items()}
    assert changes_accepted(workdir, tiny_model, tiny_data, **changes)


def test_a_finished_run_is_looked_at_on_devices_that_could_not_make_it(
    finished, workdir, tiny_model, tiny_data, monkeypatch
):
    monkeypatch.setattr(accelerators, "host_bytes", lambda: 2**20)
    assert self_play(finished.config, workdir) == read_summary(workdir)
    config = tiny_files.make_config(tiny_model, tiny_data, {"iterations": 3})
    assert ": too little for" in refusal(config, workdir)


def test_settings_are_fixed_by_what_was_made_with_them(finished, workdir, tiny_model, tiny_data):
    """Whoever runs out of memory before there is anything can change all settings; and so on."""
    never_begun = {"sft.learning_rate": 1e-4, "sft.optimizer": "rmsprop", "sft.control_learning_rate": 1e-4}
    assert changes_accepted(workdir, tiny_model, tiny_data, **never_begun)
    made = (
        ({"train.clip_norm": 2.0, "spin.loss": "hinge", "lora.rank": 2}, ("model", "checkpoints")),
        ({"generate.top_k": 7, "generate.max_new_tokens": 4}, ("generated",)),
        ({"seed": 1, "data.max_length": 60}, ("scores", "result.json")),
    )
    for fields, names in made:
        for field, value in fields.items():
            assert not changes_accepted(workdir, tiny_model, tiny_data, **{field: value})
        for path in [workdir / f"iteration_{t}" / name for t in range(2) for name in names]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        assert changes_accepted(workdir, tiny_model, tiny_data, **fields)
        assert changes_accepted(workdir, tiny_model, tiny_data)  # and as it was before


def test_a_control_can_be_added_and_is_measured_once(finished, workdir, tiny_model, tiny_data):
    config = tiny_files.make_config(tiny_model, tiny_data, {"sft.control": True})
    rows = self_play(config, workdir)
    names = ["SFT", "iteration 0", "SFT control 0", "iteration 1", "SFT control 1"]
    assert [row["model"] for row in rows] == names
    assert [row for row in rows if "control" not in row["model"]] == finished.rows
    kept = workdir / "iteration_0" / "control" / "result.json"
    measured = kept.stat().st_mtime_ns
    assert self_play(config, workdir) == rows and kept.stat().st_mtime_ns == measured
    assert self_play(finished.config, workdir) == rows  # without it, what is there stays
    tuned = {"sft.control": True, "sft.control_learning_rate": 1e-4}
    assert not changes_accepted(workdir, tiny_model, tiny_data, **tuned)


def test_fewer_iterations_leave_the_summary_as_it_is(finished, workdir, tiny_model, tiny_data):
    before = (workdir / "summary.txt").read_text()
    rows = self_play(tiny_files.make_config(tiny_model, tiny_data, {"iterations": 1}), workdir)
    assert rows == finished.rows == read_summary(workdir) and (workdir / "summary.txt").read_text() == before


# ---- damage


def damage(content: bytes):
    return lambda file: file.write_bytes(content)


def truncate(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes()[:40])


@pytest.mark.parametrize("damage", [damage(b""), damage(b"[]"), truncate])
@pytest.mark.parametrize("name", ["tokens.npz", "summary.json", "iteration_0/result.json", "result.json"])
def test_what_can_be_made_again_is_made_again(finished, workdir, name, damage):
    if name.startswith("iteration_0"):  # otherwise nothing asks for it
        (workdir / "report.html").unlink()
    damage(workdir / name)
    assert self_play(finished.config, workdir) == finished.rows == read_summary(workdir)
    assert (workdir / name).stat().st_size == (finished.workdir / name).stat().st_size


def test_a_note_of_another_kind_is_named(finished, workdir):
    edit(workdir / "config.json", start="this model")
    message = refusal(finished.config, workdir)
    assert message.startswith(f"{workdir}/config.json cannot be read (not an object): put a copy back"), message


@pytest.mark.parametrize("damage", [damage(b"[]"), truncate])
@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("config.json", "{file} cannot be read (.+): put a copy back; or delete it, and settings, data and model"),
        ("iteration_1/generated/pairs.parquet", "{file} cannot be read (.+): delete it, and the generate stage makes"),
        ("iteration_0/model/model.safetensors", "delete {directory}, and its stage makes it anew: {file} cannot be "),
        ("iteration_0/model/config.json", "delete {directory}, and its stage makes it anew: {file}: "),
    ],
)
def test_what_cannot_is_named_with_what_to_delete(finished, workdir, name, advice, damage):
    untrain(workdir)
    file = workdir / name
    damage(file)
    message = refusal(finished.config, workdir)
    assert re.match(advice.format(file=file, directory=file.parent), message), message


def test_damaged_metrics_are_named_with_their_line(finished, workdir):
    metrics = workdir / "iteration_0" / "metrics.jsonl"
    metrics.write_text('{"step": "one"}\n' + metrics.read_text())
    assert "metrics.jsonl, line 1: not a row of metrics" in refusal(finished.config, workdir)


def test_damaged_settings_of_answers_are_named_with_what_to_delete(tiny_model, tiny_data, tmp_path):
    parts = tmp_path / "out.jsonl.parts"
    parts.mkdir()
    (parts / "settings.json").write_text("{")
    with pytest.raises(UserError, match=rf"^{parts}/settings.json cannot be read \(.+\): delete {parts}"):
        spin_jax.answer(tiny_model, tiny_data, tmp_path / "out.jsonl", tiny_files.SETTINGS)


# ---- besides


def test_nothing_held_out_shows_the_last_step(tiny_model, tiny_data, tmp_path, caplog):
    caplog.set_level("INFO", "spin_jax")
    config = tiny_files.make_config(
        tiny_model, tiny_data, {"iterations": 1, "data.eval_rows": 0, "evaluate.evaluators": ()}
    )
    [start, row] = self_play(config, tmp_path)
    last = json.loads((tmp_path / "iteration_0" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["last_step/rewards/margin"] == last["rewards/margin"]
    assert row["last_step/rewards/accuracy"] == last["rewards/accuracy"]
    assert "last" in (tmp_path / "summary.txt").read_text()
    assert sum("--config.data.eval_rows=0: the summary has" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("changes", [{"generate.temperature": 0.0}, {"generate.top_k": 1}])
def test_greedy_responses_that_are_all_the_same_are_told_of(tiny_model, tiny_data, tmp_path, caplog, changes):
    config = tiny_files.make_config(tiny_model, tiny_data, changes | {"generate.responses": 3})
    open_run(config, tmp_path)
    assert sum("the responses to a prompt are all the same" in message for message in caplog.messages) == 1


def test_a_tilde_is_the_home_directory_everywhere(tiny_model, tiny_data, tmp_path, monkeypatch):
    home = tmp_path / "home"
    shutil.copytree(tiny_model, home / "model")
    shutil.copy(tiny_data, home / "rows.jsonl")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    config = tiny_files.make_config("~/model", "~/rows.jsonl", {"iterations": 1})
    self_play(config, "~/run", ["generate"])
    model = spin_jax.load("~/run/../model")
    model.save("~/saved")
    spin_jax.spin(model, tiny_files.make_rows(), "~/spun", tiny_files.SETTINGS | {"iterations": 1})
    spin_jax.answer("~/model", "~/rows.jsonl", "~/out.jsonl", tiny_files.SETTINGS)
    assert {path.name for path in home.iterdir()} == {"model", "rows.jsonl", "run", "saved", "spun", "out.jsonl"}
    assert (home / "run" / "iteration_0" / "generated" / "pairs.parquet").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    with pytest.raises(UserError, match="^~nobody-at-all/run: there is no user nobody-at-all"):
        self_play(config, "~nobody-at-all/run")


@pytest.mark.parametrize("path", ["s3://bucket/run", "http://host/run"])
def test_other_object_stores_are_refused(tiny_model, tiny_data, path):
    message = refusal(tiny_files.make_config(tiny_model, tiny_data), path)
    assert message == f"{path}: of object stores, gs:// alone is supported; give a directory or gs://BUCKET/PATH"


def test_a_run_holds_its_workdir(finished, workdir):
    with lease.held(workdir, f"--workdir={workdir}"):
        pass
    other = lease.Lease("elsewhere", lease._machine(), 1, lease._began(1), "other", 0)
    (workdir / lease.FILE_NAME).write_text(json.dumps(vars(other)))
    assert refusal(finished.config, workdir).startswith(f"--workdir={workdir} is in use by process 1 on elsewhere: ")


def test_answers_hold_their_place(tiny_model, tiny_data, tmp_path):
    out = tmp_path / "out.jsonl"
    parts = tmp_path / "out.jsonl.parts"
    parts.mkdir()
    other = lease.Lease("elsewhere", lease._machine(), 1, lease._began(1), "other", 0)
    (parts / lease.FILE_NAME).write_text(json.dumps(vars(other)))
    with pytest.raises(UserError, match=f'^out="{out}" is in use by process 1 on elsewhere: '):
        spin_jax.answer(tiny_model, tiny_data, out, tiny_files.SETTINGS)
    (parts / lease.FILE_NAME).unlink()
    spin_jax.answer(tiny_model, tiny_data, out, tiny_files.SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
