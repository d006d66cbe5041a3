"""Run several processes as one: each makes its share, all agree on what comes next, and process 0 writes.

A process drives the devices of its host (`jax.distributed`). All processes must call the functions here in the same
order. They exchange small values only, at most rows of token ids, and never params. A single process exchanges nothing.
"""

import contextvars
import functools
import logging
import math
import pathlib
import pickle
import time
import typing
import uuid
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spin_jax.config import Config, as_json
from spin_jax.errors import UserError
from spin_jax.runtime.files import write_whole

# How long a process that ends waits for the others. After that jax ends them all: if one has failed alone, the others
# wait for it in some collective, and would never end.
SHUTDOWN_SECONDS = 15
SHARED_ROWS = 8192  # rows made between two exchanges, by all processes together
GATHERED = 1024  # items of a process in one exchange

_LOG = logging.getLogger(__name__)

_alone = contextvars.ContextVar("alone", default=False)  # True inside `run_alone`

T = TypeVar("T")
Item = TypeVar("Item")


def start(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Join the other processes; call it before a device is touched.

    Args:
        coordinator: HOST:PORT of process 0, or "auto" where jax can find it (SLURM, Open MPI, GKE). None is a single
            process, except on a TPU, where jax looks for the other hosts of the slice.
        num_processes, process_id: how many processes there are, and which one this is, from 0. None where jax can find
            them.

    Raises:
        UserError: jax cannot find the other processes.
    """
    has_tpu = any(pathlib.Path("/dev").glob("accel[0-9]*")) or any(pathlib.Path("/dev/vfio").glob("[0-9]*"))
    if coordinator is None and not has_tpu:
        return
    address = None if coordinator == "auto" else coordinator
    if address:
        _LOG.info("process %s of %s looks for the others at %s", process_id, num_processes, address)
    try:
        jax.distributed.initialize(address, num_processes, process_id, shutdown_timeout_seconds=SHUTDOWN_SECONDS)
    except ValueError as error:
        if coordinator is not None:
            raise UserError(
                f"--coordinator={coordinator}: jax does not find the other processes ({str(error).rstrip('.')}); give "
                "--coordinator=HOST:PORT, --num_processes=N and --process_id=I"
            ) from None
    if not is_first():
        logging.getLogger("spin_jax").setLevel(logging.ERROR)


def are_several() -> bool:
    """Whether other processes make the same calls as this one."""
    return jax.process_count() > 1 and not _alone.get()


def is_first() -> bool:
    """Whether this is process 0, which writes shared files, shows progress and logs. Inside `run_alone` each is."""
    return _alone.get() or jax.process_index() == 0


def gather(value: T) -> list[T]:
    """Return every process's value, in the order of processes. Values must be picklable."""
    if not are_several():
        return [value]
    mine = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(mine)))
    padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)  # powers of two: each size is compiled
    padded[: len(mine)] = mine
    everything = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(everything, sizes, strict=True)]


def gather_lists(items: Sequence[Item]) -> list[Item]:
    """Return every process's items, in the order of processes. Exchange blocks of `GATHERED`, to need little memory."""
    if not are_several():
        return list(items)
    blocks = max(gather(math.ceil(len(items) / GATHERED)))
    gathered = [gather(items[i * GATHERED :][:GATHERED]) for i in range(blocks)]
    return [item for process in zip(*gathered, strict=True) for block in process for item in block]


def on_all_processes(make: Callable[[], T]) -> list[T]:
    """Call make() on every process, wait for all of them, and return all results, in the order of processes.

    Raises:
        UserError: on all processes if `make` raises it on one, so that none is left waiting.
    """
    if not are_several():
        return [make()]
    try:
        outcome = (make(), None)
    except UserError as error:
        outcome = (None, str(error))
    outcomes = gather(outcome)
    for _, mistake in outcomes:
        if mistake is not None:
            raise UserError(mistake)
    return [typing.cast(T, result) for result, _ in outcomes]


def on_each_process(make: Callable[[], T]) -> T:
    """Like `on_all_processes`, but return this process's own result, which need not be picklable."""
    own: list[T] = []
    on_all_processes(lambda: own.append(make()))
    return own[0]


def on_process_zero(make: Callable[[], T]) -> T:
    """Call make() on process 0 alone, and return its result on all processes.

    Ask this way whether a file exists: a network file system may show a new file to each process at another time, and
    all processes must do the same next.
    """
    return typing.cast(T, on_all_processes(lambda: run_alone(make) if is_first() else None)[0])


def run_alone(make: Callable[[], T]) -> T:
    """Call make() as if this were the only process, so that functions of this module do not wait for the others."""
    token = _alone.set(True)
    try:
        return make()
    finally:
        _alone.reset(token)


def parallel_map(make: Callable[[Item], T], items: Sequence[Item]) -> list[T]:
    """Return [make(item) for item in items] on every process. Each of n processes makes every n-th."""
    first, step = jax.process_index(), jax.process_count()
    if step == 1:
        return list(map(make, items))
    made: list[T] = []
    for start in range(0, len(items), SHARED_ROWS):
        block = items[start : start + SHARED_ROWS]
        parts = on_all_processes(lambda block=block: list(map(make, block[first::step])))
        made += [parts[i % step][i // step] for i in range(len(block))]
    return made


def any_process(flag: bool) -> jax.Array:
    """Return whether `flag` is set on any process, as a bool scalar on the devices. Do not wait for it."""
    by_device, reduce = _any_process()
    flags = jax.make_array_from_callback((jax.device_count(),), by_device, lambda _: np.array([flag]))
    return reduce(flags)


@functools.cache
def _any_process() -> tuple[NamedSharding, Callable]:
    mesh = Mesh(np.array(jax.devices()), "device")
    return (
        NamedSharding(mesh, PartitionSpec("device")),
        jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec())),
    )


def check_alike(config: Config) -> None:
    """Refuse processes that were started with different settings: they would wait for each other forever."""
    first, *others = gather(as_json(config))
    for process, other in enumerate(others, start=1):
        if changed := [field for field in first if first[field] != other[field]]:
            raise UserError(
                f"--config.{changed[0]} is {first[changed[0]]!r} for process 0 and {other[changed[0]]!r} for process "
                f"{process}: start all with the same settings"
            )


def check_shared(directory: epath.Path) -> None:
    """Refuse a directory that the hosts do not share: each would wait for files of the others."""
    if not are_several():
        return
    note = directory / f"seen_by_all_hosts_{gather(uuid.uuid4().hex)[0]}"
    on_process_zero(lambda: write_whole(note, ""))
    seen = gather(_appears(note))
    on_process_zero(note.unlink)
    if not all(seen):
        raise UserError(
            f"{directory} is not one directory for all hosts (process {seen.index(False)} does not see what "
            "process 0 writes): give a gs:// path, or a file system that all of them mount"
        )


def _appears(path: epath.Path, seconds: int = 5) -> bool:
    for _ in range(seconds):
        if path.exists():
            return True
        time.sleep(1)
    return False
