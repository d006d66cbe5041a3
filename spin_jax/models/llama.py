"""Llama and its kin (Mistral, Qwen2, Qwen3): Flax NNX modules behind pure functions on one nested dict of arrays.

Modules live inside a call only: `forward` merges them with the params it is given and returns arrays. Everybody else
sees params as data, so that policy, opponent, gradients and optimizer moments are all the same kind of tree.

Axes: B batch, T tokens, S key slots, D hidden, F mlp, V vocab, N query heads, K kv heads, G = N // K, H head_dim,
L layers.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spin_jax.models.config import Llama3RopeScaling, ModelConfig

# What the backward pass finds in memory; the rest of a layer is computed again.
REMAT_POLICIES: dict[str, Callable | None] = {
    # Every intermediate of every layer: most memory, no second forward pass.
    "none": None,
    # Only each layer's input [B, T, D]: least memory, a second forward pass.
    "full": jax.checkpoint_policies.nothing_saveable,
    # The outputs of the weight matmuls, but not the attention scores [B, N, T, S]: recomputes what is cheap in FLOPs.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

_normal = nnx.initializers.normal(0.02)
_zeros = nnx.initializers.zeros_init()
_ones = nnx.initializers.ones_init()


def _param(rngs: nnx.Rngs, dtype: jnp.dtype, init: Callable, *axes: tuple[str | None, int]) -> nnx.Param:
    """A param whose axes are (logical name, size) pairs. The metadata key is our own, so flax reads no mesh into it."""
    names, shape = zip(*axes, strict=True)
    return nnx.Param(init(rngs.params(), shape, dtype), logical_axes=names)


class Embedding(nnx.Module):
    """Token ids to vectors; the transpose of the unembedding where the two are tied."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.embedding = _param(rngs, dtype, _normal, ("vocab", config.vocab_size), ("embed", config.hidden_size))

    def __call__(self, tokens_BT: jax.Array, compute_dtype: jnp.dtype) -> jax.Array:
        return self.embedding[...][tokens_BT].astype(compute_dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions.

    Called with `rope`, the (cos, sin) of `rope_tables`, and `write_at`, the (layer, positions_BT) to write `cache` at.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.config = config
        param = functools.partial(_param, rngs, dtype)
        embed, head_dim = ("embed", config.hidden_size), ("head_dim", config.head_dim)
        heads, kv_heads = ("heads", config.num_heads), ("kv_heads", config.num_kv_heads)
        self.q = param(_normal, embed, heads, head_dim)
        self.k = param(_normal, embed, kv_heads, head_dim)
        self.v = param(_normal, embed, kv_heads, head_dim)
        self.o = param(_normal, heads, head_dim, embed)
        if config.qkv_bias:
            self.q_bias = param(_zeros, heads, head_dim)
            self.k_bias = param(_zeros, kv_heads, head_dim)
            self.v_bias = param(_zeros, kv_heads, head_dim)
        if config.qk_norm:
            self.q_norm = param(_ones, head_dim)
            self.k_norm = param(_ones, head_dim)

    def __call__(
        self, x_BTD: jax.Array, rope: tuple, mask_BTS: jax.Array, cache: dict | None, write_at: tuple
    ) -> tuple[jax.Array, dict | None]:
        dtype, config = x_BTD.dtype, self.config
        q_BTNH = jnp.einsum("BTD,DNH->BTNH", x_BTD, self.q[...].astype(dtype))
        k_BTKH = jnp.einsum("BTD,DKH->BTKH", x_BTD, self.k[...].astype(dtype))
        v_BTKH = jnp.einsum("BTD,DKH->BTKH", x_BTD, self.v[...].astype(dtype))
        if config.qkv_bias:
            q_BTNH += self.q_bias[...].astype(dtype)[None, None]
            k_BTKH += self.k_bias[...].astype(dtype)[None, None]
            v_BTKH += self.v_bias[...].astype(dtype)[None, None]
        if config.qk_norm:
            q_BTNH = rms_norm(q_BTNH, self.q_norm[...], config.rms_norm_eps)
            k_BTKH = rms_norm(k_BTKH, self.k_norm[...], config.rms_norm_eps)
        q_BTNH, k_BTKH = apply_rope(q_BTNH, *rope), apply_rope(k_BTKH, *rope)
        k_BSKH, v_BSKH = k_BTKH, v_BTKH
        if cache is not None:
            cache = {"k": _write(cache["k"], k_BTKH, *write_at), "v": _write(cache["v"], v_BTKH, *write_at)}
            k_BSKH = jax.lax.dynamic_index_in_dim(cache["k"], write_at[0], keepdims=False).astype(dtype)
            v_BSKH = jax.lax.dynamic_index_in_dim(cache["v"], write_at[0], keepdims=False).astype(dtype)
        attended_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS)
        return jnp.einsum("BTNH,NHD->BTD", attended_BTNH, self.o[...].astype(dtype)), cache


