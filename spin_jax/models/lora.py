"""Low-rank updates of a frozen model's linear layers (LoRA, arXiv 2106.09685), as a tree of their own.

The tree has {"a": f32 [L, *inputs, R], "b": f32 [L, R, *outputs]} at the place of each linear layer's weight that
`config.lora.target_modules` names, and nothing for embeddings, norms and biases. An updated weight is w + scale a b.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.sharding import Mesh

from spin_jax.config import LoraConfig
from spin_jax.devices.sharding import fitting
from spin_jax.models.config import ModelConfig
from spin_jax.models.projections import Adapted, Dropout, low_rank_axes
from spin_jax.models.weights import Weight, stacked_weights, weights


@functools.cache
def adapter_weights(config: ModelConfig, lora: LoraConfig) -> dict:
    """The table of weights of the updates. Names are those of Hugging Face's PEFT, without its prefix."""

    def pair(weight: Weight) -> dict[str, Weight]:
        inputs, stem = weight.inputs or 0, weight.name.removesuffix("weight")
        (*_, a_rank), (b_rank, *_) = low_rank_axes(weight.logical_axes, inputs)
        a_axes = (*weight.axes[:inputs], (a_rank, lora.rank))
        b_axes = ((b_rank, lora.rank), *weight.axes[inputs:])
        a = Weight(f"{stem}lora_A.weight", a_axes, _uniform, inputs)
        return {"a": a, "b": Weight(f"{stem}lora_B.weight", b_axes, initializers.zeros, inputs=1)}

    def updated(weight: Weight) -> bool:
        return bool(weight.inputs) and weight.module in lora.target_modules

    layer = {block: entries for block, entries in weights(config)["layers"].items() if isinstance(entries, dict)}
    pairs = {
        block: {name: pair(weight) for name, weight in entries.items() if updated(weight)}
        for block, entries in layer.items()
    }
    return {"layers": {block: entries for block, entries in pairs.items() if entries}}


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Draw [L, *inputs, R] from +-1 / sqrt(inputs), as PEFT does (kaiming_uniform_ with a = sqrt(5) in
    src/peft/tuners/lora/layer.py)."""
    bound = 1 / math.sqrt(math.prod(shape[1:-1]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def init_adapters(config: ModelConfig, lora: LoraConfig, key: jax.Array) -> dict:
    """Make fresh updates, whose b is 0, so that they change nothing yet. Jittable, so that they can be born sharded."""
    layer = adapter_weights(config, lora)["layers"]
    keys = iter(jax.random.split(key, sum(map(len, layer.values()))))

    def draw(pair: dict[str, Weight]) -> dict:
        key = next(keys)
        return {name: one.init(key, (config.num_layers, *one.shape), jnp.float32) for name, one in pair.items()}

    # In the table's order, which jax.tree.map would not keep.
    return {"layers": {block: {name: draw(pair) for name, pair in pairs.items()} for block, pairs in layer.items()}}


def attach(params: dict, adapters: dict, scale: float, dropout: Dropout | None = None) -> dict:
    """Return params for `forward` that compute with the updated weights, without adding them up.

    Gradients reach the adapters alone.

    Args:
        dropout: split over weights and layers, each of which drops other numbers.
    """
    if dropout is not None:
        pairs, treedef = jax.tree.flatten(adapters, is_leaf=lambda entry: "a" in entry)
        own = (Dropout(jax.random.fold_in(dropout.key, i), dropout.rate) for i in range(len(pairs)))
        adapters = treedef.unflatten(
            pair | {"dropout": each.split(len(pair["a"]))} for pair, each in zip(pairs, own, strict=True)
        )
    return _replace(params, adapters, lambda w, a, b, dropout=None: Adapted(w, a, scale * b, dropout))


def merge(params: dict, adapters: dict, scale: float) -> dict:
    """Return plain params with the updates added. The matmuls are f32, also where bfloat16 is a device's default."""

    def add(w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        contracted, stacked = ((a.ndim - 1,), (1,)), ((0,), (0,))
        return w + scale * jax.lax.dot_general(a, b, (contracted, stacked), precision="highest")

    return _replace(params, adapters, add)


def num_adapter_params(config: ModelConfig, lora: LoraConfig) -> int:
    """How many numbers the low-rank updates have."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_adapters(config, lora)))


def abstract_adapters(config: ModelConfig, lora: LoraConfig) -> dict:
    """The tree of `init_adapters` as jax.ShapeDtypeStruct: no memory, no compute."""
    table = stacked_weights(config, adapter_weights(config, lora))
    return jax.tree.map(lambda weight: jax.ShapeDtypeStruct(weight.shape, jnp.float32), table)


def adapter_shardings(mesh: Mesh, config: ModelConfig, lora: LoraConfig) -> dict:
    """Return the NamedSharding of every array of `init_adapters`.

    Each is split over fsdp along the axis along which its weight is split, or else along the rank. A rank that the
    devices do not divide is small, and stays whole.
    """
    table = stacked_weights(config, adapter_weights(config, lora))
    return jax.tree.map(lambda weight: fitting(mesh, weight.shape, weight.logical_axes), table)


def _replace(params: dict, adapters: dict, function: Callable) -> dict:
    """`params` with function(w, a=..., b=...) in the place of each weight w that has an update."""
    layers = dict(params["layers"])
    for block, pairs in adapters["layers"].items():
        layers[block] = layers[block] | {name: function(layers[block][name], **ab) for name, ab in pairs.items()}
    return params | {"layers": layers}
