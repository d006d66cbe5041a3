"""The loop around the step, with a small least-squares problem for a model: every file it writes is real."""

import contextlib
import json
import logging
import os
import pathlib
import re
import shutil
import signal
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from spin_jax.checkpoints.train_state import Checkpoints
from spin_jax.data.batch import HostBatch
from spin_jax.devices.sharding import batch_sharding, make_mesh
from spin_jax.errors import UserError
from spin_jax.runtime.metric_writer import read_metrics
from spin_jax.training import loop as train_lib
from spin_jax.training.loop import LoopSpec, Stopped, fit
from spin_jax.training.optimizer import learning_rate_schedule, make_optimizer
from spin_jax.training.train_step import TrainState, init_state, make_step

STEPS, SIZE = 9, 8
SCHEDULE = learning_rate_schedule(0.1, STEPS, 0.1)
OPTIMIZER = make_optimizer("rmsprop", SCHEDULE, 1.0, 0.0)


class Batch(NamedTuple):
    inputs_BD: np.ndarray
    targets_B: np.ndarray


def make_batch(step: int) -> HostBatch:
    inputs_BD = np.random.default_rng(step).normal(size=(SIZE, 4)).astype(np.float32)
    rows = np.arange(step * SIZE, (step + 1) * SIZE)
    return HostBatch(Batch(inputs_BD, inputs_BD.sum(1)), rows, {"lengths/real": float(step)}, tokens=SIZE, flops=1e9)


def objective(params: dict, opponent: None, batch: Batch):
    loss = jnp.mean((batch.inputs_BD @ params["w"] - batch.targets_B) ** 2)
    return loss, ({"loss": loss}, jnp.zeros(()))


STEP = jax.jit(make_step(objective, OPTIMIZER, 1), donate_argnums=0)


def train(directory, *, step=STEP, batches=make_batch, steps=STEPS, checkpoint_every=3) -> TrainState:
    mesh = make_mesh()
    return fit(
        step,
        jax.device_put(init_state({"w": jnp.zeros(4)}, OPTIMIZER), NamedSharding(mesh, PartitionSpec())),
        None,
        batches,
        LoopSpec("test", steps, directory, checkpoint_every, batch_sharding(mesh), SCHEDULE, flops_multiplier=3),
    )


def steps_logged(directory) -> list[int]:
    return [row["step"] for row in read_metrics(directory / "metrics.jsonl")]


def saved_state(directory, like: TrainState) -> TrainState:
    checkpoints = Checkpoints(directory / "checkpoints")
    state, _ = checkpoints.restore_newest(like)
    checkpoints.close()
    return state


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.fixture
def whole(tmp_path):
    """(directory, last state) of an uninterrupted run."""
    directory = tmp_path / "whole"
    directory.mkdir()
    return directory, train(directory)


def test_every_step_is_logged_with_what_it_used(whole):
    directory, state = whole
    rows = read_metrics(directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["lengths/real"] for row in rows] == list(range(STEPS))
    assert [row["learning_rate"] for row in rows] == pytest.approx([float(SCHEDULE(step)) for step in range(STEPS)])
    assert rows[0]["loss"] == pytest.approx(np.mean(make_batch(0).arrays.targets_B ** 2))  # at w = 0
    assert rows[-1]["loss"] < rows[0]["loss"]
    # One timing, two names: FLOPs of 3 passes over 1e9, in tera.
    for row in rows:
        assert row["model_tflops_per_second"] / row["tokens_per_second"] == pytest.approx(3e9 / SIZE / 1e12)
    assert int(state.step) == STEPS and "healthy" not in rows[0]


def test_nothing_is_computed_between_two_steps(tmp_path, monkeypatch):
    """It would queue up behind the step that the device is at, and whoever reads it would wait for that step. What is
    computed on a number of Python's sends it to the device: batches apart, that is forbidden here."""
    monkeypatch.setattr(train_lib, "to_devices", jax.transfer_guard_host_to_device("allow")(train_lib.to_devices))
    with contextlib.ExitStack() as forbidden:

        def step(*arguments):
            made = STEP(*arguments)
            forbidden.enter_context(jax.transfer_guard_host_to_device("disallow"))
            return made

        train(tmp_path, step=step, checkpoint_every=STEPS)


def test_the_last_state_is_saved(whole):
    directory, state = whole
    assert_equal(saved_state(directory, state), state)


def test_a_finished_stage_does_no_step_again(whole):
    directory, state = whole
    assert_equal(train(directory, batches=None), state)
    assert steps_logged(directory) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [0, 4])
def test_a_signal_saves_the_step_it_came_in_and_the_run_goes_on_from_there(whole, tmp_path, number, at):
    """Batches are made one ahead, so that a signal while batch `at` + 1 is made comes before step `at` ends."""

    def batches(step: int) -> HostBatch:
        if step == at + 1:
            signal.raise_signal(number)
        return make_batch(step)

    handler = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"^stopped after step {at + 1} of {STEPS}; start the same command again"):
        train(tmp_path, batches=batches)
    assert signal.getsignal(number) is handler
    assert steps_logged(tmp_path) == list(range(1, at + 2))
    assert int(saved_state(tmp_path, whole[1]).step) == at + 1

    asked = []
    resumed = train(tmp_path, batches=lambda step: asked.append(step) or make_batch(step))
    assert asked == list(range(at + 1, STEPS))
    assert_equal(resumed, whole[1])
    assert steps_logged(tmp_path) == list(range(1, STEPS + 1))


