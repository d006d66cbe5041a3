"""How arrays are split: the device meshes, and one table from logical axes to mesh axes.

A run has two meshes over the same devices. Training splits params and optimizer state over "fsdp", and gathers each
layer's weights when it is reached: a step's matmuls are long enough to hide that. A decode step is too short: it reads
every weight for one token of each row. So its mesh splits matmuls over "tensor" instead, and gathers nothing. One table
serves both meshes, because the decode mesh has an fsdp axis of 1.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from spin_jax.devices.accelerators import Device
from spin_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes.
# Params: "embed" is split over fsdp; vocabulary, MLP and heads are split over tensor. "rank" is the inner axis of a
# low-rank update, which is split in the one of its two matrices that has no "embed".
# Activations: "rows" are split over data and fsdp together, so that each device has its own. "sequence" is the axis of
# tokens between matmuls, which is split because devices of the tensor axis would hold copies there (arXiv 2205.05198).
RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "rank": "fsdp",
    "rows": ("data", "fsdp"),
    "sequence": "tensor",
    None: None,
}


def spec(*axes: str | None) -> PartitionSpec:
    """Return the PartitionSpec of an array whose axes have these logical names; None is not split."""
    return PartitionSpec(*(RULES[axis] for axis in axes))


def constrain(x: jax.Array, mesh: Mesh | None, *axes: str | None) -> jax.Array:
    """Tell the partitioner, inside jit, how x is split. An axis that the mesh does not divide stays whole."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, fitting(mesh, x.shape, axes))


def fitting(mesh: Mesh, shape: Sequence[int], axes: Sequence[str | None]) -> NamedSharding:
    """Return the sharding of an array with these logical axes. An axis that the mesh does not divide stays whole."""
    return NamedSharding(
        mesh,
        spec(*(axis if size % num_shards(mesh, axis) == 0 else None for axis, size in zip(axes, shape, strict=True))),
    )


def gathered(axes: Sequence[str | None]) -> tuple[str | None, ...]:
    """Return the logical axes of a param after its shards over fsdp were gathered."""
    return tuple(None if RULES[axis] == "fsdp" else axis for axis in axes)


def num_shards(mesh: Mesh | AbstractMesh, axis: str | None) -> int:
    """Return over how many devices a logical axis is split."""
    names = RULES[axis] or ()
    return math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[Device] | None = None) -> Mesh:
    """Make the training mesh over `devices` (None: all there are). A size of -1 takes the devices that remain.

    TPUs are ordered so that neighbours along an axis are close to each other.

    Raises:
        UserError: the sizes do not multiply to the number of devices; the message names sizes that do.
    """
    devices = jax.devices() if devices is None else devices
    return _mesh(_arranged(mesh_sizes(data, fsdp, tensor, len(devices)), devices))


def mesh_sizes(data: int, fsdp: int, tensor: int, total: int) -> list[int]:
    """Return the sizes of a training mesh of `total` devices, none of them -1. Raise as `make_mesh` does."""
    sizes = [data, fsdp, tensor]
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, total // math.prod(size for size in sizes if size != -1))
    if math.prod(sizes) != total:
        possible = " or ".join(
            f"--config.mesh.fsdp={total // t} --config.mesh.tensor={t}" for t in (1, 2, 4, 8) if total % t == 0
        )
        raise UserError(
            f"--config.mesh.data={data} --config.mesh.fsdp={fsdp} --config.mesh.tensor={tensor} do not make {total} "
            f"devices: write {possible}, with --config.mesh.data=1, or take a config that is made for them"
        )
    return sizes


