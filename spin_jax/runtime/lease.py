"""A directory is one run's at a time: a small file in it says whose, and is renewed while the run lives.

No lock works on both network file systems and object stores, so the lease is written and read back. A run that finds
another run's lease checks whether that process lives, if it is on this machine; else it watches for a while whether the
lease is renewed. Clocks of two machines are never compared.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from etils import epath

from spin_jax.errors import UserError
from spin_jax.runtime import multihost
from spin_jax.runtime.files import is_remote, writing

FILE_NAME = "lease.json"
RENEW_SECONDS = 15.0  # an object takes one write a second; nobody waits for this one
STALE_SECONDS = 60.0  # a lease of another machine that is not renewed for so long is free
LOOK_SECONDS = 2.0
# By then any other run that takes the lease at the same moment has written it; the last one to write has it.
SETTLE_SECONDS, REMOTE_SETTLE_SECONDS = 0.1, 2.0

_LOG = logging.getLogger(__name__)
_held: dict[epath.Path, "Lease"] = {}  # of this process, by directory


@dataclasses.dataclass(frozen=True)
class Lease:
    """Who holds a directory.

    Attributes:
        host: name of the machine, for people.
        machine: what tells machines and containers apart: process numbers mean something within one alone.
        process: its number on that machine.
        began: when that process began, as the machine counts: numbers are given again.
        holder: of this lease; a process may hold several directories, or one after the other.
        thread: which of the process's threads has it.
        renewed: how often.
    """

    host: str
    machine: str
    process: int
    began: str | None
    holder: str
    thread: int
    renewed: int = 0


@contextlib.contextmanager
def held(directory: epath.Path, name: str) -> Iterator[None]:
    """Hold `directory`, made if missing, so that no other run works in it. Process 0 holds the lease for all processes
    of a run. Nested in another `held` of the same thread and directory, it does nothing.

    Args:
        directory: an absolute path, or gs://...
        name: what the user calls it, for the refusal.

    Raises:
        UserError: another run has it, or nothing can be written there.
    """
    outer = _held.get(directory)
    if not multihost.on_process_zero(lambda: outer is None or outer.thread != threading.get_ident()):
        yield
        return
    lease = multihost.on_process_zero(lambda: _take(directory, name))
    if not multihost.is_first():
        yield
        return
    ended = threading.Event()
    heart = threading.Thread(target=_renew, args=(directory, lease, ended), daemon=True)
    _held[directory] = lease
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join(timeout=RENEW_SECONDS)
        del _held[directory]
        _give_back(directory, lease)


def _take(directory: epath.Path, name: str) -> Lease:
    path, process = directory / FILE_NAME, os.getpid()
    mine = Lease(socket.gethostname(), _machine(), process, _began(process), uuid.uuid4().hex, threading.get_ident())
    with writing(directory):  # the first that is written there
        other = _read(path)
        if other and _is_alive(other, mine, path):
            raise UserError(_refusal(other, name))
        _write(path, mine)
        time.sleep(REMOTE_SETTLE_SECONDS if is_remote(path) else SETTLE_SECONDS)
        now = _read(path)
        if now and now.holder != mine.holder:
            raise UserError(_refusal(now, name))
    return mine


def _refusal(other: Lease, name: str) -> str:
    by = f"process {other.process} on {other.host}"
    return f"{name} is in use by {by}: wait until it has ended, stop it, or write to another place"


def _is_alive(other: Lease, mine: Lease, path: epath.Path) -> bool:
    """Whether the holder of a lease is still at work."""
    if other.process == mine.process and other.machine == mine.machine:
        return any(lease.holder == other.holder for lease in _held.values())
    if other.machine == mine.machine:
        return _began(other.process) == other.began
    _LOG.info("%s is of a run on %s: looking for %d s whether it lives", path, other.host, STALE_SECONDS)
    until = time.monotonic() + STALE_SECONDS
    while time.monotonic() < until:
        time.sleep(LOOK_SECONDS)
        now = _read(path)
        if now != other:
            return now is not None  # given back while we looked
    return False


def _renew(directory: epath.Path, lease: Lease, ended: threading.Event) -> None:
    """The heartbeat. If somebody else took the lease while this machine slept, the run is stopped, as by Ctrl-C."""
    path = directory / FILE_NAME
    while not ended.wait(RENEW_SECONDS):
        with contextlib.suppress(Exception):  # a full disk or a network's hiccup: the run finds out, or it passes
            found = _read(path)
            if found and found.holder != lease.holder:
                _LOG.error("%s: process %d on %s has taken the run over", directory, found.process, found.host)
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return
            if found:  # else the directory is being deleted
                lease = dataclasses.replace(lease, renewed=lease.renewed + 1)
                _write(path, lease)


def _give_back(directory: epath.Path, lease: Lease) -> None:
    path = directory / FILE_NAME
    with contextlib.suppress(Exception):
        found = _read(path)
        if found and found.holder == lease.holder:
            path.unlink()


def _read(path: epath.Path) -> Lease | None:
    """The lease in a file; None where there is none, or none that can be read: it was being written, or is damaged."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return Lease(**json.loads(path.read_text()))
    return None


def _write(path: epath.Path, lease: Lease) -> None:
    """Write whole or not at all, by way of a name of its own, since another run may be writing its lease now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{lease.holder}")
    partial.write_text(json.dumps(dataclasses.asdict(lease)) + "\n")
    partial.replace(path)


def _machine() -> str:
    """Identify this machine since it was booted, and the container on it."""
    with contextlib.suppress(OSError):
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {uuid.getnode()}"


def _began(process: int) -> str | None:
    """When a process of this machine began; None if it has ended."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # another user's
        pass
    try:
        state, *rest = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""  # no /proc here: numbers alone have to do
    return None if state in "ZX" else rest[18]  # a process that was killed has a number until its parent has looked
