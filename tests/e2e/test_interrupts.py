"""Ctrl-C and SIGTERM while a command imports, opens, compiles or samples: one line and exit status 75, at once.

How they stop training is in tests/faults/test_kills.py and tests/e2e/test_self_play.py.
"""

import os
import pathlib
import signal
import subprocess
import sys

import pytest
import tiny_files

from spin_jax.runtime import preemption

ROOT = pathlib.Path(__file__).parents[2]

# Starts a command, and sends it a signal at a place: where MODULE is about to be imported, or in place of a call of
# MODULE:FUNCTION, which goes on for as long as it is let.
SIGNALLED = """
import importlib, os, runpy, signal, sys
program, place, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.argv[:4] = ["-c"]
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may have it ignored
module, _, function = place.partition(":")
class AtImport:
    def find_spec(self, name, path, target=None):
        if name == module:
            os.kill(os.getpid(), number)
def at_call(*args, **kwargs):
    os.kill(os.getpid(), number)
    signal.pause()
if function:
    setattr(importlib.import_module(module), function, at_call)
else:
    sys.meta_path.insert(0, AtImport())
runpy.run_module(program, run_name="__main__", alter_sys=True)
"""
DEVICES, COMPILER = "jax._src.xla_bridge:backends", "jax._src.compiler:backend_compile_and_load"
SIGINT, SIGTERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize(
    ("program", "place", "number"),
    [
        ("main", "absl.flags", SIGINT),
        ("main", "jax", SIGINT),
        ("main", "jax", SIGTERM),
        ("main", DEVICES, SIGTERM),
        ("main", "spin_jax.self_play.run:open_run", SIGINT),
        ("main", COMPILER, SIGINT),
        ("main", COMPILER, SIGTERM),
        ("generate", "ml_collections", SIGTERM),
        ("generate", "jax", SIGINT),
        ("generate", COMPILER, SIGTERM),
        ("compile_check", "jax", SIGTERM),
        ("compile_check", COMPILER, SIGINT),
    ],
)
def test_a_signal_is_one_line(program, place, number, tmp_path, tiny_model, tiny_data):
    flags = {
        "main": (f"--workdir={tmp_path / 'run'}", f"--config.data.train={tiny_data}"),
        "generate": (f"--prompts={tiny_data}", f"--out={tmp_path / 'out'}"),
        "compile_check": ("--slice=cpu", "--nocache"),
    }[program]
    settings = tiny_files.SETTINGS | {"model.path": tiny_model}
    fields = [f"--config.{field}={value}" for field, value in settings.items()]
    started = (f"spin_jax.{program}", place, str(int(number)), "--config=configs/base.py", *flags, *fields)
    ran = subprocess.run(
        [sys.executable, "-c", SIGNALLED, *started],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0"},  # what others have compiled is compiled again
    )
    assert ran.returncode == 75, ran.stderr
    *before, last = ran.stderr.splitlines()
    assert last.endswith("interrupted; start the same command again to go on")
    assert "Traceback" not in ran.stderr and not ran.stdout
    assert place == COMPILER or not before


# A signal that was lost, as in a callback of C++ that drops what Python raises: first where nothing else hears of it,
# then where training has begun meanwhile. The time of grace begins and is over when this says so.
DROPPED = """
import signal, sys, threading, time, types
from spin_jax.runtime import interrupts
begun, over = threading.Event(), threading.Event()
interrupts.time = types.SimpleNamespace(sleep=lambda seconds: begun.set() or over.wait())
interrupts.end_at_once()
interrupts.raise_instead()
try:
    signal.raise_signal(signal.SIGTERM)
except KeyboardInterrupt:
    pass
begun.wait()
if sys.argv[1] == "training":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("heard of it"))
over.set()
for _ in range(1000):  # one long call may begin just as the signal comes, and Python hears of it after that
    time.sleep(0.02)
"""


@pytest.mark.parametrize(
    ("where", "status", "told"),
    [("anywhere", 75, "interrupted; start the same command again to go on\n"), ("training", 1, "heard of it\n")],
)
def test_a_signal_that_was_dropped_is_not_lost(where, status, told):
    ran = subprocess.run([sys.executable, "-c", DROPPED, where], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (ran.returncode, ran.stderr) == (status, told)


def test_a_wish_to_stop_that_came_after_the_last_step_is_not_lost():
    with pytest.raises(KeyboardInterrupt):
        with preemption.deferred():
            signal.raise_signal(signal.SIGTERM)
    with preemption.deferred():
        assert not preemption.asked()


def test_what_runs_in_the_background_is_not_interrupted():
    """A shell has such a program ignore the Ctrl-C that is meant for what runs in front of it."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from spin_jax.runtime import interrupts;"
        "interrupts.end_at_once(); interrupts.raise_instead(); signal.raise_signal(signal.SIGINT); print('goes on')"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (ran.returncode, ran.stdout) == (0, "goes on\n")