class MLP(nnx.Module):
    """SwiGLU: down(silu(x gate) * (x up))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        param = functools.partial(_param, rngs, dtype)
        embed, mlp = ("embed", config.hidden_size), ("mlp", config.intermediate_size)
        self.gate = param(_normal, embed, mlp)
        self.up = param(_normal, embed, mlp)
        self.down = param(_normal, mlp, embed)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, self.gate[...].astype(x_BTD.dtype))
        up_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, self.up[...].astype(x_BTD.dtype))
        return jnp.einsum("BTF,FD->BTD", jax.nn.silu(gate_BTF) * up_BTF, self.down[...].astype(x_BTD.dtype))


class DecoderLayer(nnx.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.eps = config.rms_norm_eps
        self.attention_norm = _param(rngs, dtype, _ones, (None, config.hidden_size))
        self.attention = Attention(config, rngs=rngs, dtype=dtype)
        self.mlp_norm = _param(rngs, dtype, _ones, (None, config.hidden_size))
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)

    def __call__(
        self, x_BTD: jax.Array, rope: tuple, mask_BTS: jax.Array, cache: dict | None, write_at: tuple
    ) -> tuple[jax.Array, dict | None]:
        with jax.named_scope("attention"):
            normed_BTD = rms_norm(x_BTD, self.attention_norm[...], self.eps)
            attended_BTD, cache = self.attention(normed_BTD, rope, mask_BTS, cache, write_at)
            x_BTD += attended_BTD
        with jax.named_scope("mlp"):
            x_BTD += self.mlp(rms_norm(x_BTD, self.mlp_norm[...], self.eps))
        return x_BTD, cache


class Llama(nnx.Module):
    """Token ids to final-normed hidden states. `layers` is one DecoderLayer whose params have a leading axis L."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.config = config
        self.embed = Embedding(config, rngs=rngs, dtype=dtype)
        make_layers = nnx.vmap(lambda key: DecoderLayer(config, rngs=nnx.Rngs(key), dtype=dtype))
        self.layers = make_layers(jax.random.split(rngs.params(), config.num_layers))
        self.final_norm = _param(rngs, dtype, _ones, (None, config.hidden_size))
        if not config.tie_embeddings:
            self.lm_head = _param(rngs, dtype, _normal, ("embed", config.hidden_size), ("vocab", config.vocab_size))

    def __call__(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, cache: dict | None, compute_dtype: jnp.dtype, remat: str
    ) -> tuple[jax.Array, dict | None]:
        config = self.config
        rope = rope_tables(config, positions_BT)
        keys_BS = positions_BT if cache is None else jnp.arange(cache["k"].shape[2], dtype=jnp.int32)[None]
        mask_BTS = attention_mask(positions_BT, keys_BS, config.sliding_window)
        layer_def, stacked_layers = nnx.split(self.layers)

        def apply_layer(carry: tuple, indexed_layer: tuple) -> tuple[tuple, None]:
            x_BTD, cache = carry
            index, layer = indexed_layer
            return nnx.merge(layer_def, layer)(x_BTD, rope, mask_BTS, cache, (index, positions_BT)), None

        if remat != "none":
            # Inside a scan there is nothing to eliminate a recomputation against, so no barrier is needed.
            apply_layer = jax.checkpoint(apply_layer, policy=REMAT_POLICIES[remat], prevent_cse=False)
        with jax.named_scope("embed"):
            x_BTD = self.embed(tokens_BT, compute_dtype)
        # The cache is carried, not scanned over: a scan would stack each layer's slice into a new copy of the whole.
        indices_L = jnp.arange(config.num_layers, dtype=jnp.int32)
        (x_BTD, cache), _ = jax.lax.scan(apply_layer, (x_BTD, cache), (indices_L, stacked_layers))
        with jax.named_scope("final_norm"):
            return rms_norm(x_BTD, self.final_norm[...], config.rms_norm_eps), cache


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in f32, given back in x's dtype (arXiv 1910.07467)."""
    x_f32 = x.astype(jnp.float32)
    normed = x_f32 * jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + eps)
    return (normed * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)).astype(x.dtype)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each of the H/2 rotations, f32: theta^(-2i/H), scaled as config.py's classes say."""
    # In f32, as transformers computes them: thousands of positions on, a rounding of a frequency is a visible angle.
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1.0) / np.float32(config.rope_theta) ** exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if not isinstance(scaling, Llama3RopeScaling):
        return frequencies / np.float32(scaling.factor)
    # The turns that a frequency makes within the original context, placed between the two factors: 0 long, 1 short.
    turns = scaling.original_max_position_embeddings * frequencies / np.float32(2 * math.pi)
    short = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    return ((1 - short) * frequencies / np.float32(scaling.factor) + short * frequencies).astype(np.float32)


