"""How far a loop and a run are: lines of the log, and a bar on a terminal."""

import contextlib
import logging
import os
import pty
import subprocess
import sys
import termios

import pytest

from spin_jax.runtime import progress
from spin_jax.runtime.progress import Expected, Loop


@pytest.fixture
def log(monkeypatch, caplog):
    """What a loop logs where stderr is a file, its first ten seconds over."""
    monkeypatch.setattr(progress, "is_live", lambda: False)
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    caplog.set_level(logging.INFO)
    return caplog


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(progress.time, "perf_counter", lambda: self.now)


def made(name: str, total: int, done: int = 0, **facts: str) -> None:
    with Loop(name, total, "step", done) as loop:
        for _ in range(done, total):
            loop.advance(**facts)


def test_a_line_every_five_percent_and_at_the_end(log, capfd):
    made("train", 201, loss="0.5")
    assert len(log.messages) == 19  # every eleventh step is more than 5%, and the last
    assert log.messages[0].startswith("train: 11 of 201 steps, loss 0.5, ") and log.messages[0].endswith(" left")
    assert log.messages[-1].startswith("train: 201 of 201 steps, loss 0.5, ") and "took 0 s" in log.messages[-1]
    assert capfd.readouterr().err == ""


def test_a_line_every_ten_seconds_where_that_is_rarer(log, monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(progress, "SECONDS", 10.0)
    with Loop("train", 100, "step") as loop:
        for _ in range(100):
            clock.now += 0.999
            loop.advance()
    assert [int(line.split()[1]) for line in log.messages] == [11, 22, 33, 44, 55, 66, 77, 88, 99, 100]
    assert "1.0 steps a second, 1 min 29 s left" in log.messages[0]


def test_what_an_earlier_start_has_made_counts_as_done_but_not_for_the_rate(log, monkeypatch):
    clock = Clock(monkeypatch)
    with Loop("train", 100, "step", 90) as loop:
        clock.now = 50.0  # the compiler
        loop.advance()
        clock.now = 52.0
        loop.advance(4)
    assert log.messages == ["train: 95 of 100 steps, 2.0 steps a second, 2 s left"]


def test_a_loop_that_is_interrupted_has_no_last_line(log):
    with pytest.raises(KeyboardInterrupt), Loop("train", 1000, "step") as loop:
        loop.advance()
        raise KeyboardInterrupt
    assert not log.messages


def test_the_time_of_a_run_follows_from_loops_of_each_kind(log, monkeypatch):
    """Ten seconds of sampling; two and four steps of training, ten seconds each with what came before."""
    clock = Clock(monkeypatch)
    sizes = [(t, name, size) for t in (0, 1) for name, size in (("sample", 1), ("train", 2 + 2 * t))]
    loops = [Expected(f"{t}: {name}", name, size) for t, name, size in sizes]
    with progress.expected(loops):
        for t in (0, 1):
            with Loop(f"{t}: sample", 2, "response") as loop:
                clock.now += 4
                loop.advance()
                clock.now += 6
                loop.advance()
            with Loop("not expected", 1, "pair") as loop:
                loop.advance()
            with Loop(f"{t}: train", 2 + 2 * t, "step") as loop:
                for _ in range(2 + 2 * t):
                    clock.now += 10
                    loop.advance()
    known = [line for line in log.messages if line.endswith("of the run left")]
    left = {line.partition(",")[0]: line.rpartition(", ")[2] for line in known}
    assert left == {
        "0: train: 2 of 2 steps": "50 s of the run left",  # 10 and 40
        "1: sample: 2 of 2 responses": "40 s of the run left",
        "1: train: 2 of 4 steps": "20 s of the run left",
        "1: train: 3 of 4 steps": "10 s of the run left",
        "1: train: 4 of 4 steps": "0 s of the run left",
    }


def test_what_each_loop_took_is_noted(log, monkeypatch):
    """Also of one that is interrupted; what an earlier process made is not this one's, and a loop that makes nothing
    takes nothing. The first units waited for the compiler."""
    clock, noted = Clock(monkeypatch), []
    with progress.expected([], noted.append):
        with contextlib.suppress(KeyboardInterrupt), Loop("0: train", 100, "step", 90) as loop:
            clock.now += 50
            loop.advance()
            clock.now += 4
            loop.advance(2)
            raise KeyboardInterrupt
        made("0: train", 10, done=10)
        with Loop("0: evaluate", 5, "pair") as loop:
            clock.now += 7
            loop.advance(5)
    assert noted == [
        {"loop": "0: train", "unit": "step", "units": 3, "seconds": 54.0, "useful_seconds": 6.0},
        {"loop": "0: evaluate", "unit": "pair", "units": 5, "seconds": 7.0, "useful_seconds": 0.0},
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (330, "5 min 30 s"), (4800, "1 h 20 min"), (183600, "2 d 3 h")],
)
def test_durations(seconds, text):
    assert progress._duration(seconds) == text


def test_on_a_terminal_it_is_a_bar():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    code = (
        "from spin_jax.runtime.progress import Loop\nwith Loop('train', 3, 'step') as loop: loop.advance(3, loss='0.5')"
    )
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True, timeout=120)
    os.close(theirs)
    shown = ""
    with contextlib.suppress(OSError):  # which is the end
        while read := os.read(ours, 4096):
            shown += read.decode()
    os.close(ours)
    assert "\rtrain: 100%" in shown and "3/3" in shown and "loss=0.5" in shown


QUIET = """
from spin_jax.runtime import cli
cli.log_plainly()
import datasets, huggingface_hub, tqdm, transformers
print(datasets.are_progress_bars_disabled(), huggingface_hub.utils.are_progress_bars_disabled(),
      not transformers.utils.logging.is_progress_bar_enabled(), tqdm.tqdm([]).disable)
"""


def test_elsewhere_bars_of_other_packages_are_off():
    """Of data sets, the Hub's downloads, transformers, and of whoever takes tqdm as it is."""
    ran = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, timeout=120)
    assert ran.stdout.split() == ["True"] * 4, ran.stderr
