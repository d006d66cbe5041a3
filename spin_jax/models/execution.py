"""How a model is computed: precision, kernels, what is kept for the backward pass, where arrays lie.

None of it changes the result but by rounding.
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
# What the backward pass finds in memory; the rest of a layer is computed again. In brackets: numbers a token and layer.
REMAT_POLICIES: dict[str, Callable | None] = {
    # Every intermediate: no second forward pass.
    "none": None,
    # The layer's input alone [D]: a second forward pass, but for its last matmul.
    "full": _save(),
    # Rotated queries and keys, and values [+ (N + 2K) H]: spares their projections.
    "qkv": _save(QKV),
    # And the attention kernel's result, and the residual stream after it, or what is normed before it is added to that
    # [+ N H + D]: spares the kernel's second forward run and the output projection.
    "attention": _save(QKV, RESIDUALS, ATTENDED),
    # And the MLP's gate [+ F], and both its halves [+ 2F]: each spares one of the three large matmuls. With both goes
    # what the MLP gives where that is normed [+ D].
    "gate": _save(QKV, RESIDUALS, ATTENDED, GATE),
    "mlp": _save(QKV, RESIDUALS, ATTENDED, GATE, UP, DOWN),
    # All of that but the kernel's result: every matmul is spared [(N + 2K) H + 2D + 2F].
    "projections": _save(QKV, ATTENDED, GATE, UP, DOWN),
}


def saved_numbers(config: ModelConfig, remat: str, lanes: int = 1) -> int:
    """Numbers a token and layer that a policy keeps: those in brackets above, and the layer's input ("none": about).

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
    """Hashable, hence static under `jax.jit`.

    Attributes:
        dtype: of matmuls and activations; norms, softmax, log-probs and gradients of params are f32 always.
        remat: name in REMAT_POLICIES.
        logits_chunk: response positions whose logits are held at a time; 0 is all.
        kernel: of attention, a name in `kernels.KERNELS`; None is plain jax.numpy.
        mesh: the devices of params and activations; the first of this process by default.
        line: from `sharding.sum_line`. Gradients are summed over lines of so many devices of the fsdp axis apart from
            what is across them; 0: over all devices at once.
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
    """x, in memory: neither it nor its cotangent is fused into the matmuls beside it, whose tiles shrink otherwise."""
    return jax.lax.optimization_barrier(x)


def remat_name(x: jax.Array, name: str, execution: Execution) -> jax.Array:
    """x, under a name that a remat policy may keep."""
    return _kept_on_cpu(x, name) if execution.on_one_cpu else checkpoint_name(x, name)


_kept_on_cpu = jax.custom_jvp(kept_bits, nondiff_argnums=(1,))
_kept_on_cpu.defjvp(lambda name, primals, tangents: (kept_bits(primals[0], name), tangents[0]))


def make_execution(settings: ModelSection, model: ModelConfig, mesh: Mesh) -> Execution:
    """How `config.model` says that training computes on a mesh; "auto" is what its devices are best at.

    Raises:
        UserError: the attention kernel that was asked for cannot run.
    """
    device = mesh.devices.flat[0]
    dtype = compute_dtype(settings.compute_dtype, device)
    kernel = choose(settings.attention, device, model.head_dim, dtype)
    return Execution(dtype, settings.remat, settings.logits_chunk, kernel, mesh, sharding.sum_line(mesh))


def make_decode_execution(mesh: MeshConfig, model: ModelConfig, execution: Execution) -> Execution:
    """The same for sampling, on the decode mesh of the same devices."""
    num_shards = sharding.decode_shards(execution.mesh.size, mesh.decode_tensor, model.tensor_axes)
    decode_mesh = sharding.decode_mesh(execution.mesh, num_shards)
    return dataclasses.replace(execution, kernel=None, mesh=decode_mesh, line=0)