def rope_tables(config: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) of every rotation's angle, each f32 [B, T, 1, H/2]."""
    angles = positions_BT[..., None, None].astype(jnp.float32) * rope_frequencies(config)[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (x_i, x_{i + H/2}), Hugging Face's pairing, in f32 (arXiv 2104.09864)."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)


def attention_mask(queries_BT: jax.Array, keys_BS: jax.Array, sliding_window: int | None) -> jax.Array:
    """True where a query's position may see a key's, bool [B, T, S]: not ahead, nor further back than the window."""
    distance_BTS = queries_BT[:, :, None] - keys_BS[:, None, :]
    mask_BTS = distance_BTS >= 0
    return mask_BTS if sliding_window is None else mask_BTS & (distance_BTS < sliding_window)


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """softmax(q k / sqrt(H)) v, [B, T, N, H]. Each of the K key heads serves G query heads without being repeated."""
    batch, length, heads, head_dim = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(batch, length, k_BSKH.shape[2], -1, head_dim)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores_BKGTS = scores_BKGTS * head_dim**-0.5
    # A finite minimum: a query that sees nothing (beyond its cache) gives numbers nobody reads, not NaNs that spread.
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH).reshape(batch, length, heads, head_dim)


def _write(cache_LBSKH: jax.Array, new_BTKH: jax.Array, layer: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """cache[layer, b, positions[b, t]] = new[b, t], in place where the cache is donated or carried by a loop.

    A position beyond the last slot is dropped.
    """
    batch, length = new_BTKH.shape[:2]
    positions_BT = jnp.broadcast_to(positions_BT, (batch, length))
    indices_BT2 = jnp.stack([jnp.broadcast_to(layer, (batch, length)), positions_BT], axis=-1)
    # Said with a batching dimension, which `.at[layer, rows, positions].set` cannot: the partitioner then knows that a
    # device's rows go to that device's part of the cache, and gathers nothing.
    dimensions = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(2, 3),
        inserted_window_dims=(0, 2),
        scatter_dims_to_operand_dims=(0, 2),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    return jax.lax.scatter(cache_LBSKH, indices_BT2, new_BTKH.astype(cache_LBSKH.dtype), dimensions, mode="drop")


def forward(
    config: ModelConfig,
    params: dict,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    cache: dict | None = None,
    *,
    compute_dtype: jnp.dtype = jnp.float32,
    remat: str = "none",
) -> tuple[jax.Array, dict | None]:
    """Runs the decoder up to and including its final norm; `unembed` turns the result into logits.

    Args:
        params: nested dict as `init_params` returns it. Matmuls run in `compute_dtype`, each layer cast as it is
            reached; norms, rotations and softmax run in f32 whatever the dtypes.
        tokens_BT: int32. Rows are padded on the right, where causality keeps the padding from the tokens.
        positions_BT: int32, the place of each token in its row; 0, 1, ... if None.
        cache: keys and values of earlier calls, from `init_cache`. A token's slot is its position: its key and value
            are written there, and it sees the slots up to its own. What lies in later slots does not matter.
        remat: a key of REMAT_POLICIES.

    Returns:
        Hidden states [B, T, D] in `compute_dtype`, and the cache with this call's keys and values (None if none came).
    """
    if positions_BT is None:
        positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
    model = nnx.merge(_split_abstract(config)[0], params)
    return model(tokens_BT, positions_BT, cache, compute_dtype, remat)


def unembed(config: ModelConfig, params: dict, hidden_XD: jax.Array) -> jax.Array:
    """Logits, f32 [..., V], of final-normed hidden states [..., D]; the matmul runs in the dtype of `hidden_XD`."""
    weights = params["embed"]["embedding"] if config.tie_embeddings else params["lm_head"]
    spec = "...D,VD->...V" if config.tie_embeddings else "...D,DV->...V"
    return jnp.einsum(spec, hidden_XD, weights.astype(hidden_XD.dtype), preferred_element_type=jnp.float32)


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


def init_cache(config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype) -> dict:
    """An empty cache {"k", "v"}: each [L, batch, slots, K, H]."""
    shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


@functools.cache
def _split_abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The modules without arrays, and the abstract f32 params with their metadata."""
    return nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=jnp.float32)))


@functools.cache
def abstract_params(config: ModelConfig, dtype: jnp.dtype = jnp.float32) -> dict:
    """The tree of `init_params` as jax.ShapeDtypeStruct: no memory, no compute."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), nnx.to_pure_dict(_split_abstract(config)[1]))


@functools.cache
def logical_axes(config: ModelConfig) -> dict:
    """The tree of `init_params` with a tuple for each param that names its axes.

    The names: "layers", "vocab", "embed", "mlp", "heads", "kv_heads", "head_dim"; None for the axis of a norm's scale.
    """
    state = _split_abstract(config)[1]
    axes = nnx.to_pure_dict(nnx.map_state(lambda path, param: param.get_metadata("logical_axes"), state))
    # A DecoderLayer names the axes of one layer; stacking put one more in front.
    is_names = lambda x: isinstance(x, tuple)  # noqa: E731
    return axes | {"layers": jax.tree.map(lambda names: ("layers", *names), axes["layers"], is_leaf=is_names)}


def num_params(config: ModelConfig) -> int:
    """How many numbers the params hold; tied embeddings count once."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_params(config)))


def flops_per_token(config: ModelConfig, context: float) -> float:
    """Matmul FLOPs (2 per multiply-add) of one token's forward pass, without the vocabulary projection.

    Args:
        context: keys that the token attends to, on average: (T + 1) / 2 in a causal row of T, less under a window.
    """
    heads = 2 * config.num_heads + 2 * config.num_kv_heads  # q and o, k and v
    projections = config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)
    scores_and_values = 2 * config.num_heads * config.head_dim * context
    return 2.0 * config.num_layers * (projections + scores_and_values)


def unembed_flops(config: ModelConfig) -> float:
    """Matmul FLOPs (2 per multiply-add) of `unembed` for one position."""
    return 2.0 * config.hidden_size * config.vocab_size
