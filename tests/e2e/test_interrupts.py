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

# Starts a command, and sends it a signal once its main thread is in a file or function of that name.
SIGNALLED = """
import os, runpy, signal, sys, threading, time
program, place, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.argv[:4] = ["-c"]
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may have it ignored
main_thread = threading.get_ident()
def is_there(frame):
    while frame:
        if frame.f_code.co_name == place or frame.f_code.co_filename.endswith(place):
            return True
        frame = frame.f_back
def watch():
    while not is_there(sys._current_frames()[main_thread]):
        time.sleep(0.001)
    os.kill(os.getpid(), number)
threading.Thread(target=watch, daemon=True).start()
runpy.run_module(program, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize(
    ("program", "place"),
    [
        ("main", "absl/flags/__init__.py"),
        ("main", "/jax/__init__.py"),
        ("main", "jax/_src/xla_bridge.py"),
        ("main", "open_run"),
        ("main", "jax/_src/compiler.py"),
        ("generate", "ml_collections/__init__.py"),
        ("generate", "/jax/__init__.py"),
        ("generate", "jax/_src/compiler.py"),
        ("compile_check", "/jax/__init__.py"),
        ("compile_check", "jax/_src/compiler.py"),
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
        timeout=120,
        env=os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "3600"},
    )
    assert ran.returncode == 75, ran.stderr
    *before, last = ran.stderr.splitlines()
    assert last.endswith("interrupted; start the same command again to go on")
    assert "Traceback" not in ran.stderr and not ran.stdout
    assert place.endswith("compiler.py") or not before


# A signal that was lost, as in a callback of C++ that drops what Python raises: first where nothing else hears of it,
# then where training has begun meanwhile.
DROPPED = """
import signal, sys, time
from spin_jax.runtime import interrupts
interrupts.GRACE = 0.2
interrupts.end_at_once()
interrupts.raise_instead()
try:
    signal.raise_signal(signal.SIGTERM)
except KeyboardInterrupt:
    pass
time.sleep(0.1)
if sys.argv[1] == "training":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("heard of it"))
time.sleep(60)
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
