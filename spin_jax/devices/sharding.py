"""Where arrays live: the device meshes, and one table from logical axes to mesh axes.

A run has two meshes over the same devices. Training splits params and optimizer state over "fsdp" and gathers each
layer's weights as it is reached, since a step's matmuls are long enough to hide that. A decode step is not: it reads
every weight for one token a row, and so its mesh splits matmuls over "tensor" instead and gathers nothing. The table
serves both, because the decode mesh has an fsdp axis of 1.
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

# Logical axis -> mesh axes. Of params: "embed" is split over fsdp, what a matmul adds to or takes away over tensor;
# "rank" is the inner axis of a low-rank update, for those of its two matrices that have no "embed".
# Of activations: rows over data and fsdp together, every device working on its own rows; "sequence" is the axis of
# tokens between matmuls, where tensor would otherwise hold copies (arXiv 2205.05198).
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
    """The PartitionSpec of an array whose axes have these logical names; None is whole."""
    return PartitionSpec(*(RULES[axis] for axis in axes))


def constrain(x: jax.Array, mesh: Mesh | None, *axes: str | None) -> jax.Array:
    """Tell the partitioner, inside jit, how x is split; an axis that the mesh does not divide stays whole."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, fitting(mesh, x.shape, axes))


def fitting(mesh: Mesh, shape: Sequence[int], axes: Sequence[str | None]) -> NamedSharding:
    """The sharding of an array with these logical axes; an axis that the mesh does not divide stays whole."""
    return NamedSharding(
        mesh,
        spec(*(axis if size % num_shards(mesh, axis) == 0 else None for axis, size in zip(axes, shape, strict=True))),
    )


def gathered(axes: Sequence[str | None]) -> tuple[str | None, ...]:
    """The logical axes of a param whose shards over fsdp were put together."""
    return tuple(None if RULES[axis] == "fsdp" else axis for axis in axes)


def num_shards(mesh: Mesh | AbstractMesh, axis: str | None) -> int:
    """Over how many devices a logical axis is split."""
    names = RULES[axis] or ()
    return math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names))


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[Device] | None = None) -> Mesh:
    """The training mesh over `devices` (None: all there are); a size of -1 takes those that remain.

    TPUs are put in an order that keeps an axis's neighbours close.

    Raises:
        UserError: the sizes do not multiply to the number of devices; the message names sizes that do.
    """
    devices = jax.devices() if devices is None else devices
    return _mesh(_arranged(mesh_sizes(data, fsdp, tensor, len(devices)), devices))


def mesh_sizes(data: int, fsdp: int, tensor: int, total: int) -> list[int]:
    """The sizes of a training mesh of `total` devices, none of them -1.

    Raises:
        UserError: as `make_mesh`.
    """
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
    """How many devices share a copy of the weights while sampling.

    Args:
        asked: `config.mesh.decode_tensor`; -1: as many as possible up to 8, since with more chips a row the all-reduces
            take longer than reading the weights.
        sizes: of the model's axes that are split over tensor.

    Raises:
        UserError: it does not divide the devices and all sizes; the message names ways that do.
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
    """The devices of the training mesh in the same order, for sampling: `num_shards` of them share each copy of the
    weights, and rows are split over the copies."""
    return _mesh(train.devices.reshape(train.size // num_shards, 1, num_shards))


def sum_line(mesh: Mesh) -> int:
    """How many neighbours of the fsdp axis gradients are summed over by themselves; 0: all are taken at once.

    On TPU v4 libtpu makes an all-reduce, which is twice the bytes, of a reduce-scatter over three dimensions of the
    torus. Over z alone, and over the plane of x and y, it stays what it is. Where other axes share the torus, no line
    is told from a plane, and the partitioner is left alone.
    """
    devices = list(mesh.devices.flat)
    if devices[0].device_kind != "TPU v4" or mesh.shape["fsdp"] != mesh.size:
        return 0
    line = sum(device.coords[:2] == devices[0].coords[:2] for device in devices)
    return line if 1 < line < mesh.size else 0


def one_device_mesh() -> Mesh:
    """A mesh of the first device alone, with the same axes."""
    return _mesh(np.array(jax.local_devices()[:1]).reshape(1, 1, 1))


def tree_shardings(mesh: Mesh, abstract: dict, axes: dict) -> dict:
    """The NamedSharding of every array of a tree.

    Args:
        abstract: arrays or jax.ShapeDtypeStructs.
        axes: for each, the tuple of its logical axes.

    Raises:
        UserError: a mesh axis does not divide the axis it splits.
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
    """Rows split over every device that does not share its work with others; the other axes whole."""
    return NamedSharding(mesh, spec("rows"))


def check_pairs(mesh: Mesh | AbstractMesh, pairs: int, micro_batches: int) -> None:
    """Refuse a training batch whose rows could not all hold a pair.

    Raises:
        UserError: naming what to change.
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
        UserError: naming `field` and a size that works.
    """
    devices = num_shards(mesh, "rows")
    if size % devices:
        raise UserError(
            f"{field}={size} does not split over {devices} devices (data x fsdp): write a multiple, as "
            f"{field}={-(-size // devices) * devices}"
        )


def located(shapes, shardings):
    """ShapeDtypeStructs with shardings; one sharding serves all of a tree."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
