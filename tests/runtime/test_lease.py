"""Who has a directory: one run, until it ends, however it ends."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from spin_jax.errors import UserError
from spin_jax.runtime import lease
from spin_jax.runtime.lease import FILE_NAME, Lease, held

ROOT = pathlib.Path(__file__).parents[2]
NAME = "--workdir=mine"
REFUSED = rf"^{NAME} is in use by process \d+ on .*: wait until it has ended, stop it, or write to another place$"
# Takes the directory, tells so, and goes on for as long as it is let.
HOLDER = f"""
import sys, time
from etils import epath
from spin_jax.runtime.lease import held
with held(epath.Path(sys.argv[1]), "{NAME}"):
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def another_process(directory):
    """One that holds the directory; where it is killed, nobody has looked after it yet."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def read(directory) -> Lease:
    return Lease(**json.loads((directory / FILE_NAME).read_text()))


def write(directory, **changes) -> Lease:
    """A lease as another one would have left it."""
    began = lease._began(os.getpid())
    other = Lease("elsewhere", lease._machine(), os.getpid(), began, "other", threading.get_ident())
    other = dataclasses.replace(other, **changes)
    (directory / FILE_NAME).write_text(json.dumps(dataclasses.asdict(other)))
    return other


def take(directory) -> None:
    with held(epath.Path(directory), NAME):
        assert read(directory).process == os.getpid() and read(directory).holder != "other"


def test_it_is_there_while_it_is_held_and_gone_then(tmp_path):
    directory = epath.Path(tmp_path) / "new" / "workdir"
    with held(directory, NAME):
        assert read(directory).process == os.getpid()
        with held(directory, NAME):  # inside of its own, as `spin_jax.spin` and the run that it starts
            pass
        assert os.listdir(directory) == [FILE_NAME]
    assert os.listdir(directory) == []
    with pytest.raises(KeyboardInterrupt), held(directory, NAME):
        raise KeyboardInterrupt
    take(directory)  # a notebook's cell, called again
    assert os.listdir(directory) == []


def test_another_process_is_refused_until_this_one_is_killed(tmp_path):
    with another_process(tmp_path) as holder:
        with pytest.raises(UserError, match=REFUSED.replace(r"\d+", str(holder.pid))):
            take(tmp_path)
        assert read(tmp_path).process == holder.pid
        holder.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 20
        while lease._began(holder.pid) is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        start = time.monotonic()
        take(tmp_path)  # its parent has not looked: the number is still there
        assert time.monotonic() - start < 5


def test_another_thread_is_refused(tmp_path):
    refused = []

    def run():
        try:
            take(tmp_path)
        except UserError as error:
            refused.append(str(error))

    with held(epath.Path(tmp_path), NAME):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert len(refused) == 1 and f"process {os.getpid()}" in refused[0]


def test_of_many_at_the_same_moment_one_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 1.0)  # a thread may wait for a busy machine
    taken, refused, go, others_refused = [], [], threading.Barrier(8), threading.Event()

    def run():
        go.wait()
        try:
            with held(epath.Path(tmp_path), NAME):
                taken.append(threading.get_ident())
                others_refused.wait(60)
        except UserError as error:
            refused.append(str(error))
            if len(refused) == 7:
                others_refused.set()

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1 and len(refused) == 7
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "left", [{"holder": "of an earlier call"}, {"process": 1}, {"process": 2**22 - 1}], ids=["own", "reused", "ended"]
)
def test_what_a_dead_run_of_this_machine_left_is_taken_at_once(tmp_path, left):
    write(tmp_path, **left)
    take(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "x"}', "\x00"])
def test_a_damaged_one_is_taken(tmp_path, content):
    (tmp_path / FILE_NAME).write_text(content)
    take(tmp_path)


def test_another_machines_is_taken_when_it_is_not_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.1)
    write(tmp_path, machine="another")
    start = time.monotonic()
    take(tmp_path)
    assert 1.0 < time.monotonic() - start < 5.0


@pytest.mark.parametrize("ends", [False, True], ids=["renewed", "given back"])
def test_another_machines_is_respected_while_it_lives(tmp_path, monkeypatch, ends):
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.1)
    write(tmp_path, machine="another")
    does = (tmp_path / FILE_NAME).unlink if ends else lambda: write(tmp_path, machine="another", renewed=1)
    monkeypatch.setattr(lease._LOG, "info", lambda *_: does())  # what is logged once it is seen, before it is watched
    with contextlib.nullcontext() if ends else pytest.raises(UserError, match=REFUSED):
        take(tmp_path)


def test_it_is_renewed_and_who_has_lost_it_stops(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    with pytest.raises(KeyboardInterrupt), held(epath.Path(tmp_path), NAME):
        deadline = time.monotonic() + 20
        while read(tmp_path).renewed < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert read(tmp_path).renewed >= 2
        while time.monotonic() < deadline:  # a renewal that is under way may replace the first
            other = write(tmp_path, machine="another", process=7)
            time.sleep(1)
    assert read(tmp_path) == other  # it is not ours to delete
    assert "process 7 on elsewhere has taken the run over" in caplog.text


def test_a_place_that_cannot_be_written_is_one_line():
    with pytest.raises(UserError, match="^/proc/self cannot be written: "):
        take(pathlib.Path("/proc/self"))
