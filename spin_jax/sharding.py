"""Where arrays live: the device mesh, and one table from logical axes to mesh axes."""

import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spin_jax.errors import UserError
from spin_jax.models import ModelConfig, abstract_params, logical_axes

AXES = ("data", "fsdp", "tensor")

# Params: the hidden axis is split over fsdp (gathered layer by layer inside the scan), heads, MLP and vocabulary over
# tensor. Rows are split over data and fsdp together: every device works on its own rows.
RULES = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    None: None,
}
BATCH_AXES = ("data", "fsdp")


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1) -> Mesh:
    """A mesh over all devices with axes data, fsdp, tensor; a size of -1 takes the devices that remain.

    Raises:
        UserError: the sizes do not multiply to the number of devices; the message names sizes that do.
    """
    sizes, total = [data, fsdp, tensor], jax.device_count()
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, total // math.prod(size for size in sizes if size != -1))
    if math.prod(sizes) != total:
        possible = ", ".join(f"fsdp={total // t} tensor={t}" for t in (1, 2, 4, 8) if total % t == 0)
        raise UserError(
            f"config.mesh data={data} fsdp={fsdp} tensor={tensor} does not make {total} devices: "
            f"possible with data=1 are {possible}"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def one_device_mesh() -> Mesh:
    """A mesh of the first device alone, with the same axes."""
    return jax.make_mesh(
        (1, 1, 1), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES), devices=jax.local_devices()[:1]
    )


def param_shardings(mesh: Mesh, config: ModelConfig) -> dict:
    """The NamedSharding of every param, as a tree like the params.

    Raises:
        UserError: a mesh axis does not divide the model's axis it splits.
    """

    def one(leaf: jax.ShapeDtypeStruct, axes: tuple[str | None, ...]) -> NamedSharding:
        for size, axis in zip(leaf.shape, axes, strict=True):
            if RULES[axis] and size % mesh.shape[RULES[axis]]:
                raise UserError(
                    f"config.mesh.{RULES[axis]}={mesh.shape[RULES[axis]]} does not divide the model's {axis} axis "
                    f"of {size}: choose a divisor"
                )
        return NamedSharding(mesh, PartitionSpec(*(RULES[axis] for axis in axes)))

    return jax.tree.map(one, abstract_params(config), logical_axes(config))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over every device that does not share its work with others; the other axes whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_batch(mesh: Mesh, field: str, size: int) -> None:
    """Refuse a batch that the mesh cannot split evenly.

    Raises:
        UserError: naming `field` and a size that works.
    """
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if size % devices:
        raise UserError(
            f"{field}={size} does not split over {devices} devices (data x fsdp): use a multiple, "
            f"for example {-(-size // devices) * devices}"
        )
