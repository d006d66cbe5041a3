"""The Llama family (also Mistral, Qwen, Gemma): Flax NNX modules behind pure functions on a nested dict of arrays.

Modules exist inside a call only: `forward` merges them with the params that it is given, and returns arrays. All other
code treats params as data, so that policy, opponent, gradients and optimizer moments are the same kind of tree.

Shape letters: docs/architecture.md.
"""

import functools
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from spin_jax.devices.sharding import constrain
from spin_jax.kernels.block_mask import attention_mask
from spin_jax.models import kv_cache as cache_lib
from spin_jax.models.attention import attend_cached, causal_attention
from spin_jax.models.config import ModelConfig
from spin_jax.models.execution import (
    ATTENDED,
    DOWN,
    GATE,
    INPUT,
    QKV,
    REMAT_POLICIES,
    UP,
    Execution,
    materialize,
    remat_name,
)
from spin_jax.models.kv_cache import Columns
from spin_jax.models.projections import Adapted, gated, project, project_adapted
from spin_jax.models.rope import apply_rope, rope_tables
from spin_jax.models.weights import Weight, weights


class Block(nnx.Module):
    """A module made from a branch of the table of weights: weights become params, and inner branches the `parts`."""

    parts: ClassVar[dict[str, Callable[..., nnx.Module]]] = {}

    def __init__(self, config: ModelConfig, execution: Execution, table: dict, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.config, self.execution = config, execution
        for name, entry in table.items():
            if isinstance(entry, Weight):
                # "logical_axes" is a key of our own: flax would derive a sharding from its own key.
                param = nnx.Param(entry.init(rngs.params(), entry.shape, dtype), logical_axes=entry.logical_axes)
                setattr(self, name, param)
            else:
                setattr(self, name, self.parts[name](config, execution, entry, rngs=rngs, dtype=dtype))

    def project(self, expression: str, x: jax.Array, param: nnx.Param) -> jax.Array:
        """einsum of x with a weight, in x's dtype."""
        weight, axes = param.get_value(), param.get_metadata("logical_axes")
        project_by = project_adapted if isinstance(weight, Adapted) else project
        return project_by(expression, x, weight, axes, self.execution, x.dtype)

    def norm(self, x: jax.Array, name: str) -> jax.Array:
        """RMS-norm x with the scale of this name."""
        scale, offset = getattr(self, name)[...], self.config.norm_offset
        scale = offset + scale.astype(jnp.float32) if offset else scale
        return rms_norm(x, scale, self.config.rms_norm_eps, self.execution)

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        return constrain(x, self.execution.mesh, *axes)

    def remat_name(self, x: jax.Array, name: str) -> jax.Array:
        return remat_name(x, name, self.execution)


class Tokens(NamedTuple):
    """Positions of a call's tokens, and what they see.

    Attributes:
        rope: (cos, sin) of `rope_tables`.
        positions_BT: int32, positions for the sliding window.
        visible_until_BT: int32, without a cache: slots of the row from which on a token is not seen; or None.
        columns: with a cache: its columns to write and to read.
        mask_BTS: with a cache: which of its columns each token sees.
    """

    rope: tuple[jax.Array, jax.Array]
    positions_BT: jax.Array
    visible_until_BT: jax.Array | None = None
    columns: Columns | None = None
    mask_BTS: jax.Array | None = None


class Embedding(Block):
    """Token ids to vectors. If embeddings are tied, `unembed` uses the same table."""

    embedding: nnx.Param

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        # Let each device look up its part of the vectors for all rows, then exchange these for all parts of its own
        # rows. So neither the table nor its gradient, which is summed in f32, is ever sent.
        dtype, tokens_BT = self.execution.dtype, self.constrain(tokens_BT, None, None)
        x_BTD = self.constrain(self.embedding[...][tokens_BT], None, None, "embed").astype(dtype)
        if self.config.scale_embeddings:  # the factor is rounded to this dtype, as in the training of published models
            x_BTD *= jnp.asarray(self.config.hidden_size**0.5, dtype)
        return self.constrain(x_BTD, "rows", "sequence", None)


class Attention(Block):
    """Grouped-query self-attention with rotary positions. With a cache, tokens attend to layer `index` of the cache."""

    q: nnx.Param
    k: nnx.Param
    v: nnx.Param
    o: nnx.Param
    q_bias: nnx.Param
    k_bias: nnx.Param
    v_bias: nnx.Param

    def __call__(
        self, x_BTD: jax.Array, tokens: Tokens, cache: dict | None, index: jax.Array | None
    ) -> tuple[jax.Array, dict | None]:
        dtype, config = x_BTD.dtype, self.config
        q_BTNH = self.project("BTD,DNH->BTNH", x_BTD, self.q)
        k_BTKH = self.project("BTD,DKH->BTKH", x_BTD, self.k)
        v_BTKH = self.project("BTD,DKH->BTKH", x_BTD, self.v)
        if config.qkv_bias:
            q_BTNH += self.q_bias[...].astype(dtype)[None, None]
            k_BTKH += self.k_bias[...].astype(dtype)[None, None]
            v_BTKH += self.v_bias[...].astype(dtype)[None, None]
        if config.qk_norm:
            q_BTNH, k_BTKH = self.norm(q_BTNH, "q_norm"), self.norm(k_BTKH, "k_norm")
        # All kernels divide scores by sqrt(head_dim): scale q to divide by another number.
        scale = (config.head_dim / (config.query_pre_attn_scalar or config.head_dim)) ** 0.5
        q_BTNH, k_BTKH = apply_rope(q_BTNH, *tokens.rope, scale), apply_rope(k_BTKH, *tokens.rope)
        if cache is None:
            q_BTNH, k_BTKH, v_BTKH = (self.remat_name(x, QKV) for x in (q_BTNH, k_BTKH, v_BTKH))
            attended_BTNH = causal_attention(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                tokens.visible_until_BT,
                tokens.positions_BT,
                config.sliding_window,
                self.execution.kernel,
                self.execution.mesh,
            )
        else:
            assert tokens.columns is not None and tokens.mask_BTS is not None, "they come with a cache"
            cache = cache_lib.write(cache, k_BTKH, v_BTKH, index, tokens.columns.written)
            attended_BTNH = attend_cached(q_BTNH, cache, index, tokens.mask_BTS, tokens.columns)
        return self.project("BTNH,NHD->BTD", attended_BTNH, self.o), cache


class MLP(Block):
    """Gated MLP, down(activation(x gate) * (x up)); SwiGLU if the activation is silu (arXiv 2002.05202)."""

    gate: nnx.Param
    up: nnx.Param
    down: nnx.Param

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF = self.remat_name(self.project("BTD,DF->BTF", x_BTD, self.gate), GATE)
        up_BTF = self.remat_name(self.project("BTD,DF->BTF", x_BTD, self.up), UP)
        gated_BTF = materialize(gated(gate_BTF, up_BTF, self.config.activation, self.execution))
        return self.project("BTF,FD->BTD", gated_BTF, self.down)


class DecoderLayer(Block):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x)). With post-norms, norm both results before
    adding them."""

    parts = {"attention": Attention, "mlp": MLP}
    attention: Attention
    mlp: MLP

    def __call__(
        self, x_BTD: jax.Array, tokens: Tokens, cache: dict | None, index: jax.Array | None
    ) -> tuple[jax.Array, dict | None]:
        with jax.named_scope("attention"):
            attended_BTD, cache = self.attention(self._normed(x_BTD, "attention_norm"), tokens, cache, index)
            x_BTD = self._plus(x_BTD, attended_BTD, "attention_post_norm", ATTENDED)
            if not self.config.post_norms:
                x_BTD = self.remat_name(x_BTD, ATTENDED)
        with jax.named_scope("mlp"):
            down_BTD = self.mlp(self._normed(x_BTD, "mlp_norm"))
            return self._plus(x_BTD, down_BTD, "mlp_post_norm", DOWN), cache

    def _normed(self, x_BTD: jax.Array, name: str) -> jax.Array:
        # Gather along the sequence, once for all the matmuls that read it.
        return materialize(self.constrain(self.norm(x_BTD, name), "rows", None, None))

    def _plus(self, x_BTD: jax.Array, y_BTD: jax.Array, post_norm: str, name: str) -> jax.Array:
        if self.config.post_norms:
            # The backward pass needs the norm's input: keeping it under `name` spares the matmul that made it.
            y_BTD = self.remat_name(self.constrain(y_BTD, "rows", "sequence", None), name)
            y_BTD = self.norm(y_BTD, post_norm)
        return self.constrain(x_BTD + y_BTD, "rows", "sequence", None)


def _stack(config: ModelConfig, execution: Execution, table: dict, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> DecoderLayer:
    """Make all layers as one DecoderLayer, whose params have a leading axis L."""
    make = nnx.vmap(lambda key: DecoderLayer(config, execution, table, rngs=nnx.Rngs(key), dtype=dtype))
    return make(jax.random.split(rngs.params(), config.num_layers))


class Llama(Block):
    """Token ids to final-normed hidden states. `layers` is a DecoderLayer whose params have a leading axis L; for
    params by layer, it is the first layer."""

    parts = {"embed": Embedding, "layers": _stack}
    embed: Embedding
    layers: DecoderLayer

    def __call__(
        self,
        layers: dict | tuple[dict, ...],
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        visible_until_BT: jax.Array | None,
        cache: dict | None,
        columns: Columns,
    ) -> tuple[jax.Array, dict | None]:
        config = self.config
        ropes = {window: rope_tables(config, positions_BT, window is not None) for window in config.window_shares}
        positions_BT = jnp.broadcast_to(positions_BT, tokens_BT.shape)
        seen, masks = {}, dict.fromkeys(ropes)
        if cache is not None:
            positions_BS = jax.lax.dynamic_update_slice(cache["positions"], positions_BT, (0, columns.written))
            masks = {window: attention_mask(positions_BT, positions_BS, window) for window in ropes}
            seen = {"positions": positions_BS}
            cache = {name: x for name, x in cache.items() if name != "positions"}
        # All layers share a kernel with one window. Give layers without a window positions of 0: it cuts nothing off.
        places = {w: positions_BT if w == config.sliding_window else jnp.zeros_like(positions_BT) for w in ropes}
        tokens = {w: Tokens(ropes[w], places[w], visible_until_BT, columns, masks[w]) for w in ropes}
        with jax.named_scope("embed"):
            x_BTD = self.embed(tokens_BT)
        if isinstance(layers, tuple):
            x_BTD, cache = self._one_by_one(layers, x_BTD, tokens, cache or {})
        else:
            x_BTD, cache = self._scanned(layers, x_BTD, tokens, cache)
        with jax.named_scope("final_norm"):
            return self.norm(x_BTD, "final_norm"), cache and cache | seen

    def _scanned(
        self, layers: dict, x_BTD: jax.Array, tokens: dict[int | None, Tokens], cache: dict | None
    ) -> tuple[jax.Array, dict | None]:
        layer_def, tokens_of = nnx.graphdef(self.layers), _by_index(self.config.windows, tokens)

        def apply_layer(carry: tuple, indexed_layer: tuple) -> tuple[tuple, None]:
            x_BTD, cache = carry
            index, layer = indexed_layer
            if self.execution.on_one_cpu:  # keep it as integers there; elsewhere the scan keeps it anyway
                x_BTD = self.remat_name(x_BTD, INPUT)
            return nnx.merge(layer_def, layer)(x_BTD, tokens_of(index), cache, index), None

        if self.execution.remat != "none":
            # No barrier (prevent_cse) is needed: inside a scan XLA has no common subexpression to eliminate.
            apply_layer = jax.checkpoint(apply_layer, policy=REMAT_POLICIES[self.execution.remat], prevent_cse=False)
        # Carry the cache instead of scanning over it: a scan would stack the layers' slices into a new copy of it.
        indices_L = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        (x_BTD, cache), _ = jax.lax.scan(apply_layer, (x_BTD, cache), (indices_L, layers))
        return x_BTD, cache

    def _one_by_one(
        self, layers: tuple[dict, ...], x_BTD: jax.Array, tokens: dict[int | None, Tokens], cache: dict
    ) -> tuple[jax.Array, dict]:
        """Apply the layers one by one, for sampling with a cache by layer."""
        layer_def, caches = nnx.graphdef(self.layers), []
        for layer, window, *of_layer in zip(layers, self.config.windows, *cache.values(), strict=True):
            of_layer = dict(zip(cache, of_layer, strict=True))
            x_BTD, of_layer = nnx.merge(layer_def, layer)(x_BTD, tokens[window], of_layer, None)
            caches.append(of_layer)
        return x_BTD, {name: tuple(of_layer[name] for of_layer in caches) for name in cache}


def _by_index(windows: tuple[int | None, ...], tokens: dict[int | None, Tokens]) -> Callable[[jax.Array], Tokens]:
    """Return a function: index of a layer -> the `Tokens` of its window. It looks them up in a table and does not
    branch, so that one scan, with one attention kernel in it, serves layers of both kinds."""
    kinds = list(tokens)
    if len(kinds) == 1:
        return lambda index: tokens[kinds[0]]
    tables = jax.tree.map(lambda *of_kinds: jnp.stack(of_kinds), *tokens.values())
    kinds_L = jnp.asarray([kinds.index(window) for window in windows])
    choose = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
    return lambda index: jax.tree.map(lambda table: choose(table, kinds_L[index]), tables)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, execution: Execution) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis (arXiv 1910.07467). Compute in f32, and return x's dtype."""
    x_f32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + eps)
    normed = _scaled(x_f32, inverse) if execution.on_one_cpu else x_f32 * inverse
    return (normed * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)).astype(x.dtype)