def test_a_second_interrupt_stops_at_once(tmp_path):
    def batches(step: int) -> HostBatch:
        if step in (3, 4):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return make_batch(step)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, batches=batches)


def test_steps_after_the_last_checkpoint_are_made_again(whole, tmp_path):
    """What a killed process leaves: a checkpoint of step 6, metrics up to step 8, the last line torn."""

    def batches(step: int) -> HostBatch:
        if step == 8:
            raise OSError("the machine is gone")
        return make_batch(step)

    with pytest.raises(OSError, match="gone"):
        train(tmp_path, batches=batches)
    assert steps_logged(tmp_path) == [1, 2, 3, 4, 5, 6]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')

    assert_equal(train(tmp_path), whole[1])
    deterministic = [
        [{name: row[name] for name in ("step", "loss", "grad_norm")} for row in read_metrics(d / "metrics.jsonl")]
        for d in (tmp_path, whole[0])
    ]
    assert deterministic[0] == deterministic[1]


@pytest.mark.parametrize("bad", [0, 1, 4, 5, STEPS - 1])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_names_its_rows_and_keeps_the_last_good_state(whole, tmp_path, bad, value):
    def batches(step: int) -> HostBatch:
        batch = make_batch(step)
        if step == bad:
            batch.arrays.inputs_BD[3, 1] = value
        return batch

    with pytest.raises(UserError) as refused:
        train(tmp_path, batches=batches)
    message, report = str(refused.value), tmp_path / "not_finite.json"
    assert message.startswith(f"step {bad + 1}: loss ") and str(report) in message and "\n" not in message
    # The learning rate is to blame only where there was one: the first step of a warm-up has none.
    assert ("lower --config.train.learning_rate" in message) == (bad > 1) != ("compute_dtype=float32" in message)
    reported = json.loads(report.read_text())
    assert (reported["step"], reported["rows"]) == (bad + 1, list(range(bad * SIZE, (bad + 1) * SIZE)))
    assert steps_logged(tmp_path) == list(range(1, bad + 2))

    good = saved_state(tmp_path, whole[1])
    assert int(good.step) == bad and bool(good.healthy)
    # With the row mended, the run ends as if it had never been bad.
    assert_equal(train(tmp_path), whole[1])
    assert steps_logged(tmp_path) == list(range(1, STEPS + 1))


def test_outside_the_main_thread_signals_stay_with_whoever_has_them(whole, tmp_path):
    states = []
    thread = threading.Thread(target=lambda: states.append(train(tmp_path)))
    thread.start()
    thread.join()
    assert_equal(states[0], whole[1])


def test_how_often_is_saved_changes_no_result(whole, tmp_path):
    assert_equal(train(tmp_path, checkpoint_every=1), whole[1])


def truncate_arrays(checkpoint: pathlib.Path) -> None:
    for file in checkpoint.glob("state/**/d/*"):
        os.truncate(file, 20)


DAMAGE = {
    "truncated": truncate_arrays,
    "emptied": lambda checkpoint: (checkpoint / "state" / "_METADATA").write_bytes(b""),
    "garbage": lambda checkpoint: (checkpoint / "state" / "_METADATA").write_text("{}"),
    "gone": lambda checkpoint: shutil.rmtree(checkpoint / "state"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_serves(whole, tmp_path, damage, caplog):
    directory, asked = shutil.copytree(whole[0], tmp_path / "copy"), []
    damage(directory / "checkpoints" / "9")
    assert_equal(train(directory, batches=lambda step: asked.append(step) or make_batch(step)), whole[1])
    assert asked == [6, 7, 8] and steps_logged(directory) == list(range(1, STEPS + 1))
    assert [path.name for path in (directory / "checkpoints_damaged").iterdir()] == ["9"]
    [told] = [record.getMessage() for record in caplog.records]  # of Orbax's own, none
    assert re.fullmatch(r".*/checkpoints/9 is damaged \(.+\): set aside as .*_damaged/9; .* goes on from step 6", told)
    assert int(saved_state(directory, whole[1]).step) == 9


def test_what_is_raised_besides_is_not_logged(tmp_path, caplog):
    with Checkpoints(epath.Path(tmp_path)):
        pass
    left_behind = "Future exception was never retrieved\nfuture: <ValueError('OUT_OF_RANGE: [tensorstore_spec=...]')>"
    logging.getLogger("asyncio").error(left_behind)
    logging.getLogger("asyncio").error("another's")
    assert caplog.messages == ["another's"]


def test_with_all_checkpoints_damaged_the_stage_begins_anew(whole, tmp_path, caplog):
    directory, asked = shutil.copytree(whole[0], tmp_path / "copy"), []
    for step, damage in zip(("6", "9"), DAMAGE.values(), strict=False):
        damage(directory / "checkpoints" / step)
    (directory / "checkpoints_damaged" / "9").mkdir(parents=True)  # one of an earlier time
    assert_equal(train(directory, batches=lambda step: asked.append(step) or make_batch(step)), whole[1])
    assert asked == list(range(STEPS)) and steps_logged(directory) == list(range(1, STEPS + 1))
    assert {path.name for path in (directory / "checkpoints_damaged").iterdir()} == {"6", "9"}
    assert caplog.messages[-1].endswith("the stage goes on from its start")
