"""Move arrays from the host to the devices of a mesh and back, with one process or several."""

import typing

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec


def to_devices(arrays, sharding: jax.sharding.Sharding):
    """Put a tree of host arrays, which all processes have, on the devices. Each process sends to its own devices."""
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), arrays)


def place(tree, shardings):
    """Put a tree of host or device arrays on devices by shardings. Do not copy arrays that lie there already."""

    def one(x: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and (sharding.is_fully_addressable or not x.is_fully_addressable):
            return jax.device_put(x, sharding)
        return to_devices(np.asarray(x), sharding)

    return jax.tree.map(one, tree, shardings)


def everywhere(value: object, mesh: Mesh | AbstractMesh) -> jax.Array:
    """Put a scalar on all devices of a mesh."""
    return to_devices(np.asarray(value), NamedSharding(mesh, PartitionSpec()))


def gathered(array: jax.Array) -> jax.Array:
    """Gather an array that is split over several processes on each device of its mesh. Return any other as it is."""
    if array.is_fully_addressable:
        return array
    mesh = typing.cast(NamedSharding, array.sharding).mesh
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec()))


def to_host(array: jax.Array) -> np.ndarray:
    """Return the whole of a small array that is split over a mesh, on every process."""
    return np.asarray(gathered(array))
