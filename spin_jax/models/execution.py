"""How a model is computed: precision, kernels, what is kept for the backward pass, where arrays lie.

None of this changes results, except by rounding.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from spin_jax.config import MeshConfig, ModelSection
from spin_jax.devices import sharding
from spin_jax.devices.compiler_options import compute_dtype
from spin_jax.kernels.block_mask import RESIDUALS
from spin_jax.kernels.flash_cpu import kept_bits
from spin_jax.kernels.interface import choose
from spin_jax.models.config import ModelConfig

# Arrays of a layer that a remat policy may keep, by name.
INPUT, QKV, ATTENDED, GATE, UP, DOWN = "input", "qkv", "attended", "gate", "up", "down"

_save = functools.partial(jax.checkpoint_policies.save_only_these_names, INPUT)
# What each policy keeps for the backward pass; the rest of a layer is computed again. In brackets: the numbers kept for
# a token and layer.
REMAT_POLICIES: dict[str, Callable | None] = {
    # Keep every intermediate: no second forward pass.
    "none": None,
    # Keep the layer's input alone [D]: a second forward pass, except for its last matmul.
    "full": _save(),
    # Also keep rotated queries and keys, and values [+ (N + 2K) H]: spares their projections.
    "qkv": _save(QKV),
    # Also keep the attention kernel's result, and the residual stream after it; with post-norms, the output projection
    # before its norm instead [+ N H + D]. Spares a second forward run of the kernel and the output projection.
    "attention": _save(QKV, RESIDUALS, ATTENDED),
    # Also keep the MLP's gate [+ F], or its gate and up projections [+ 2F]: each spares one of the three large matmuls.
    # "mlp" also keeps the MLP's result if that has a norm [+ D].
    "gate": _save(QKV, RESIDUALS, ATTENDED, GATE),
    "mlp": _save(QKV, RESIDUALS, ATTENDED, GATE, UP, DOWN),
    # Keep all of that but the kernel's result [(N + 2K) H + 2D + 2F]: spares every matmul.
    "projections": _save(QKV, ATTENDED, GATE, UP, DOWN),
}


def saved_numbers(config: ModelConfig, remat: str, lanes: int = 1) -> int:
    """Return how many numbers a policy keeps for a token and layer, with the layer's input; for "none" an estimate.

    Args:
        lanes: heads are padded to a multiple of so many numbers: 128 on TPUs.
    """
    head_dim, mlp, hidden = -(-config.head_dim // lanes) * lanes, config.intermediate_size, config.hidden_size
    heads = config.num_heads * head_dim
    qkv = heads + 2 * config.num_kv_heads * head_dim
    attended, whole_mlp = qkv + heads + hidden, 2 * mlp + (hidden if config.post_norms else 0)
    beside = {"full": 0, "qkv": qkv, "attention": attended, "gate": attended + mlp, "mlp": attended + whole_mlp}
    beside |= {"projections": qkv + hidden + whole_mlp, "none": attended + 5 * mlp + 10 * hidden}
    return hidden + beside[remat]


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model is computed on a mesh. Hashable, hence static under `jax.jit`.

    Attributes:
        dtype: of matmuls and activations. Norms, softmax, log-probs and gradients of params are always f32.
        remat: name in REMAT_POLICIES.
        logits_chunk: response positions whose logits are held at a time; 0 is all.
        kernel: of attention, a name in `kernels.KERNELS`; None is plain jax.numpy.
        mesh: the devices of params and activations; by default this process's first device.
        line: from `sharding.sum_line`. If it is not 0, gradients are summed over the fsdp axis in two steps: across
            lines of so many neighbours, then along them.
    """

    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    remat: str = "full"
    logits_chunk: int = 0
    kernel: str | None = None
    mesh: Mesh = dataclasses.field(default_factory=sharding.one_device_mesh)
    line: int = 0

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    @property
    def on_one_cpu(self) -> bool:
        return self.platform == "cpu" and self.mesh.size == 1


def materialize(x: jax.Array) -> jax.Array:
    """Return x behind an optimization barrier: XLA fuses neither x nor its cotangent into neighbouring matmuls, whose
    tiles would shrink."""
    return jax.lax.optimization_barrier(x)


def remat_name(x: jax.Array, name: str, execution: Execution) -> jax.Array:
    """Return x under a name by which a remat policy may keep it."""
    return _kept_on_cpu(x, name) if execution.on_one_cpu else checkpoint_name(x, name)


_kept_on_cpu = jax.custom_jvp(kept_bits, nondiff_argnums=(1,))
_kept_on_cpu.defjvp(lambda name, primals, tangents: (kept_bits(primals[0], name), tangents[0]))


def make_execution(settings: ModelSection, model: ModelConfig, mesh: Mesh) -> Execution:
    """Return how training computes on a mesh, by `config.model`. "auto" is what the devices are best at.

    Raises:
        UserError: the attention kernel in the config cannot run on these devices.
    """
    device = mesh.devices.flat[0]
    dtype = compute_dtype(settings.compute_dtype, device)
    kernel = choose(settings.attention, device, model.head_dim, dtype)
    return Execution(dtype, settings.remat, settings.logits_chunk, kernel, mesh, sharding.sum_line(mesh))


def make_decode_execution(mesh: MeshConfig, model: ModelConfig, execution: Execution) -> Execution:
    """Return how sampling computes, on the decode mesh of the same devices."""
    num_shards = sharding.decode_shards(execution.mesh.size, mesh.decode_tensor, model.tensor_axes)
    decode_mesh = sharding.decode_mesh(execution.mesh, num_shards)
    return dataclasses.replace(execution, kernel=None, mesh=decode_mesh, line=0)
