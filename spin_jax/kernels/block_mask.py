"""Which tiles of a row's scores, queries by keys, hold something that a query may see.

A row holds several pairs, each `prompt | real | generated`. One integer a token says who sees it: slot i sees slot j
iff

    j <= i < ends[j].

A token of `real` ends with `real`; those of the prompt and of `generated` with their pair; padding sees itself. This is
the causal case of FlashMask (arXiv 2410.01359). A sliding window adds positions[i] - positions[j] < window: positions
are those of rope, where both responses follow the prompt.

Attention by tiles walks along the list of those needed. The others cost nothing.

Shape letters: docs/architecture.md.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# The output of attention and its logsumexp carry this name: a remat policy that saves them spares the backward pass a
# second forward run.
RESIDUALS = "attention_residuals"
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite: the difference of two is a number
ENDS, POSITIONS = 0, 1  # of tokens_B2T


def block_tokens(visible_until_BT: jax.Array, positions_BT: jax.Array, tile: int) -> jax.Array:
    """Ends and positions of whole blocks, int32 [B, 2, T]. Padding is ahead of every query, so that none sees it."""
    batch, length = visible_until_BT.shape
    padding = -length % tile
    slots_BT = jax.lax.broadcasted_iota(jnp.int32, (batch, length + padding), 1)
    visible_until_BT, positions_BT = (
        jnp.pad(x_BT, ((0, 0), (0, padding))) for x_BT in (visible_until_BT, positions_BT)
    )
    return jnp.stack([jnp.maximum(visible_until_BT, slots_BT + 1), positions_BT], axis=1)


def attention_mask(queries_BT: jax.Array, keys_BS: jax.Array, sliding_window: int | None) -> jax.Array:
    """True where a query's position may see a key's, bool [B, T, S]: not ahead, nor further back than the window."""
    distance_BTS = queries_BT[:, :, None] - keys_BS[:, None, :]
    mask_BTS = distance_BTS >= 0
    return mask_BTS if sliding_window is None else mask_BTS & (distance_BTS < sliding_window)


def causal_mask(visible_until_BT: jax.Array | None, positions_BT: jax.Array, sliding_window: int | None) -> jax.Array:
    """What each slot sees of its row, bool [B, T, T]; without `visible_until_BT` a row is one sequence."""
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
    """Tiles of query blocks by key blocks that may hold a visible entry, bool [B, I, J].

    Exact by ends: if a later block sees a key, its first slot does. By a window a superset: a tile is left out if the
    smallest of its queries' positions is out of reach of the largest of its keys'.
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
    """The tiles that kernels visit, over those of the same rows if each held one sequence."""
    needed_BIJ = needed_tiles(block_tokens(visible_until_BT, positions_BT, tile), tile, sliding_window)
    batch, blocks, _ = needed_BIJ.shape
    return int(needed_BIJ.sum()) / (batch * blocks * (blocks + 1) // 2)


def walk_queries(needed_BIJ: jax.Array) -> tuple[Walk, jax.Array]:
    """The needed tiles by row, then i, then j; and their count, after which the walk means nothing."""
    batch, blocks, _ = needed_BIJ.shape
    size = needed_BIJ.size
    tiles = jnp.arange(size, dtype=jnp.int32)
    tiles = jnp.sort(jnp.where(needed_BIJ.reshape(size), tiles, size))[: batch * blocks * (blocks + 1) // 2]
    return Walk(*jnp.unravel_index(tiles, needed_BIJ.shape)), jnp.sum(needed_BIJ, dtype=jnp.int32)


def walk_keys(needed_BIJ: jax.Array) -> tuple[Walk, jax.Array]:
    """The needed tiles by row, then j, then i, both from the last to the first: `walk_queries` in a mirror, so that a
    block's last tile is the diagonal one here as there."""
    (row, j, i), count = walk_queries(jnp.flip(needed_BIJ.swapaxes(1, 2), (1, 2)))
    last = needed_BIJ.shape[1] - 1
    return Walk(row, last - i, last - j), count
