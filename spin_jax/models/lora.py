"""Low-rank updates of a frozen model's linear layers (LoRA, arXiv 2106.09685), as a tree of their own.

The tree follows the params', with {"a": f32 [L, *inputs, R], "b": f32 [L, R, *outputs]} in the place of each weight of
attention and MLP, and nothing for embeddings, norms and biases. The updated weight is w + scale a b.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spin_jax.devices.sharding import fitting
from spin_jax.models.config import ModelConfig
from spin_jax.models.params import abstract_params, logical_axes
from spin_jax.models.projections import Adapted, low_rank_axes

# What is updated, by block, with how many of a layer's leading axes are the matmul's inputs.
INPUTS = {"attention": {"q": 1, "k": 1, "v": 1, "o": 2}, "mlp": {"gate": 1, "up": 1, "down": 1}}


def init_adapters(config: ModelConfig, rank: int, key: jax.Array) -> dict:
    """Fresh updates: b zero, so that they change nothing yet; a uniform in +-1 / sqrt(inputs), as Hugging Face's PEFT
    draws it (kaiming_uniform_ with a = sqrt(5), src/peft/tuners/lora/layer.py). Jittable, to be born sharded."""

    def draw(key: jax.Array, a: jax.ShapeDtypeStruct) -> jax.Array:
        bound = 1 / math.sqrt(math.prod(a.shape[1:-1]))
        return jax.random.uniform(key, a.shape, a.dtype, -bound, bound)

    keys = iter(jax.random.split(key, len(jax.tree.leaves(INPUTS))))
    return each_weight(
        lambda _, pair: {"a": draw(next(keys), pair["a"]), "b": jnp.zeros(pair["b"].shape, pair["b"].dtype)},
        abstract_adapters(config, rank),
    )


def attach(params: dict, adapters: dict, scale: float) -> dict:
    """Params for `forward` that compute with the updated weights, both held as they are; gradients reach the adapters
    alone."""
    return replace(params, each_weight(lambda _, w, pair: Adapted(w, pair["a"], scale * pair["b"]), params, adapters))


def merge(params: dict, adapters: dict, scale: float) -> dict:
    """Plain params that hold the updated weights; f32 throughout, also where matmuls are of bfloat16 by default."""

    def add(inputs: int, w: jax.Array, pair: dict) -> jax.Array:
        contracted, stacked = ((inputs + 1,), (1,)), ((0,), (0,))
        return w + scale * jax.lax.dot_general(pair["a"], pair["b"], (contracted, stacked), precision="highest")

    return replace(params, each_weight(add, params, adapters))


def num_adapter_params(config: ModelConfig, rank: int) -> int:
    """How many numbers the low-rank updates have."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_adapters(config, rank)))


def abstract_adapters(config: ModelConfig, rank: int) -> dict:
    """The tree of `init_adapters` as jax.ShapeDtypeStruct: no memory, no compute."""

    def shapes(inputs: int, w: jax.ShapeDtypeStruct) -> dict:
        layers, first, second = w.shape[0], w.shape[1 : 1 + inputs], w.shape[1 + inputs :]
        a, b = (layers, *first, rank), (layers, rank, *second)
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in (("a", a), ("b", b))}

    return each_weight(shapes, abstract_params(config))


def adapter_shardings(mesh: Mesh, config: ModelConfig, rank: int) -> dict:
    """The NamedSharding of every array of `init_adapters`: split over fsdp by the axis that the weight is split by, or
    else by the rank, where that divides; a rank that does not is a small one."""

    def place(inputs: int, axes: tuple[str | None, ...], pair: dict) -> dict:
        layers, *rest = axes
        a, b = low_rank_axes(tuple(rest), inputs)
        return {name: fitting(mesh, pair[name].shape, (layers, *of)) for name, of in (("a", a), ("b", b))}

    return each_weight(place, logical_axes(config), abstract_adapters(config, rank))


def each_weight(function: Callable, *trees: dict) -> dict:
    """A tree of what is updated, of the values function(inputs, *the entries of `trees`)."""
    layers = [tree["layers"] for tree in trees]
    blocks = {
        block: {name: function(inputs, *(each[block][name] for each in layers)) for name, inputs in weights.items()}
        for block, weights in INPUTS.items()
    }
    return {"layers": blocks}


def replace(params: dict, updated: dict) -> dict:
    """`params` with what is updated in the place of what was there."""
    blocks = {block: params["layers"][block] | weights for block, weights in updated["layers"].items()}
    return params | {"layers": params["layers"] | blocks}
