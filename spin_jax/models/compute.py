"""How a model is computed: precision, kernels, what is kept for the backward pass, where arrays lie.

None of it changes the result but by rounding.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from spin_jax.models.attention import Kernel
from spin_jax.models.config import ModelConfig
from spin_jax.models.tiled import kept_bits
from spin_jax.models.tiles import RESIDUALS
from spin_jax.sharding import constrain, fitting, gathered, spec

# Arrays of a layer that a remat policy may keep, by name.
INPUT, QKV, ATTENDED, GATE, UP = "input", "qkv", "attended", "gate", "up"

_save = functools.partial(jax.checkpoint_policies.save_only_these_names, INPUT)
# What the backward pass finds in memory; the rest of a layer is computed again. In brackets: numbers a token and layer.
REMAT_POLICIES: dict[str, Callable | None] = {
    # Every intermediate: no second forward pass.
    "none": None,
    # The layer's input alone [D]: a second forward pass, but for its last matmul.
    "full": _save(),
    # Rotated queries and keys, and values [+ (N + 2K) H]: spares their projections.
    "qkv": _save(QKV),
    # And the attention kernel's result, and the residual stream after it [+ N H + D]: spares the kernel's second
    # forward run and the output projection.
    "attention": _save(QKV, RESIDUALS, ATTENDED),
    # And the MLP's gate [+ F], and both its halves [+ 2F]: each spares one of the three large matmuls.
    "gate": _save(QKV, RESIDUALS, ATTENDED, GATE),
    "mlp": _save(QKV, RESIDUALS, ATTENDED, GATE, UP),
    # All of that but the kernel's result: every matmul is spared [(N + 2K) H + 2D + 2F].
    "projections": _save(QKV, ATTENDED, GATE, UP),
}


def kept_numbers(config: ModelConfig, remat: str, lanes: int = 1) -> int:
    """Numbers a token and layer that a policy keeps: those in brackets above, and the layer's input ("none": about).

    Args:
        lanes: heads are padded to a multiple of so many numbers: 128 on TPUs.
    """
    head_dim, mlp, hidden = -(-config.head_dim // lanes) * lanes, config.intermediate_size, config.hidden_size
    heads = config.num_heads * head_dim
    qkv = heads + 2 * config.num_kv_heads * head_dim
    attended = qkv + heads + hidden
    beside = {"full": 0, "qkv": qkv, "attention": attended, "gate": attended + mlp, "mlp": attended + 2 * mlp}
    beside |= {"projections": qkv + hidden + 2 * mlp, "none": attended + 5 * mlp + 10 * hidden}
    return hidden + beside[remat]


@dataclasses.dataclass(frozen=True)
class Compute:
    """Hashable, hence static under `jax.jit`.

    Attributes:
        dtype: of matmuls and activations; norms, softmax, log-probs and gradients of params are f32 always.
        remat: name in REMAT_POLICIES.
        logits_chunk: response positions whose logits are held at a time; 0 is all.
        kernel: of attention; None is plain jax.numpy.
        mesh: the devices of params and activations; None on a single one.
        line: from `sharding.sum_line`. Gradients are summed over lines of so many devices of the fsdp axis apart from
            what is across them; 0: over all devices at once.
    """

    dtype: jnp.dtype = jnp.float32
    remat: str = "full"
    logits_chunk: int = 0
    kernel: Kernel | None = None
    mesh: Mesh | None = None
    line: int = 0

    @property
    def platform(self) -> str:
        return (self.mesh.devices.flat[0] if self.mesh else jax.devices()[0]).platform

    @property
    def on_one_cpu(self) -> bool:
        return self.platform == "cpu" and (self.mesh is None or self.mesh.size == 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4, 5))
def project(
    expression: str, x: jax.Array, w: jax.Array, axes: tuple[str | None, ...], compute: Compute, out_dtype: jnp.dtype
) -> jax.Array:
    """einsum(expression, x, w) with FSDP said out loud, because the partitioner left alone does something else.

    Forward: the shards of w are cast first and gathered then, half the bytes, whole, so that the matmul is one (left
    alone, XLA makes it a loop over pieces that adds up in bfloat16). Backward: dw is summed over tokens and devices in
    f32, whatever the dtype of w's copy, and each device keeps its shard.

    Args:
        expression: such as "BTD,DF->BTF".
        x: in the compute dtype.
        w: a param, sharded.
        axes: of w, their logical names.
        out_dtype: of the result; dx is computed in x's dtype in any case.
    """
    return _einsum(expression, x, _gathered(w, x.dtype, axes, compute.mesh), out_dtype, compute)


def _einsum(expression: str, left: jax.Array, right: jax.Array, dtype: jnp.dtype, compute: Compute) -> jax.Array:
    """einsum, which sums in f32 whatever it is given and gives `dtype`."""
    if compute.on_one_cpu:
        # XLA's matmuls of bfloat16 are faster where the result is f32 (`benchmarks/matmuls.py`): those use a CPU's
        # instructions for them. Two summed axes are taken in their letters' alphabetical order, and transposed first
        # where that is not the order in memory: letters are renamed by where they stand.
        letters = {letter: chr(ord("a") + i) for i, letter in enumerate(dict.fromkeys(re.sub("[,>-]", "", expression)))}
        expression = expression.translate(str.maketrans(letters))
        return jnp.einsum(expression, left, right, preferred_element_type=jnp.float32).astype(dtype)
    return jnp.einsum(expression, left, right, preferred_element_type=dtype)


def _gathered(w: jax.Array, dtype: jnp.dtype, axes: tuple[str | None, ...], mesh: Mesh | None) -> jax.Array:
    if w.dtype != dtype:
        # What the cast gives in any case. But XLA takes a mere cast out of the loop over layers, and then keeps a cast
        # copy of the whole model.
        w = jax.lax.reduce_precision(w, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)
    return constrain(w.astype(dtype), mesh, *gathered(axes))


def _project_forward(expression, x, w, axes, compute, out_dtype):
    return project(expression, x, w, axes, compute, out_dtype), (x, w)


def _project_backward(expression, axes, compute, out_dtype, residuals, dy):
    del out_dtype
    (x, w), (inputs, y_axes) = residuals, expression.split("->")
    x_axes, w_axes = inputs.split(",")
    # Tokens whole, features as w has them: where tensor splits the sequence, each device would sum up a whole dw else.
    split = dict(zip(w_axes, gathered(axes), strict=True)) | {"B": "rows"}
    x_split, y_split = tuple(map(split.get, x_axes)), tuple(map(split.get, y_axes))
    x, dy = constrain(x, compute.mesh, *x_split), constrain(dy.astype(x.dtype), compute.mesh, *y_split)
    dx = _einsum(f"{y_axes},{w_axes}->{x_axes}", dy, _gathered(w, x.dtype, axes, compute.mesh), x.dtype, compute)

    def whole_dw(x: jax.Array, dy: jax.Array) -> jax.Array:
        return jnp.einsum(f"{x_axes},{y_axes}->{w_axes}", x, dy, preferred_element_type=jnp.float32)

    placed = fitting(compute.mesh, w.shape, axes).spec if compute.line else ()
    if "fsdp" not in placed:
        return dx, constrain(whole_dw(x, dy), compute.mesh, *axes).astype(w.dtype)

    def own_dw(x: jax.Array, dy: jax.Array) -> jax.Array:
        return _sum_scatter(whole_dw(x, dy), tuple(placed).index("fsdp"), compute)

    # Unchecked: that data and tensor have one device, and nothing to sum over, is not seen.
    specs = {"in_specs": (spec(*x_split), spec(*y_split)), "out_specs": placed, "check_vma": False}
    return dx, jax.shard_map(own_dw, mesh=compute.mesh, **specs)(x, dy).astype(w.dtype)


def _sum_scatter(x: jax.Array, axis: int, compute: Compute) -> jax.Array:
    """`jax.lax.psum_scatter(x, "fsdp", scatter_dimension=axis, tiled=True)`, across the lines first, then in them."""
    lines = np.arange(compute.mesh.shape["fsdp"]).reshape(-1, compute.line)
    for groups in (lines.T.tolist(), lines.tolist()):
        x = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=axis, axis_index_groups=groups, tiled=True)
    return x


project.defvjp(_project_forward, _project_backward)


class Adapted(NamedTuple):
    """w + a b: a frozen weight with a low-rank update (LoRA, arXiv 2106.09685), in the place of the weight in a tree
    of params.

    Attributes:
        w: [*inputs, *outputs], in any dtype; not differentiated.
        a: f32 [*inputs, R].
        b: f32 [R, *outputs].
    """

    w: jax.Array
    a: jax.Array
    b: jax.Array


def low_rank_axes(axes: tuple[str | None, ...], inputs: int) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """The logical axes of an `Adapted`'s a and b, given those of w, the first `inputs` of which are the matmul's
    inputs: one of the two has w's "embed" axis, the other is split by its rank instead."""
    first, second = axes[:inputs], axes[inputs:]
    return (*first, None if "embed" in first else "rank"), (None if "embed" in second else "rank", *second)


