"""Low-rank updates of a frozen model's linear layers (LoRA, arXiv 2106.09685), as a tree of their own.

The tree follows the params', with {"a": f32 [L, *inputs, R], "b": f32 [L, R, *outputs]} in the place of each weight of
a layer that is a matmul's, and nothing for embeddings, norms and biases. The updated weight is w + scale a b.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spin_jax.devices.sharding import fitting
from spin_jax.models.config import ModelConfig
from spin_jax.models.projections import Adapted, low_rank_axes
from spin_jax.models.weights import Weight, weights


def init_adapters(config: ModelConfig, rank: int, key: jax.Array) -> dict:
    """Fresh updates: b zero, so that they change nothing yet; a uniform in +-1 / sqrt(inputs), as Hugging Face's PEFT
    draws it (kaiming_uniform_ with a = sqrt(5), src/peft/tuners/lora/layer.py). Jittable, to be born sharded."""
    keys = iter(jax.random.split(key, len(jax.tree.leaves(_each_weight(config, lambda _: 0)))))

    def draw(weight: Weight) -> dict:
        a, b = _pair(config, weight, rank).values()
        bound = 1 / math.sqrt(math.prod(a.shape[1:-1]))
        return {"a": jax.random.uniform(next(keys), a.shape, a.dtype, -bound, bound), "b": jnp.zeros(b.shape, b.dtype)}

    return _each_weight(config, draw)


def attach(params: dict, adapters: dict, scale: float) -> dict:
    """Params for `forward` that compute with the updated weights, both held as they are; gradients reach the adapters
    alone."""
    return _replace(params, adapters, lambda w, a, b: Adapted(w, a, scale * b))


def merge(params: dict, adapters: dict, scale: float) -> dict:
    """Plain params that hold the updated weights; f32 throughout, also where matmuls are of bfloat16 by default."""

    def add(w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        contracted, stacked = ((a.ndim - 1,), (1,)), ((0,), (0,))
        return w + scale * jax.lax.dot_general(a, b, (contracted, stacked), precision="highest")

    return _replace(params, adapters, add)


def num_adapter_params(config: ModelConfig, rank: int) -> int:
    """How many numbers the low-rank updates have."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_adapters(config, rank)))


def abstract_adapters(config: ModelConfig, rank: int) -> dict:
    """The tree of `init_adapters` as jax.ShapeDtypeStruct: no memory, no compute."""
    return _each_weight(config, lambda weight: _pair(config, weight, rank))


def adapter_shardings(mesh: Mesh, config: ModelConfig, rank: int) -> dict:
    """The NamedSharding of every array of `init_adapters`: split over fsdp by the axis that the weight is split by, or
    else by the rank, where that divides; a rank that does not is a small one."""

    def place(weight: Weight) -> dict:
        axes = low_rank_axes(weight.logical_axes, weight.inputs or 0)
        pair = _pair(config, weight, rank)
        return {name: fitting(mesh, pair[name].shape, ("layers", *of)) for name, of in zip(pair, axes, strict=True)}

    return _each_weight(config, place)


def _pair(config: ModelConfig, weight: Weight, rank: int) -> dict[str, jax.ShapeDtypeStruct]:
    a, b = (*weight.shape[: weight.inputs], rank), (rank, *weight.shape[weight.inputs :])
    return {name: jax.ShapeDtypeStruct((config.num_layers, *x), jnp.float32) for name, x in (("a", a), ("b", b))}


def _each_weight(config: ModelConfig, function: Callable) -> dict:
    """A tree of function(weight) for what is updated, in the table's order."""
    layer = weights(config)["layers"]
    blocks = {name: entries for name, entries in layer.items() if isinstance(entries, dict)}
    return {
        "layers": {
            block: {name: function(weight) for name, weight in entries.items() if weight.inputs}
            for block, entries in blocks.items()
        }
    }


def _replace(params: dict, adapters: dict, function: Callable) -> dict:
    """`params` with function(w, a, b) in the place of each weight w that has an update."""
    layers = dict(params["layers"])
    for block, pairs in adapters["layers"].items():
        layers[block] = layers[block] | {name: function(layers[block][name], **ab) for name, ab in pairs.items()}
    return params | {"layers": layers}
