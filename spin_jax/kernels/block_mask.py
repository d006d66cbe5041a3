"""Find the tiles of a row's scores, queries by keys, in which a query may see a key.

A row holds several pairs, each `prompt | real | generated`. One integer for each token says who sees it: slot i sees
slot j iff

    j <= i < visible_until[j].

That is the end of `real` for its tokens, and the end of the pair for tokens of the prompt and of `generated`. Padding
sees itself. This is the causal case of FlashMask (arXiv 2410.01359). A sliding window adds

    positions[i] - positions[j] < window,

where positions are those of rope: both responses follow the prompt.

Attention by tiles computes the tiles in this list. The others cost nothing.

Shape letters: docs/architecture.md.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Name of attention's output and logsumexp. A remat policy that saves them spares a second forward run of the kernel.
RESIDUALS = "attention_residuals"
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite: the difference of two is a number
ENDS, POSITIONS = 0, 1  # of tokens_B2T


def block_tokens(visible_until_BT: jax.Array, positions_BT: jax.Array, tile: int) -> jax.Array:
    """Pad rows to whole blocks, and stack `visible_until` and positions: int32 [B, 2, T]. No query sees the padding."""
    batch, length = visible_until_BT.shape
    padding = -length % tile
    slots_BT = jax.lax.broadcasted_iota(jnp.int32, (batch, length + padding), 1)
    visible_until_BT, positions_BT = (
        jnp.pad(x_BT, ((0, 0), (0, padding))) for x_BT in (visible_until_BT, positions_BT)
    )
    return jnp.stack([jnp.maximum(visible_until_BT, slots_BT + 1), positions_BT], axis=1)


def attention_mask(queries_BT: jax.Array, keys_BS: jax.Array, sliding_window: int | None) -> jax.Array:
    """Mask by positions, bool [B, T, S]: True if the key is not ahead of the query, and inside its window."""
    distance_BTS = queries_BT[:, :, None] - keys_BS[:, None, :]
    mask_BTS = distance_BTS >= 0
    return mask_BTS if sliding_window is None else mask_BTS & (distance_BTS < sliding_window)


def causal_mask(visible_until_BT: jax.Array | None, positions_BT: jax.Array, sliding_window: int | None) -> jax.Array:
    """Mask of what each slot sees of its row, bool [B, T, T]. Without `visible_until_BT` a row is one sequence."""
    slots_T = jnp.arange(positions_BT.shape[1], dtype=jnp.int32)
    mask_BTT = attention_mask(slots_T[None], slots_T[None], None)
    if visible_until_BT is not None:
        mask_BTT = mask_BTT & (slots_T[None, :, None] < visible_until_BT[:, None, :])
    if sliding_window is not None:
        mask_BTT = mask_BTT & (positions_BT[:, :, None] - positions_BT[:, None, :] < sliding_window)
    return mask_BTT


class Walk(NamedTuple):
    """Tiles in the order in which a kernel computes them, int32 [steps]: row, query block, key block."""

    row: jax.Array
    i: jax.Array
    j: jax.Array


def needed_tiles(tokens_B2T: jax.Array, tile: int, sliding_window: int | None) -> jax.Array:
    """Find the tiles of query blocks by key blocks that may have a visible entry, bool [B, I, J].

    Without a window the result is exact: if any slot of a later block sees a key, its first slot does. With a window it
    is a superset: a tile is left out if its smallest query position cannot reach its largest key position.
    """
    tokens_B2IQ = tokens_B2T.reshape(*tokens_B2T.shape[:2], -1, tile)
    starts_I = tile * jnp.arange(tokens_B2IQ.shape[2], dtype=jnp.int32)
    ends_BJ = tokens_B2IQ[:, ENDS].max(-1)
    needed_BIJ = (starts_I[None, :, None] >= starts_I[None, None]) & (starts_I[None, :, None] < ends_BJ[:, None])
    if sliding_window is not None:
        positions_BIQ = tokens_B2IQ[:, POSITIONS]
        needed_BIJ &= positions_BIQ.min(-1)[:, :, None] - positions_BIQ.max(-1)[:, None] < sliding_window
    return needed_BIJ


def share_of_causal(
    visible_until_BT: jax.Array, positions_BT: jax.Array, tile: int, sliding_window: int | None
) -> float:
    """Return the number of tiles that kernels visit, over that of the same rows if each held one sequence."""
    needed_BIJ = needed_tiles(block_tokens(visible_until_BT, positions_BT, tile), tile, sliding_window)
    batch, blocks, _ = needed_BIJ.shape
    return int(needed_BIJ.sum()) / (batch * blocks * (blocks + 1) // 2)


def walk_queries(needed_BIJ: jax.Array) -> tuple[Walk, jax.Array]:
    """Order the needed tiles by row, then i, then j. Also return their count; what follows in the walk is no tile."""
    batch, blocks, _ = needed_BIJ.shape
    size = needed_BIJ.size
    tiles = jnp.arange(size, dtype=jnp.int32)
    tiles = jnp.sort(jnp.where(needed_BIJ.reshape(size), tiles, size))[: batch * blocks * (blocks + 1) // 2]
    return Walk(*jnp.unravel_index(tiles, needed_BIJ.shape)), jnp.sum(needed_BIJ, dtype=jnp.int32)


def walk_keys(needed_BIJ: jax.Array) -> tuple[Walk, jax.Array]:
    """Order the needed tiles by row, then j, then i, both from the last to the first. This mirrors `walk_queries`, so
    that a block's last tile is the diagonal one in both."""
    (row, j, i), count = walk_queries(jnp.flip(needed_BIJ.swapaxes(1, 2), (1, 2)))
    last = needed_BIJ.shape[1] - 1
    return Walk(row, last - i, last - j), count