@jax.custom_vjp
def _scaled(x: jax.Array, by: jax.Array) -> jax.Array:
    """x * by, with one number of `by` for each vector of x.

    Its gradient with respect to `by` is written as a matmul: XLA for CPUs takes far longer for a sum of products.
    """
    return x * by


def _scaled_backward(residuals, dy):
    x, by = residuals
    return dy * by, jnp.einsum("...d,...d->...", dy, x, precision="highest")[..., None]


_scaled.defvjp(lambda x, by: (x * by, (x, by)), _scaled_backward)


@functools.cache
def _modules(config: ModelConfig, execution: Execution) -> nnx.GraphDef:
    """Return the modules of a model, without arrays."""
    make = functools.partial(Llama, config, execution, weights(config), dtype=jnp.float32)
    return nnx.graphdef(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))


def forward(
    config: ModelConfig,
    params: dict,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    cache: dict | None = None,
    columns: Columns = Columns(),  # noqa: B008, frozen
    *,
    visible_until_BT: jax.Array | None = None,
    execution: Execution | None = None,
) -> tuple[jax.Array, dict | None]:
    """Run the decoder up to and including its final norm. `unembed` turns the result into logits.

    Args:
        params: nested dict from `init_params` or `models.lora.attach`; with a cache by layer, from `split_layers`. Each
            layer is cast when it is reached, and matmuls run in `execution.dtype`. Norms, rotations and softmax always
            run in f32.
        tokens_BT: int32. Pad rows on the right, where no token sees the padding.
        positions_BT: int32, position of each token in its sequence; 0, 1, ... if None.
        cache: from `init_cache`, with what earlier calls have seen. A token sees columns whose position is not ahead of
            its own. Give padding the position EMPTY_POSITION, which no token sees.
        columns: the cache's columns that this call writes and reads.
        visible_until_BT: int32, without a cache, for rows with several sequences: token j is seen by the tokens at
            slots j to visible_until_BT[j] - 1 of its row. None if a row is one sequence.

    Returns:
        Hidden states [B, T, D] in `execution.dtype`, and the cache with this call's keys and values, or None.
    """
    if positions_BT is None:
        positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
    layers = params["layers"]
    some_layer = layers[0] if isinstance(layers, tuple) else layers
    model = nnx.merge(_modules(config, execution or Execution()), params | {"layers": some_layer})
    return model(layers, tokens_BT, positions_BT, visible_until_BT, cache, columns)


def unembed(config: ModelConfig, params: dict, hidden: jax.Array, execution: Execution | None = None) -> jax.Array:
    """Return logits, f32 [..., V], of final-normed hidden states [B, D] or [B, T, D], by a matmul in their dtype."""
    leading = "BT"[: hidden.ndim - 1]
    if config.tie_embeddings:
        expression, weights, axes = f"{leading}D,VD->{leading}V", params["embed"]["embedding"], ("vocab", "embed")
    else:
        expression, weights, axes = f"{leading}D,DV->{leading}V", params["lm_head"], ("embed", "vocab")
    return project(expression, hidden, weights, axes, execution or Execution(), jnp.dtype(jnp.float32))
