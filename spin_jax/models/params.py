"""Make, cast and describe the tree of params, as the table of weights says."""

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
    """Draw fresh params, as `weights(config)` says. Jittable, so that they can be born sharded."""
    return nnx.to_pure_dict(nnx.state(Llama(config, Execution(), weights(config), rngs=nnx.Rngs(key), dtype=dtype)))


def cast_params(config: ModelConfig, params: dict, dtype: jnp.dtype) -> dict:
    """Return a copy of params, cast to `dtype` beforehand: `forward` computes the same from half the bytes.

    Norm scales are not cast, because `forward` reads them in f32.
    """
    return jax.tree.map(lambda weight, x: x if weight.float32 else x.astype(dtype), weights(config), params)


def split_layers(params: dict) -> dict:
    """Replace the axis L of params by a tuple of each layer's own arrays, for `init_cache(by_layer=True)`."""
    layers = params["layers"]
    count = len(jax.tree.leaves(layers)[0])
    return params | {"layers": tuple(jax.tree.map(lambda x: x[layer], layers) for layer in range(count))}  # noqa: B023


@functools.cache
def abstract_params(config: ModelConfig, dtype: jnp.dtype = jnp.float32) -> dict:
    """Return the tree of `init_params` as jax.ShapeDtypeStruct, without computing it."""
    return jax.tree.map(lambda weight: jax.ShapeDtypeStruct(weight.shape, dtype), stacked_weights(config))


@functools.cache
def logical_axes(config: ModelConfig) -> dict:
    """Return the tree of `init_params` with each param's logical axes; None is an axis that is not split."""
    return jax.tree.map(lambda weight: weight.logical_axes, stacked_weights(config))


def param_shardings(mesh: Mesh, config: ModelConfig) -> dict:
    """The NamedSharding of every param on a mesh of `spin_jax.devices.sharding`, as a tree like the params.

    Raises:
        UserError: a mesh axis does not divide the model's axis it splits.
    """
    return tree_shardings(mesh, abstract_params(config), logical_axes(config))


@functools.cache
def make_resharding(model: ModelConfig, execution: Execution) -> Callable:
    """Return a jitted function: params -> a copy in the compute dtype, split over `execution.mesh`."""
    copy = functools.partial(cast_params, model, dtype=execution.dtype)
    return jit(execution.mesh, copy, out_shardings=param_shardings(execution.mesh, model))
