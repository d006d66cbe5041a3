"""Let one run at a time use a directory: a small file in it, the lease, names the run, which renews it while it lives.

No lock works on both network file systems and object stores, so a run writes its lease and reads it back. If it finds
another run's lease from this machine, it looks whether that process lives. If the lease is from another machine, it
watches for a while whether the lease is renewed. It never compares the clocks of two machines.
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
RENEW_SECONDS = 15.0  # far less often than the one write a second that an object store allows
STALE_SECONDS = 60.0  # another machine's lease that is not renewed for so long is taken over
LOOK_SECONDS = 2.0
# Wait this long before reading a lease back. If two runs take it at the same moment, both have written by then, and the
# last one to write has it.
SETTLE_SECONDS, REMOTE_SETTLE_SECONDS = 0.1, 2.0

_LOG = logging.getLogger(__name__)
_held: dict[epath.Path, "Lease"] = {}  # of this process, by directory


@dataclasses.dataclass(frozen=True)
class Lease:
    """Who holds a directory.

    Attributes:
        host: name of the machine, for people.
        machine: identifies the machine or container, since process numbers are unique within one only.
        process: number of the process on that machine.
        began: when that process began, by the machine's count, since process numbers are used again.
        holder: identifies this lease; a process may hold several directories, or one after the other.
        thread: the thread of that process which holds the lease.
        renewed: how often it was renewed.
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
    """Hold a directory while inside, so that no other run works in it. Process 0 holds it for all processes of a run.

    Nested in another `held` of the same thread and directory, do nothing.

    Args:
        directory: an absolute path, or gs://...; made if missing.
        name: what the user calls it, for the refusal.

    Raises:
        UserError: another run holds it, or nothing can be written there.
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
    with writing(directory):  # nothing was written there before: this may fail
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
    """Whether the holder of a lease is still running."""
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
    """Renew the lease until the run has ended. If another run took it while this machine slept, stop, as by Ctrl-C."""
    path = directory / FILE_NAME
    while not ended.wait(RENEW_SECONDS):
        with contextlib.suppress(Exception):  # a full disk ends the run elsewhere, and a network may recover
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
    """Read a lease; None if there is no file, or if it is damaged or half written."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return Lease(**json.loads(path.read_text()))
    return None


def _write(path: epath.Path, lease: Lease) -> None:
    """Write a lease whole or not at all. Its temporary file is its own: another run may be writing its lease now."""
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
        return ""  # no /proc on this system: compare process numbers alone
    return None if state in "ZX" else rest[18]  # a killed process keeps its number until its parent has waited for it
