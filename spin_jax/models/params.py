"""The tree of params, as the table of weights has it: its shapes, its axes, and how it is made and cast."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from spin_jax.devices.compiler_options import jit
from spin_jax.devices.sharding import tree_shardings
from spin_jax.models.config import ModelConfig
from spin_jax.models.execution import Execution
from spin_jax.models.llama import Llama
from spin_jax.models.weights import stacked_weights, weights


def init_params(config: ModelConfig, key: jax.Array, dtype: jnp.dtype = jnp.float32) -> dict:
    """Fresh params, as `weights(config)` says. Jittable, so that they can be born sharded."""
    return nnx.to_pure_dict(nnx.state(Llama(config, Execution(), weights(config), rngs=nnx.Rngs(key), dtype=dtype)))


def cast_params(config: ModelConfig, params: dict, dtype: jnp.dtype) -> dict:
    """A copy of params with what `forward` casts to `dtype` cast already: it computes the same from half the bytes.

    Norm scales stay as they are, because `forward` reads them in f32.
    """
    return jax.tree.map(lambda weight, x: x if weight.float32 else x.astype(dtype), weights(config), params)


def split_layers(params: dict) -> dict:
    """params with a tuple of each layer's own arrays in the place of the axis L: see `init_cache(by_layer=True)`."""
    layers = params["layers"]
    count = len(jax.tree.leaves(layers)[0])
    return params | {"layers": tuple(jax.tree.map(lambda x: x[layer], layers) for layer in range(count))}  # noqa: B023


@functools.cache
def abstract_params(config: ModelConfig, dtype: jnp.dtype = jnp.float32) -> dict:
    """The tree of `init_params` as jax.ShapeDtypeStruct: no memory, no compute."""
    return jax.tree.map(lambda weight: jax.ShapeDtypeStruct(weight.shape, dtype), stacked_weights(config))


@functools.cache
def logical_axes(config: ModelConfig) -> dict:
    """The tree of `init_params` with a tuple for each param that names its axes; None for that of a norm's scale."""
    return jax.tree.map(lambda weight: weight.logical_axes, stacked_weights(config))


def param_shardings(mesh: Mesh, config: ModelConfig) -> dict:
    """The NamedSharding of every param on a mesh of `spin_jax.devices.sharding`, as a tree like the params.

    Raises:
        UserError: a mesh axis does not divide the model's axis it splits.
    """
    return tree_shardings(mesh, abstract_params(config), logical_axes(config))


@functools.cache
def make_resharding(model: ModelConfig, execution: Execution) -> Callable:
    """params -> a copy in the compute dtype, laid out for `execution.mesh`."""
    copy = functools.partial(cast_params, model, dtype=execution.dtype)
    return jit(execution.mesh, copy, out_shardings=param_shardings(execution.mesh, model))
