"""The compile check: bytes, fit, memory of what was compiled, and the command as a user runs it."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import tpu

from spin_jax.checkpoints import read_config
from spin_jax.compile_check import __main__, check, compiler
from spin_jax.compile_check.known_models import known
from spin_jax.compile_check.programs import Program, make_programs
from spin_jax.config import Config, replace
from spin_jax.devices.accelerators import CPU, TPUS, GiB, Slice, find_slice
from spin_jax.errors import UserError
from spin_jax.models import num_params

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
ROWS, WIDTH = 4096, 2048


def program(mesh, **beside) -> Program:
    """Two layers in a loop: w is split over x, and gathered."""

    def apply(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    args = tpu.shape(mesh, (2, WIDTH, WIDTH), None, "x"), tpu.shape(mesh, (ROWS, WIDTH), "x")
    return Program("apply", jax.jit(apply), args, ("params", "batch"), beside, 2 * 2 * ROWS * WIDTH**2)


@tpu.needs_libtpu
def test_bytes_and_flops(tmp_path):
    mesh = tpu.mesh(tpu.V5E_4, x=4)
    report = compiler.report(program(mesh, opponent=tpu.shape(mesh, (1024, 1024), "x")), tpu.V5E_4, tmp_path)
    rows_bytes = ROWS * WIDTH * 2 / 4
    assert report.bytes["params"] == 2 * WIDTH * WIDTH * 2 / 4
    assert report.bytes["batch"] == report.bytes["outputs"] == rows_bytes
    assert report.bytes["beside: opponent"] == 1024 * 1024 * 2 / 4
    assert report.total_bytes == sum(report.bytes.values())
    assert report.fits
    assert report.work.flops == report.model_flops == 2 * 2 * ROWS * WIDTH**2 / 4
    assert report.seconds >= report.model_flops / report.peak_flops
    assert report.mfu == pytest.approx(report.model_flops / report.peak_flops / report.seconds)


@tpu.needs_libtpu
def test_what_was_compiled_is_remembered(tmp_path):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    mesh = tpu.mesh(tpu.V5E_4, x=4)
    first = compiler.report(program(mesh), tpu.V5E_4, tmp_path)
    assert len(compiled) == 1
    again = compiler.report(program(mesh), tpu.V5E_4, tmp_path)
    assert len(compiled) == 1
    assert again == first
    compiler.report(program(tpu.mesh(tpu.V5E_8, x=8)), tpu.V5E_8, tmp_path)
    assert len(compiled) == 2


@tpu.needs_libtpu
def test_too_large(tmp_path):
    """By itself, which the compiler says; or with what lives beside it, which only the sum tells."""
    mesh = tpu.mesh(tpu.V5E_4, x=4)
    third = tpu.shape(mesh, (7 * GiB // 2,))
    total = jax.jit(lambda *arrays: sum(array.sum() for array in arrays))
    alone = compiler.report(Program("sum", total, (third,) * 3, ("params",) * 3, {}, 0.0), tpu.V5E_4, tmp_path)
    assert not alone.fits
    assert alone.bytes["params"] == 21 * GiB
    assert alone.total_bytes == pytest.approx(21 * GiB, rel=0.001)
    fits = compiler.report(Program("sum", total, (third,) * 2, ("params",) * 2, {}, 0.0), tpu.V5E_4, tmp_path)
    assert fits.fits
    beside = compiler.report(
        Program("sum", total, (third,) * 2, ("params",) * 2, {"opponent": third}, 0.0), tpu.V5E_4, tmp_path
    )
    assert not beside.fits
    assert beside.total_bytes == fits.total_bytes + 7 * GiB


def test_cpu_has_bytes_and_no_times(tmp_path):
    one = Slice(1, CPU)
    mesh = jax.make_mesh((1,), ("x",), devices=compiler.devices_of(one))
    report = compiler.report(program(mesh), one, tmp_path)
    assert report.bytes["params"] == 2 * WIDTH * WIDTH * 2
    assert report.fits
    assert report.work is None
    assert "apply" in check.describe(report)


@tpu.needs_libtpu
@pytest.mark.parametrize(
    "name",
    "v2-8 v3-8 v3-128 v4-8 v4-32 v4-384 v5e-1 v5e-4 v5litepod-32 v5e-256 v5p-8 v5p-64 v5p-768 v6e-1 v6e-8 v6e-128 "
    "tpu7x-8 tpu7x-128".split(),
)
def test_slices_are_what_libtpu_says(name):
    target = find_slice(name)
    devices = compiler.devices_of(target)
    assert len(devices) == target.devices
    assert {TPUS[kind].chip for kind in TPUS if devices[0].device_kind == TPUS[kind].kind} == {target.chip}


def test_without_the_compiler(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(UserError, match=r"pip install 'jax\[tpu\]'"):
        compiler.devices_of(tpu.V5E_4)


def test_known_models_are_what_the_hub_has(smollm2):
    assert known("HuggingFaceTB/SmolLM2-135M-Instruct") == read_config(smollm2)
    assert known("some/other-model") is None
    assert num_params(known("google/gemma-3-270m-it")) == 268_098_176
    assert num_params(known("google/gemma-3-1b-it")) == 999_885_952


def test_a_directory_goes_before_a_known_model_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config = replace(Config(), {"model.path": name})
    assert check.describe_model(config) == known(name)
    shutil.copytree(GOLDEN / "llama2", name)
    assert check.describe_model(config) == read_config(name) != known(name)


def command(tmp_path, *flags: str) -> subprocess.CompletedProcess:
    """The check as a user runs it, with nothing remembered."""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "-m", "spin_jax.compile_check", *flags]
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@tpu.needs_libtpu
def test_command(tmp_path):
    """Its table and its JSON say the same; a slice that a config does not take as its argument is a flag."""
    file = tmp_path / "report.json"
    config = ("--config=configs/smollm2_135m.py", "--slice=v5e-8", "--layers=1", "--programs=resharding")
    done = command(tmp_path, *config, f"--json={file}")
    assert done.returncode == 0, done.stderr
    (program,) = json.loads(file.read_text())["programs"]
    assert program["fits"]
    table = dict(re.findall(r"^(\w.*?)  +([\d.]+|<0.01)$", done.stdout, re.M))
    assert float(table["in all"]) == pytest.approx(program["total_bytes"] / GiB, abs=0.005)
    assert set(table) - {"in all"} == set(program["bytes"])
    assert f"resharding: about {program['seconds']:.4g} s" in done.stdout
    for seconds in program["work"]["seconds"].values():
        assert f"  {seconds:9.4f} s  " in done.stdout
    (gather,) = program["work"]["traffic"]
    assert re.search(rf"all-gather +fsdp +bf16 +SYNC +{gather['times']} ", done.stdout)


@tpu.needs_libtpu
def test_command_says_what_would_fit(tmp_path):
    """A chip cannot hold all weights of a 7B model in bfloat16 beside its share of the f32 ones."""
    flags = ("--config=configs/zephyr_7b.py:v5e-8", "--config.mesh.decode_tensor=1", "--programs=resharding")
    done = command(tmp_path, *flags)
    assert done.returncode == __main__.EXIT_TOO_LARGE, done.stderr
    assert "DOES NOT FIT" in done.stdout
    assert re.search(r"resharding does not fit v5e-8\. Try .*v5e-16", done.stderr)


@pytest.mark.parametrize(
    ("pairs", "fsdp", "micro_batches", "advised"),
    [(64, 16, 2, 4), (65, 16, 2, 4), (64, -1, 1, 2), (63, 16, 2, None), (16, 16, 1, None)],
)
def test_micro_batches_are_advised_while_each_device_has_a_pair(pairs, fsdp, micro_batches, advised):
    sizes = {"mesh.fsdp": fsdp, "mesh.tensor": 1, "train.batch_size": pairs, "train.micro_batches": micro_batches}
    config = replace(Config(), sizes)
    report = compiler.Report("train step", {"optimizer": 6.0, "activations": 15.0}, 16.0, 1.0, 1.0, 1.0, None)
    found = re.findall(r"micro_batches=(\d+)", check.advice(config, "v5e-16", report))
    assert found == ([str(advised)] if advised else [])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "--config is missing"),
        (["--config=configs/base.py"], "--slice is missing"),
        (["--config=configs/zephyr_7b.py:v5e-17"], "'v5e-17' is not a slice"),
        (["--config=configs/zephyr_7b.py:h100-8"], "needs the devices themselves, and this machine has 0"),
        (["--config=configs/quickstart.py", "--slice=cpu", "--programs=x"], "--programs: 'x' is not one of resharding"),
    ],
)
def test_mistakes_are_one_line(tmp_path, flags, says):
    done = command(tmp_path, *flags)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("loss, responses", [("sft", 1), ("ipo", 2), ("tspin", 3)])
def test_the_step_is_given_the_responses_that_its_objective_asks_for(loss, responses):
    """Held-out pairs have two all the same."""
    changes = {"data.train": "d", "spin.loss": loss, "generate.batch_size": 8, "train.batch_size": 8}
    config = replace(Config(), changes | {"train.micro_batches": 1, "mesh.data": 8, "mesh.fsdp": 1, "mesh.tensor": 1})
    made = {
        program.name: program
        for program in make_programs(config, known("HuggingFaceTB/SmolLM2-135M-Instruct"), jax.devices())
    }
    assert made["train step"].args[2].reference_logps_BPY.shape[-1] == responses
    assert made["scoring"].args[1].reference_logps_BPY.shape[-1] == 2


def test_settings_that_the_objective_does_not_read_are_refused_here_too():
    config = replace(Config(), {"data.train": "d", "spin.label_smoothing": 0.1})
    with pytest.raises(UserError, match="label_smoothing=0.1 is not read by --config.spin.loss=logistic"):
        make_programs(config, known("HuggingFaceTB/SmolLM2-135M-Instruct"), jax.devices())