def project_adapted(
    expression: str, x: jax.Array, weight: Adapted, axes: tuple[str | None, ...], compute: Compute, out_dtype: jnp.dtype
) -> jax.Array:
    """`project` of w + a b as x w + (x a) b: the sum is never made, and neither is the gradient of w."""
    x_axes, w_axes, y_axes = re.split(",|->", expression)
    inputs = weight.a.ndim - 1
    a_axes, b_axes = low_rank_axes(axes, inputs)
    low_axes = "".join(axis for axis in x_axes if axis in y_axes) + "R"
    low = project(f"{x_axes},{w_axes[:inputs]}R->{low_axes}", x, weight.a, a_axes, compute, x.dtype)
    update = project(f"{low_axes},R{w_axes[inputs:]}->{y_axes}", low, weight.b, b_axes, compute, out_dtype)
    return project(expression, x, jax.lax.stop_gradient(weight.w), axes, compute, out_dtype) + update


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def swiglu(gate: jax.Array, up: jax.Array, compute: Compute) -> jax.Array:
    """silu(gate) * up. Its derivative is computed once and written down: left alone, the TPU compiler computes it
    anew inside each of the five matmuls that read it, and these matmuls take half as long again."""
    return _swiglu(gate, up, compute)


def _swiglu(gate: jax.Array, up: jax.Array, compute: Compute) -> jax.Array:
    # XLA for CPUs would round to bfloat16 after each of its operations, which takes longer than the operations do.
    gate, up = (x.astype(jnp.float32) if compute.on_one_cpu else x for x in (gate, up))
    return (jax.nn.silu(gate) * up).astype(compute.dtype)


def _swiglu_backward(compute, residuals, dy):
    gate, up, dy = jax.lax.optimization_barrier((*residuals, dy))
    _, vjp = jax.vjp(lambda gate, up: _swiglu(gate, up, compute), gate, up)
    return jax.lax.optimization_barrier(vjp(dy))


swiglu.defvjp(lambda gate, up, compute: (_swiglu(gate, up, compute), (gate, up)), _swiglu_backward)


def written(x: jax.Array) -> jax.Array:
    """x, in memory: neither it nor its cotangent is fused into the matmuls beside it, whose tiles shrink otherwise."""
    return jax.lax.optimization_barrier(x)


def kept(x: jax.Array, name: str, compute: Compute) -> jax.Array:
    """x, under a name that a remat policy may keep."""
    return _kept_on_cpu(x, name) if compute.on_one_cpu else checkpoint_name(x, name)


_kept_on_cpu = jax.custom_jvp(kept_bits, nondiff_argnums=(1,))
_kept_on_cpu.defjvp(lambda name, primals, tangents: (kept_bits(*primals, name), *tangents))
