"""Keep scores on disk: those of a finished pass over the pairs, and parts of an unfinished one."""

import io
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from spin_jax.data.pairs import Pair
from spin_jax.runtime import multihost
from spin_jax.runtime.files import find, write_whole

_LOG = logging.getLogger(__name__)


def write_scores(path: epath.Path, key: str, logps: np.ndarray, pairs: Sequence[Pair]) -> None:
    """Store scores [..., Y] of `pairs`, in their order, with their key and the pairs' rows and iterations. Delete the
    parts."""
    of_pairs = np.reshape([(pair.row, pair.iteration) for pair in pairs], (*logps.shape[:-1], 2))
    write_whole(path, _npz(key=key, logps=logps, rows=of_pairs[..., 0], iterations=of_pairs[..., 1]))
    delete_parts(path.parent)


def read_scores(path: epath.Path, key: str) -> np.ndarray | None:
    """Read stored scores; None if there is no file, or it is damaged or has another key."""
    found = _read(path, key)
    return None if found is None else found["logps"]


def delete_parts(directory: epath.Path, name: str = "part") -> None:
    """Delete the parts of a pass. Call it when its scores are stored."""
    for part in find(directory, f"{name}-*.npz"):
        part.unlink()


class Parts:
    """The scored batches of an unfinished pass, in files NAME-NUMBER.npz of `every` batches. Process 0 reads and writes
    them."""

    def __init__(self, directory: epath.Path, key: str, every: int, name: str = "part"):
        self._directory, self._key, self._every, self._name, self._kept = directory, key, every, name, 0

    def read(self) -> list[np.ndarray]:
        """Return the scores of the first batches, [pairs of a batch, Y] each, up to the first one that is missing."""
        done = multihost.on_process_zero(self._read)
        self._kept = len(done)
        return done

    def keep(self, done: Sequence[np.ndarray]) -> None:
        """Write the batches that are in no file yet, if there are `every` of them."""
        new = done[self._kept :]
        if len(new) >= self._every:
            if multihost.is_first():
                arrays = {"logps": np.concatenate(new), "lengths": list(map(len, new))}
                write_whole(self._path(self._kept), _npz(key=self._key, **arrays))
            self._kept = len(done)

    def _read(self) -> list[np.ndarray]:
        done: list[np.ndarray] = []
        while part := _read(self._path(len(done)), self._key):
            done += np.split(part["logps"], np.cumsum(part["lengths"])[:-1])
        return done

    def _path(self, first: int) -> epath.Path:
        return self._directory / f"{self._name}-{first:06d}.npz"


def _npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _read(path: epath.Path, key: str) -> dict[str, np.ndarray] | None:
    """Read the arrays of a file; None if it is missing or damaged, or has another key."""
    if not path.exists():
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes())) as stored:
            found = dict(stored)
    except Exception as error:  # noqa: BLE001  zipfile, zlib, numpy and pickle each raise their own
        _LOG.warning("%s is damaged (%s): these pairs are scored anew", path, error)
        return None
    if str(found.get("key")) != key:
        _LOG.warning("%s holds scores of another model, other pairs, batches or programs: they are scored anew", path)
        return None
    return found
