"""Orbax checkpoints of the training state within an iteration."""

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from spin_jax import hosts

KEEP = 2  # the newest, and the one before it: if the newest cannot be read, it is deleted by hand


class Checkpoints:
    """The checkpoints of one training stage, under `directory` (local or gs://). All processes call every method: each
    writes and reads the shards of its own devices.

    Saving is asynchronous: the step goes on while the arrays travel. A checkpoint that was not finished is never
    listed.
    """

    def __init__(self, directory: epath.PathLike):
        directory = epath.Path(directory)
        hosts.on_first(lambda: directory.mkdir(parents=True, exist_ok=True))
        self._checkpointer = ocp.training.Checkpointer(
            directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(KEEP),
            cleanup_tmp_directories=True,
        )

    def latest_step(self) -> int | None:
        """The newest finished checkpoint's step, or None; as the first process sees it."""
        latest = self._checkpointer.latest
        return hosts.on_first(lambda: None if latest is None else latest.step)

    def restore(self, step: int, abstract_state):
        """The state at `step`. `abstract_state`: a tree of jax.ShapeDtypeStruct with shardings, which may differ from
        those it was saved with."""
        return self._checkpointer.load(step, abstract_state)

    def save(self, step: int, state, *, wait: bool = False) -> None:
        """Save `state` as `step`; with `wait`, return only when it is whole on disk. A step that is saved already is
        left as it is."""
        if self.latest_step() == step:
            self._checkpointer.wait()
            return
        if self._checkpointer.is_saving_in_progress():
            self._checkpointer.wait()
        self._checkpointer.save_async(step, state, force=True)
        if wait:
            self._checkpointer.wait()

    def close(self) -> None:
        """Wait for what is being saved."""
        self._checkpointer.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        # On an error too: whoever tries again in this process must not meet a save that is still on its way.
        self.close()


def abstract_like(state):
    """The shapes, dtypes and shardings of a tree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
