"""The tree of params: its shapes, its axes, and how it is made and cast."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from spin_jax.devices.compiler_options import jit
from spin_jax.devices.sharding import tree_shardings
from spin_jax.models.config import ModelConfig
from spin_jax.models.execution import Compute
from spin_jax.models.llama import Llama, split_abstract


def init_params(config: ModelConfig, key: jax.Array, dtype: jnp.dtype = jnp.float32) -> dict:
    """Fresh params: kernels normal(0, 0.02), norm scales 1, biases 0. Jittable, so that they can be born sharded.

    Kernels are input-major (`x @ W`):
        embed.embedding [V, D]
        layers.attention_norm [L, D], layers.mlp_norm [L, D]
        layers.attention.q [L, D, N, H], .k and .v [L, D, K, H], .o [L, N, H, D]
        layers.attention.q_bias [L, N, H], .k_bias and .v_bias [L, K, H], where config.qkv_bias
        layers.attention.q_norm and .k_norm [L, H], where config.qk_norm
        layers.mlp.gate and .up [L, D, F], .down [L, F, D]
        final_norm [D]
        lm_head [D, V], unless config.tie_embeddings
    """
    return nnx.to_pure_dict(nnx.state(Llama(config, rngs=nnx.Rngs(key), dtype=dtype)))


def for_compute(params: dict, dtype: jnp.dtype) -> dict:
    """A copy of params with what `forward` casts to `dtype` cast already: it computes the same from half the bytes.

    Norm scales stay as they are, because `forward` reads them in f32.
    """

    def cast(path: tuple, x: jax.Array) -> jax.Array:
        return x if "norm" in path[-1].key else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def split_layers(params: dict) -> dict:
    """params with a tuple of each layer's own arrays in the place of the axis L: see `init_cache(by_layer=True)`."""
    layers = params["layers"]
    count = len(jax.tree.leaves(layers)[0])
    return params | {"layers": tuple(jax.tree.map(lambda x: x[layer], layers) for layer in range(count))}  # noqa: B023


@functools.cache
def abstract_params(config: ModelConfig, dtype: jnp.dtype = jnp.float32) -> dict:
    """The tree of `init_params` as jax.ShapeDtypeStruct: no memory, no compute."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), nnx.to_pure_dict(split_abstract(config)[1]))


@functools.cache
def logical_axes(config: ModelConfig) -> dict:
    """The tree of `init_params` with a tuple for each param that names its axes.

    The names: "layers", "vocab", "embed", "mlp", "heads", "kv_heads", "head_dim"; None for the axis of a norm's scale.
    """
    state = split_abstract(config)[1]
    axes = nnx.to_pure_dict(nnx.map_state(lambda path, param: param.get_metadata("logical_axes"), state))
    # A DecoderLayer names the axes of one layer; stacking put one more in front.
    is_names = lambda x: isinstance(x, tuple)  # noqa: E731
    return axes | {"layers": jax.tree.map(lambda names: ("layers", *names), axes["layers"], is_leaf=is_names)}


def param_shardings(mesh: Mesh, config: ModelConfig) -> dict:
    """The NamedSharding of every param on a mesh of `spin_jax.devices.sharding`, as a tree like the params.

    Raises:
        UserError: a mesh axis does not divide the model's axis it splits.
    """
    return tree_shardings(mesh, abstract_params(config), logical_axes(config))


@functools.cache
def make_resharding(model: ModelConfig, compute: Compute) -> Callable:
    """params -> a copy in the compute dtype, laid out for `compute.mesh`."""
    copy = functools.partial(for_compute, dtype=compute.dtype)
    return jit(compute.mesh, copy, out_shardings=param_shardings(compute.mesh, model))
