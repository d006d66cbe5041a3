"""Matmuls with weights that are split over devices, and the elementwise functions between them."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spin_jax.devices.sharding import constrain, fitting, gathered, spec
from spin_jax.models.execution import Execution


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4, 5))
def project(
    expression: str,
    x: jax.Array,
    w: jax.Array,
    axes: tuple[str | None, ...],
    execution: Execution,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """einsum(expression, x, w) with FSDP written out, since XLA's partitioner would choose something else.

    Forward: cast the shards of w, then gather them, which is half the bytes, then do one matmul. (The partitioner would
    loop over pieces, and sum them in bfloat16.) Backward: sum dw over tokens and devices in f32, whatever the dtype of
    the gathered w, and leave each device its shard.

    Args:
        expression: such as "BTD,DF->BTF".
        x: in the compute dtype.
        w: a param, sharded.
        axes: logical names of w's axes.
        out_dtype: of the result. dx is always computed in x's dtype.
    """
    return _einsum(expression, x, _gathered(w, x.dtype, axes, execution.mesh), out_dtype, execution)


def _einsum(expression: str, left: jax.Array, right: jax.Array, dtype: jnp.dtype, execution: Execution) -> jax.Array:
    """einsum with sums in f32 and a result of `dtype`."""
    if execution.on_one_cpu:
        # Ask for an f32 result: XLA's matmuls of bfloat16 then use a CPU's instructions for them, and are faster
        # (`benchmarks/matmuls.py`). And rename letters by where they stand: einsum takes two summed axes in
        # alphabetical order, and would transpose arrays first if that is not the order in memory.
        letters = {letter: chr(ord("a") + i) for i, letter in enumerate(dict.fromkeys(re.sub("[,>-]", "", expression)))}
        expression = expression.translate(str.maketrans(letters))
        return jnp.einsum(expression, left, right, preferred_element_type=jnp.float32).astype(dtype)
    return jnp.einsum(expression, left, right, preferred_element_type=dtype)


def _gathered(w: jax.Array, dtype: jnp.dtype, axes: tuple[str | None, ...], mesh: Mesh | None) -> jax.Array:
    if w.dtype != dtype:
        # Round before the cast, which changes no result: XLA would move a mere cast out of the loop over layers, and
        # keep a cast copy of the whole model.
        w = jax.lax.reduce_precision(w, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)
    return constrain(w.astype(dtype), mesh, *gathered(axes))


def _project_forward(expression, x, w, axes, execution, out_dtype):
    return project(expression, x, w, axes, execution, out_dtype), (x, w)


def _project_backward(expression, axes, execution, out_dtype, residuals, dy):
    del out_dtype
    (x, w), (inputs, y_axes) = residuals, expression.split("->")
    x_axes, w_axes = inputs.split(",")
    # Split features as in w, and gather tokens: if the tensor axis split tokens, each device would sum a whole dw.
    split = dict(zip(w_axes, gathered(axes), strict=True)) | {"B": "rows"}
    x_split, y_split = tuple(map(split.get, x_axes)), tuple(map(split.get, y_axes))
    x, dy = constrain(x, execution.mesh, *x_split), constrain(dy.astype(x.dtype), execution.mesh, *y_split)
    dx = _einsum(f"{y_axes},{w_axes}->{x_axes}", dy, _gathered(w, x.dtype, axes, execution.mesh), x.dtype, execution)

    def whole_dw(x: jax.Array, dy: jax.Array) -> jax.Array:
        return jnp.einsum(f"{x_axes},{y_axes}->{w_axes}", x, dy, preferred_element_type=jnp.float32)

    placed = fitting(execution.mesh, w.shape, axes).spec if execution.line else ()
    if "fsdp" not in placed:
        return dx, constrain(whole_dw(x, dy), execution.mesh, *axes).astype(w.dtype)

    def own_dw(x: jax.Array, dy: jax.Array) -> jax.Array:
        return _sum_scatter(whole_dw(x, dy), tuple(placed).index("fsdp"), execution)

    # check_vma=False: jax does not see that the data and tensor axes have one device, and nothing to sum over.
    specs = {"in_specs": (spec(*x_split), spec(*y_split)), "out_specs": placed, "check_vma": False}
    return dx, jax.shard_map(own_dw, mesh=execution.mesh, **specs)(x, dy).astype(w.dtype)


def _sum_scatter(x: jax.Array, axis: int, execution: Execution) -> jax.Array:
    """`jax.lax.psum_scatter(x, "fsdp", scatter_dimension=axis, tiled=True)`, across the lines first, then in them."""
    lines = np.arange(execution.mesh.shape["fsdp"]).reshape(-1, execution.line)
    for groups in (lines.T.tolist(), lines.tolist()):
        x = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=axis, axis_index_groups=groups, tiled=True)
    return x


project.defvjp(_project_forward, _project_backward)


class Dropout(NamedTuple):
    """Dropout of a low-rank update's input, as PEFT's lora_dropout (arXiv 1207.0580): set each number to 0 with
    probability `rate`, and divide the others by 1 - rate.

    Attributes:
        key: a jax.random key, or an array of them.
        rate: f32, a number for each key. At 0 inputs stay the same, to the bit.
    """

    key: jax.Array
    rate: jax.Array

    def split(self, count: int) -> "Dropout":
        """Return `count` independent ones, along a first axis."""
        return Dropout(jax.random.split(self.key, count), jnp.broadcast_to(self.rate, (count,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        kept = jax.random.uniform(self.key, x.shape) >= self.rate
        return jnp.where(kept, x.astype(jnp.float32) / (1 - self.rate), 0.0).astype(x.dtype)


class Adapted(NamedTuple):
    """A frozen weight and its low-rank update, w + a b (LoRA, arXiv 2106.09685). It takes the weight's place in params.

    Attributes:
        w: [*inputs, *outputs], in any dtype; not differentiated.
        a: f32 [*inputs, R].
        b: f32 [R, *outputs].
        dropout: of the input of a.
    """

    w: jax.Array
    a: jax.Array
    b: jax.Array
    dropout: Dropout | None = None


def low_rank_axes(axes: tuple[str | None, ...], inputs: int) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """Return the logical axes of an `Adapted`'s a and b. One of the two has w's "embed" axis; the other is split along
    its rank instead.

    Args:
        axes: of w, the first `inputs` of them the matmul's inputs.
    """
    first, second = axes[:inputs], axes[inputs:]
    return (*first, None if "embed" in first else "rank"), (None if "embed" in second else "rank", *second)


def project_adapted(
    expression: str,
    x: jax.Array,
    weight: Adapted,
    axes: tuple[str | None, ...],
    execution: Execution,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """`project` with w + a b, as x w + (drop(x) a) b. Neither the sum nor the gradient of w is ever computed."""
    x_axes, w_axes, y_axes = re.split(",|->", expression)
    inputs = weight.a.ndim - 1
    a_axes, b_axes = low_rank_axes(axes, inputs)
    low_axes = "".join(axis for axis in x_axes if axis in y_axes) + "R"
    dropped = x if weight.dropout is None else weight.dropout(x)
    low: Any = project(f"{x_axes},{w_axes[:inputs]}R->{low_axes}", dropped, weight.a, a_axes, execution, x.dtype)
    update: Any = project(f"{low_axes},R{w_axes[inputs:]}->{y_axes}", low, weight.b, b_axes, execution, out_dtype)
    frozen: Any = project(expression, x, jax.lax.stop_gradient(weight.w), axes, execution, out_dtype)
    return frozen + update


# By Hugging Face's names.
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def gated(gate: jax.Array, up: jax.Array, activation: str, execution: Execution) -> jax.Array:
    """activation(gate) * up. Materialize its derivative: the TPU compiler would compute it inside each of the five
    matmuls that read it, which would take half as long again."""
    return _gated(gate, up, activation, execution)


def _gated(gate: jax.Array, up: jax.Array, activation: str, execution: Execution) -> jax.Array:
    # On CPUs compute in f32: XLA would round to bfloat16 after each operation, which takes longer than the operations.
    gate, up = (x.astype(jnp.float32) if execution.on_one_cpu else x for x in (gate, up))
    return (ACTIVATIONS[activation](gate) * up).astype(execution.dtype)


def _gated_backward(activation, execution, residuals, dy):
    gate, up, dy = jax.lax.optimization_barrier((*residuals, dy))
    _, vjp = jax.vjp(lambda gate, up: _gated(gate, up, activation, execution), gate, up)
    return jax.lax.optimization_barrier(vjp(dy))


gated.defvjp(
    lambda gate, up, activation, execution: (_gated(gate, up, activation, execution), (gate, up)), _gated_backward
)
