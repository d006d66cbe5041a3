"""The table of weights: all that is known of each weight, in one place.

All code that makes, casts, splits, updates, reads or writes weights follows this table. A model family says here which
weights its layers have, and in `llama.py` what they compute.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.nn import initializers

from spin_jax.models.config import ModelConfig

Axis = tuple[str | None, int]


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight of the model, or one that each layer has.

    Attributes:
        name: in Hugging Face checkpoints; for a layer's weight, without "model.layers.N.".
        axes: (logical name, size) of each axis. Names are those of `devices.sharding.RULES`.
        init: (key, shape, dtype) -> its first value.
        inputs: how many of the leading axes are a matmul's inputs; the others are its outputs. Checkpoints store
            [outputs, inputs], each flattened to one axis, as torch.nn.Linear does. 0 is a bias, stored flat. None is no
            matmul, stored in this shape.
        float32: whether the model reads it in float32, whatever the compute dtype; it is then never cast.
    """

    name: str
    axes: tuple[Axis, ...]
    init: Callable[..., jax.Array]
    inputs: int | None = None
    float32: bool = False

    @property
    def module(self) -> str:
        """Hugging Face's name of the module that has the weight, such as "q_proj"."""
        return self.name.split(".")[-2]

    @property
    def logical_axes(self) -> tuple[str | None, ...]:
        return tuple(name for name, _ in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size for _, size in self.axes)


@functools.cache
def weights(config: ModelConfig) -> dict:
    """Return a model's table of weights, a tree like its params. A weight in "layers" stands for all layers.

    Do not change the order: weights are drawn in it, so what a seed gives depends on it.
    """
    D, F, V = ("embed", config.hidden_size), ("mlp", config.intermediate_size), ("vocab", config.vocab_size)
    N, K, H = ("heads", config.num_heads), ("kv_heads", config.num_kv_heads), ("head_dim", config.head_dim)
    scale = (None, config.hidden_size)
    norm = functools.partial(_norm, offset=config.norm_offset)
    attention = {
        "q": _linear("self_attn.q_proj", D, N, H),
        "k": _linear("self_attn.k_proj", D, K, H),
        "v": _linear("self_attn.v_proj", D, K, H),
        "o": _linear("self_attn.o_proj", N, H, D, inputs=2),
    }
    if config.qkv_bias:
        attention["q_bias"] = _bias("self_attn.q_proj", N, H)
        attention["k_bias"] = _bias("self_attn.k_proj", K, H)
        attention["v_bias"] = _bias("self_attn.v_proj", K, H)
    if config.qk_norm:
        attention["q_norm"] = norm("self_attn.q_norm", H)
        attention["k_norm"] = norm("self_attn.k_norm", H)
    layer = {
        "attention_norm": norm("input_layernorm", scale),
        "attention": attention,
        "mlp_norm": norm("pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm", scale),
        "mlp": {
            "gate": _linear("mlp.gate_proj", D, F),
            "up": _linear("mlp.up_proj", D, F),
            "down": _linear("mlp.down_proj", F, D),
        },
    }
    if config.post_norms:
        layer["attention_post_norm"] = norm("post_attention_layernorm", scale)
        layer["mlp_post_norm"] = norm("post_feedforward_layernorm", scale)
    embedding = Weight("model.embed_tokens.weight", (V, D), initializers.normal(0.02))
    table = {"embed": {"embedding": embedding}, "layers": layer, "final_norm": norm("model.norm", scale)}
    return table if config.tie_embeddings else table | {"lm_head": _linear("lm_head", D, V)}


def stacked_weights(config: ModelConfig, table: dict | None = None) -> dict:
    """Return the table, or another one of the model, with an axis of layers in front of each weight in "layers"."""
    layers = ("layers", config.num_layers)

    def stack(weight: Weight) -> Weight:
        return dataclasses.replace(weight, axes=(layers, *weight.axes))

    table = weights(config) if table is None else table
    return table | {"layers": jax.tree.map(stack, table["layers"])}


def _linear(name: str, *axes: Axis, inputs: int = 1) -> Weight:
    return Weight(f"{name}.weight", axes, initializers.normal(0.02), inputs)


def _bias(name: str, *axes: Axis) -> Weight:
    return Weight(f"{name}.bias", axes, initializers.zeros, inputs=0)


def _norm(name: str, *axes: Axis, offset: float) -> Weight:
    """The scale of an RMS norm, which multiplies by offset + scale; 1 at first."""
    return Weight(f"{name}.weight", axes, initializers.constant(1 - offset), float32=True)
