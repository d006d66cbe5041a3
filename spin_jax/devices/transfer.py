"""Host arrays to the devices of a mesh and back, over one process or several."""

import typing

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec


def to_devices(arrays, sharding: jax.sharding.Sharding):
    """A tree of host arrays that all processes have, on the devices: a process sends its own devices their rows."""
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), arrays)


def place(tree, shardings):
    """A tree of host or device arrays with these shardings; an array that lies so already is not copied."""

    def one(x: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and (sharding.is_fully_addressable or not x.is_fully_addressable):
            return jax.device_put(x, sharding)
        return to_devices(np.asarray(x), sharding)

    return jax.tree.map(one, tree, shardings)


def everywhere(value: object, mesh: Mesh | AbstractMesh) -> jax.Array:
    """A scalar on all devices of a mesh."""
    return to_devices(np.asarray(value), NamedSharding(mesh, PartitionSpec()))


def gathered(array: jax.Array) -> jax.Array:
    """An array that is split over several processes, whole on each of its mesh's devices; any other as it is."""
    if array.is_fully_addressable:
        return array
    mesh = typing.cast(NamedSharding, array.sharding).mesh
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec()))


def to_host(array: jax.Array) -> np.ndarray:
    """The whole of a small array that is split over a mesh, on every process."""
    return np.asarray(gathered(array))