def _arranged(sizes: Sequence[int], devices: Sequence[Device]) -> np.ndarray:
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 and sizes[0] % slices == 0:  # the data axis crosses the slow network between slices
        inner = (sizes[0] // slices, *sizes[1:])
        return mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def _mesh(devices: np.ndarray) -> Mesh:
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def decode_shards(devices: int, asked: int, sizes: Sequence[int]) -> int:
    """Return how many devices share a copy of the weights while sampling.

    Args:
        asked: `config.mesh.decode_tensor`. -1 is as many as possible, up to 8: with more, all-reduces take longer than
            reading the weights.
        sizes: of the model's axes that are split over tensor.

    Raises:
        UserError: the number does not divide the devices and all sizes; the message names numbers that do.
    """
    common = math.gcd(devices, *sizes)
    possible = [num_shards for num_shards in range(1, common + 1) if common % num_shards == 0]
    num_shards = max(size for size in possible if size <= 8) if asked == -1 else asked
    if num_shards not in possible:
        raise UserError(
            f"--config.mesh.decode_tensor={asked} must divide {devices} devices and the model's heads, MLP and "
            f"vocabulary: possible are {', '.join(map(str, possible))}"
        )
    return num_shards


def decode_mesh(train: Mesh, num_shards: int) -> Mesh:
    """Make the mesh for sampling, of the training mesh's devices in the same order. `num_shards` devices share each
    copy of the weights, and rows are split over the copies."""
    return _mesh(train.devices.reshape(train.size // num_shards, 1, num_shards))


def sum_line(mesh: Mesh) -> int:
    """Return the length of the lines into which the fsdp axis is cut to sum gradients in two steps; 0 sums in one step.

    On TPU v4, libtpu turns a reduce-scatter over three dimensions of the torus into an all-reduce, which sends twice
    the bytes. It does not do so over z alone, nor over the plane of x and y. If other mesh axes share the torus, lines
    and planes cannot be told apart, so leave the sum to the partitioner.
    """
    devices = list(mesh.devices.flat)
    if devices[0].device_kind != "TPU v4" or mesh.shape["fsdp"] != mesh.size:
        return 0
    line = sum(device.coords[:2] == devices[0].coords[:2] for device in devices)
    return line if 1 < line < mesh.size else 0


def one_device_mesh() -> Mesh:
    """Make a mesh of this process's first device alone."""
    return _mesh(np.array(jax.local_devices()[:1]).reshape(1, 1, 1))


def tree_shardings(mesh: Mesh, abstract: dict, axes: dict) -> dict:
    """Return the NamedSharding of every array of a tree.

    Args:
        abstract: arrays or jax.ShapeDtypeStructs.
        axes: tuple of logical axes for each.

    Raises:
        UserError: a mesh axis does not divide the axis that it splits.
    """

    def one(leaf: jax.ShapeDtypeStruct, names: tuple[str | None, ...]) -> NamedSharding:
        for size, axis in zip(leaf.shape, names, strict=True):
            if size % num_shards(mesh, axis):
                raise UserError(
                    f"--config.mesh.{RULES[axis]}={num_shards(mesh, axis)} does not divide the model's {axis} axis of "
                    f"{size}: choose a divisor"
                )
        return NamedSharding(mesh, spec(*names))

    return jax.tree.map(one, abstract, axes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of batches: rows are split over the data and fsdp axes, and other axes are not."""
    return NamedSharding(mesh, spec("rows"))


def check_pairs(mesh: Mesh | AbstractMesh, pairs: int, micro_batches: int) -> None:
    """Refuse a training batch with fewer pairs than rows.

    Raises:
        UserError: with what to change.
    """
    rows = num_shards(mesh, "rows") * micro_batches
    if rows > pairs:
        raise UserError(
            f"--config.train.batch_size={pairs} pairs do not fill a row on each of {rows // micro_batches} devices "
            f"(data x fsdp) in each of {micro_batches} micro-batches: write --config.train.batch_size={rows}, lower "
            "--config.train.micro_batches, or raise --config.mesh.tensor"
        )


def check_batch(mesh: Mesh, field: str, size: int) -> None:
    """Refuse a batch that the mesh cannot split evenly.

    Raises:
        UserError: with `field`, and a size that works.
    """
    devices = num_shards(mesh, "rows")
    if size % devices:
        raise UserError(
            f"{field}={size} does not split over {devices} devices (data x fsdp): write a multiple, as "
            f"{field}={-(-size // devices) * devices}"
        )


def located(shapes, shardings):
    """Return ShapeDtypeStructs with shardings: a tree of these, or one for all."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
