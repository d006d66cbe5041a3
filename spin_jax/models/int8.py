"""Linear layers of attention and MLP in int8, for sampling: half the bytes of bfloat16 that a decode step reads.

Symmetric, with a scale for each of a matmul's outputs (LLM.int8(), arXiv 2208.07339, without its outlier columns).
Embeddings and the vocabulary projection stay in the compute dtype.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from spin_jax.models.cache import to_int8
from spin_jax.models.compute import Quantised
from spin_jax.models.config import ModelConfig
from spin_jax.models.llama import for_compute, logical_axes, param_shardings
from spin_jax.models.lora import each_weight, replace
from spin_jax.sharding import spec


def quantise(params: dict, dtype: jnp.dtype) -> dict:
    """`for_compute`, with `Quantised` in the place of each weight of attention and MLP."""

    def one(inputs: int, w: jax.Array) -> Quantised:
        return Quantised(*to_int8(w, axis=tuple(range(1, 1 + inputs))))

    return replace(for_compute(params, dtype), each_weight(one, params))


def quantised_shardings(mesh: Mesh, config: ModelConfig) -> dict:
    """The NamedSharding of every array of `quantise`: weights as they were, scales as the outputs they belong to."""

    def one(inputs: int, axes: tuple[str | None, ...], w: NamedSharding) -> Quantised:
        layers, *rest = axes
        return Quantised(w, NamedSharding(mesh, spec(layers, *rest[inputs:])))

    shardings = param_shardings(mesh, config)
    return replace(shardings, each_weight(one, logical_axes(config), shardings))
