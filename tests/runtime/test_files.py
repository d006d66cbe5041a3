"""Paths as they are named, and disks that are full: one line that names the file, wherever something is written."""

import contextlib
import os
import pathlib
import re
import resource
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_files
from etils import epath
from processes import ROOT

import spin_jax
from spin_jax.checkpoints.train_state import Checkpoints
from spin_jax.errors import UserError
from spin_jax.runtime import files
from spin_jax.runtime.metric_writer import MetricsWriter
from spin_jax.training.train_step import init_state

FULL = r" cannot be written: File too large \([\d.,]+ [MG]B are free there\); raise the limit .*: it goes on from here$"


@contextlib.contextmanager
def full(size: int = 1000):
    """No file may be longer than so many bytes: the same errors, at the same places, as of a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_metrics(directory):
    with MetricsWriter(directory) as writer:
        for step in range(100):
            writer.write(step, {"loss": 1.0})


def write_checkpoint(directory):
    numbers = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, init_state({"w": numbers}, optax.scale_by_rms()))


def write_whole(directory):
    files.write_whole(directory / "file", "x" * 2000)


@pytest.mark.parametrize("write", [write_metrics, write_checkpoint, write_whole])
def test_a_full_disk_is_one_line(tmp_path, write, capfd):
    directory = epath.Path(tmp_path) / "there"
    with full(), pytest.raises(UserError) as refused:
        write(directory)
    assert re.match(f"{directory}(/file)?{FULL}", str(refused.value)), str(refused.value)
    assert capfd.readouterr() == ("", "")  # of Orbax's and TensorBoard's threads, too
    write(directory)  # what was left does no harm
    assert not list(tmp_path.rglob("*tmp*"))


def test_so_is_one_that_a_model_does_not_fit_on(tmp_path):
    model = spin_jax.load(tiny_files.write_model(tmp_path / "model"))
    with full(20_000), pytest.raises(UserError, match=f"{tmp_path}/saved{FULL}"):
        model.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "config.json").exists()
    model.save(tmp_path / "saved")
    assert spin_jax.load(tmp_path / "saved").config == model.config


# The command in a file system of its own, with room for this and that.
IN_A_SMALL_DISK = """
mount -t tmpfs tmpfs {directory} || exit 99
for size in 28k 320k 100m; do
    mount -o remount,size=$size {directory}
    {python} -c 'from spin_jax import main; main.run()' "$@"
    echo "with $size: $?"
done
"""


def test_a_run_on_a_full_disk_ends_with_one_line_and_goes_on_when_there_is_room(tmp_path):
    model = tiny_files.write_model(tmp_path / "model")
    data = tiny_files.write_jsonl(tmp_path / "rows.jsonl", tiny_files.make_rows())
    disk = tmp_path / "disk"
    disk.mkdir()
    settings = tiny_files.SETTINGS | {"model.path": model, "data.train": data, "iterations": 1}
    flags = [f"--config.{field}={value}" for field, value in settings.items()]
    ended = subprocess.run(
        ["unshare", "--mount", "bash", "-c", IN_A_SMALL_DISK.format(directory=disk, python=sys.executable), "bash"]
        + [f"--config={ROOT}/configs/base.py", f"--workdir={disk}/run", *flags],
        cwd=ROOT,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if ended.returncode == 99 or "unshare" in ended.stderr:
        pytest.skip("no file system can be mounted here")
    assert re.findall(r"^with (\w+): (\d+)$", ended.stdout, re.M) == [("28k", "2"), ("320k", "2"), ("100m", "0")]
    said = [line for line in ended.stderr.splitlines() if line.startswith("spin_jax: ")]
    assert "Traceback" not in ended.stderr and len(said) == 2
    full = r"cannot be written: No space left on device \(\S+ MB are free there\); make room, and start the same again"
    assert re.match(rf"spin_jax: {disk}/run/iteration_0/generated/part-00001\S+ {full}", said[0]), said[0]
    assert re.match(rf"spin_jax: {disk}/run/iteration_0/checkpoints {full}", said[1]), said[1]


# ---- names


def test_a_path_is_as_the_shell_would_have_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert files.expand("~/a") == epath.Path("/home/me/a")
    assert files.expand("~") == epath.Path("/home/me")
    assert files.expand("~root").is_absolute()
    assert files.expand("a/~") == epath.Path("a/~")
    assert files.expand(pathlib.Path("/b")) == epath.Path("/b")
    assert str(files.expand("gs://bucket/~")) == "gs://bucket/~"
    with pytest.raises(UserError, match=r"^~nobody-at-all/x: there is no user .* write \./~nobody-at-all/x$"):
        files.expand("~nobody-at-all/x")


def test_an_object_store_without_its_package_is_one_line():
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"^gs://bucket/file: gs:// needs a package .* pip install gcsfs$"):
            files.write_whole("gs://bucket/file", "x")


def test_a_directory_in_the_place_of_a_file_is_one_line(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(UserError, match=rf"^{tmp_path}/file cannot be written: .* is a directory; mend that, or write"):
        files.write_whole(tmp_path / "file", "x")


def test_other_errors_are_left_alone(tmp_path):
    with pytest.raises(ZeroDivisionError), files.writing(tmp_path):
        1 / 0  # noqa: B018
    with pytest.raises(UserError, match=r"^none of these$"), files.reading(tmp_path, "delete it"):
        raise UserError("none of these")
    with pytest.raises(UserError, match=rf"^{tmp_path} cannot be read \(RuntimeError\): delete it$"):
        with files.reading(tmp_path, "delete it"):
            raise RuntimeError
