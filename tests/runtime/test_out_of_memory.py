"""Memory that runs out, for real: on a device, and on the host."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_files
from processes import ROOT

from spin_jax.errors import UserError
from spin_jax.runtime import out_of_memory


def too_large() -> None:
    jax.block_until_ready(jnp.zeros((1 << 43,), jnp.uint8))


def line_of(function) -> str:
    with pytest.raises(UserError) as refused, out_of_memory.told("draw", ["less", "more"]):
        function()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_device_says_how_much_was_asked_for_and_is_there():
    found = re.fullmatch(r"draw: out of memory, 8,192.00 GiB asked for, ([\d.]+) GiB there; (.*)", line_of(too_large))
    assert found and 0 < float(found[1]) < 8192 and found[2] == "try, in this order: less, more"


@pytest.mark.parametrize(
    ("function", "asked"),
    [
        (lambda: np.ones((1 << 45,), np.uint8), ", 32,768.00 GiB asked for"),
        (lambda: bytearray(1 << 45), ""),
        (lambda: jax.device_put(np.broadcast_to(np.uint8(0), (1 << 43,))), ", 8,192.00 GiB asked for"),
    ],
    ids=["numpy", "python", "transfer"],
)
def test_so_does_the_host(function, asked):
    assert re.match(rf"draw: out of memory{asked}, [\d.]+ GiB there; ", line_of(function))


def test_the_frames_that_hold_the_memory_are_let_go():
    """A notebook keeps the last error: with its frames it would keep their arrays, and a smaller try would fail too."""

    def fails():
        held = jnp.ones(8)
        too_large()
        return held

    with pytest.raises(UserError) as refused, out_of_memory.told("draw", []):
        fails()
    assert refused.value.__cause__.__traceback__ is None


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4831838208 bytes.", ", 4.50 GiB asked for"),
        ("RESOURCE_EXHAUSTED: Failed to allocate request for 2.50GiB (1B) on device ordinal 0", ", 2.50 GiB asked for"),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 63.80G "
            "of 30.75G hbm. Exceeded hbm capacity by 33.05G.",
            ", 63.80 GiB asked for, 30.75 GiB there",
        ),
        (
            "RESOURCE_EXHAUSTED: Attempting to reserve 3.95G at the bottom of memory. That was not possible. There are "
            "512.00M free, 0B reserved",
            ", 3.95 GiB asked for, 0.50 GiB there",
        ),
        ("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY", ""),
    ],
)
def test_the_words_of_other_devices(text, numbers):
    error = jax.errors.JaxRuntimeError(text)
    assert out_of_memory.is_exhausted(error)
    assert out_of_memory._numbers(error).startswith(numbers)


def test_other_errors_are_none():
    full = ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left on device [os_error_code='28']")
    assert not out_of_memory.is_exhausted(full)  # tensorstore's full disk
    with pytest.raises(ZeroDivisionError), out_of_memory.told("draw", []):
        1 / 0  # noqa: B018
    with pytest.raises(UserError, match="^first: "), out_of_memory.told("second", []), out_of_memory.told("first", []):
        too_large()


def test_what_helps_is_what_is_not_set_already():
    changes = {"train.micro_batches": 8, "model.remat": "qkv", "generate.batch_size": 8, "lora.rank": 4}
    changes |= {"generate.prefill_batch_size": 16}
    config = tiny_files.make_config("model", "data", changes)
    assert out_of_memory.for_training(config) == [
        "--config.model.remat=full",
        "--config.model.logits_chunk=128",
        "more devices",
        "a smaller --config.data.max_length",
    ]
    assert out_of_memory.for_sampling(config)[:2] == [
        "--config.generate.batch_size=4",
        "--config.generate.prefill_batch_size=8",
    ]


# The command, in a process that may have so many bytes and no more.
LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from spin_jax import main
main.run()
"""


def test_a_run_that_asks_for_too_much_ends_with_one_line(tmp_path):
    model = tiny_files.write_model(tmp_path / "model")
    data = tiny_files.write_jsonl(tmp_path / "rows.jsonl", tiny_files.make_rows())
    settings = tiny_files.SETTINGS | {"model.path": model, "data.train": data, "mesh.decode_tensor": 1}
    settings |= {"generate.max_new_tokens": 1 << 20, "generate.batch_size": 32}  # the cache alone: 8 GiB
    flags = [f"--config.{field}={value}" for field, value in settings.items()]
    command = [sys.executable, "-c", LIMITED, f"--config={ROOT}/configs/base.py", f"--workdir={tmp_path}/run", *flags]
    one_device = os.environ | {"XLA_FLAGS": ""}
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=one_device)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert re.match(r"spin_jax: generate: out of memory, [\d.]+ GiB asked for, [\d.]+ GiB there; ", last), last
    assert "try, in this order: --config.generate.batch_size=16, --config.generate.prefill_batch_size=8, " in last
