"""Orbax checkpoints of the training state within an iteration."""

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from spin_jax.runtime import multihost
from spin_jax.runtime.files import first_line, writing
from spin_jax.runtime.out_of_memory import is_exhausted

KEEP = 2  # the newest, and one before it, in case the newest cannot be read

_LOG = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one training stage, under `directory` (local or gs://).

    All processes must call every method; each writes and reads the shards of its own devices. Saving is asynchronous:
    training goes on while arrays are written. A checkpoint that was not finished is never listed. Each has a checksum
    of its state, since Orbax may read a damaged one without an error.

    Raises:
        UserError: the disk is full, or `directory` cannot be written. For a save, the next call that waits raises it.
    """

    def __init__(self, directory: epath.PathLike):
        self._directory = epath.Path(directory)
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_is_news)
        warnings.filterwarnings("ignore", "coroutine 'Store", RuntimeWarning)  # what a damaged checkpoint leaves behind
        with self._writing():
            multihost.on_process_zero(lambda: self._directory.mkdir(parents=True, exist_ok=True))
            self._checkpointer = ocp.training.Checkpointer(
                self._directory,
                preservation_policy=ocp.training.preservation_policies.LatestN(KEEP),  # pyright: ignore[reportArgumentType]
                cleanup_tmp_directories=True,
            )

    def latest_step(self) -> int | None:
        """Return the step of the newest finished checkpoint, as process 0 sees it; None if there is none."""
        latest = self._checkpointer.latest
        return multihost.on_process_zero(lambda: None if latest is None else latest.step)

    def restore_newest(self, state):
        """Return (state, step) of the newest checkpoint that can be read, or (`state`, 0). Set aside damaged ones.

        Args:
            state: a tree of arrays, whose shardings may differ from those it was saved with.
        """
        while (step := self.latest_step()) is not None:
            restored, why = self.read(step, state)
            if not (reasons := list(filter(None, multihost.gather(why)))):
                return restored, step
            self._set_aside(step, reasons[0])
        return state, 0

    def read(self, step: int, state) -> tuple[Any, str | None]:
        """Read a checkpoint. Return (state, None), or (None, why it cannot be read)."""
        abstract = abstract_like({"state": state, "checksum": checksum(state)})
        try:
            saved = self._checkpointer.load(step, abstract)
        except Exception as error:  # Orbax, tensorstore and zstd raise what they like
            if is_exhausted(error):
                raise
            return None, first_line(_root_of(error))
        sound = int(checksum(saved["state"])) == int(saved["checksum"])
        return (saved["state"], None) if sound else (None, "its checksum is another")

    def _set_aside(self, step: int, why: str) -> None:
        damaged = self._directory / str(step)
        aside = damaged_of(self._directory) / str(step)

        def move() -> None:
            with writing(aside):
                aside.parent.mkdir(parents=True, exist_ok=True)
                aside.rmtree(missing_ok=True)
                damaged.rename(aside)

        multihost.on_process_zero(move)
        self._checkpointer.reload()
        before = self.latest_step()
        _LOG.warning(
            "%s is damaged (%s): set aside as %s; the stage goes on from %s",
            *(damaged, why, aside, "its start" if before is None else f"step {before}"),
        )

    def save(self, step: int, state, *, wait: bool = False) -> None:
        """Save `state` as `step`, unless that step is saved already. With `wait`, return only when it is on disk."""
        with self._writing():
            if self.latest_step() == step:
                self._checkpointer.wait()
                return
            if self._checkpointer.is_saving_in_progress():
                self._checkpointer.wait()
            self._checkpointer.save_async(step, {"state": state, "checksum": checksum(state)}, force=True)
            if wait:
                self._checkpointer.wait()

    def close(self) -> None:
        """Wait for a save in progress, and close."""
        with self._writing():
            self._checkpointer.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        # Also after an error: another try in this process must not meet a save in progress.
        self.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """`files.writing`, without what tensorstore prints about other writes after one has failed."""
        before = sys.unraisablehook
        sys.unraisablehook = lambda unraisable: "loop is closed" in str(unraisable.exc_value) or before(unraisable)
        try:
            with writing(self._directory):
                yield
        finally:
            sys.unraisablehook = before


def damaged_of(directory: epath.Path) -> epath.Path:
    """Return the directory to which damaged checkpoints of `directory` are moved."""
    return directory.with_name(f"{directory.name}_damaged")


@jax.jit
def checksum(state) -> jax.Array:
    """Sum the bits of a tree of arrays as uint32. It does not depend on shardings, and a flipped bit changes it."""

    def bits(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
        unsigned = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
        return jnp.sum(unsigned, dtype=jnp.uint32)

    return functools.reduce(jnp.add, map(bits, jax.tree.leaves(state)))


def abstract_like(state):
    """Return a tree of arrays as jax.ShapeDtypeStruct with shardings."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _root_of(error: BaseException) -> BaseException:
    while cause := error.__cause__ or error.__context__:
        error = cause
    return error


def _is_news(record: logging.LogRecord) -> bool:
    """Drop log records of Orbax and tensorstore: they log an error in each thread and future, and raise it too."""
    text = record.pathname + record.getMessage()
    return not any(name in text for name in ("orbax", "tensorstore"))
