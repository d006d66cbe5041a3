"""A tiny random model, and random pairs for it, that the tests of the core share."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from spin_jax.data.batch import HostBatch
from spin_jax.data.packing import Packing, Plan, pack_batch, plan_training
from spin_jax.data.pairs import RESPONSES, Pair
from spin_jax.models import ModelConfig, abstract_params

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=256,
)
# (prompt, real, generated) tokens of eight pairs: a one-token prompt, one-token responses, and all lengths mixed.
LENGTHS = ((1, 4, 9), (5, 1, 3), (7, 9, 1), (3, 6, 6), (12, 2, 8), (2, 8, 5), (9, 3, 7), (4, 7, 2))


@functools.cache
def host_params(seed: int = 0) -> dict:
    """numpy params, large enough (logits are several nats apart) that whatever goes wrong shows."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = 0.25 * rng.standard_normal(leaf.shape, np.float32)
        return 1 + noise if "norm" in path[-1].key else noise

    return jax.tree_util.tree_map_with_path(draw, abstract_params(CONFIG))


def params(seed: int = 0) -> dict:
    """The same as fresh device arrays, which a test may donate."""
    return jax.tree.map(jnp.array, host_params(seed))


def tokens(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(1, CONFIG.vocab_size, length, dtype=np.int32)


def pairs(lengths: tuple[tuple[int, int, int], ...] = LENGTHS, seed: int = 0) -> list[Pair]:
    rng = np.random.default_rng(seed)
    return [
        Pair(row, 0, tokens(rng, prompt), (tokens(rng, real), tokens(rng, generated)), (False, generated == 9))
        for row, (prompt, real, generated) in enumerate(lengths)
    ]


PACKING = Packing(4, 8, 32)  # four rows: they can be cut into two or four micro-batches


def packed(
    pairs: list[Pair], packing: Packing = PACKING, sft: bool = False, opponent_logps: np.ndarray | None = None
) -> HostBatch:
    """All pairs in one batch; `opponent_logps` [pairs, 2] in the pairs' own order."""
    plan = _plan(pairs, packing)
    rows, shape = plan.batches[0], plan.shapes[0]
    if sft:
        return pack_batch(CONFIG, pairs, rows, shape, responses=("real",), mean_over="tokens")
    in_rows = None if opponent_logps is None else opponent_logps[list(itertools.chain(*rows))]
    return pack_batch(CONFIG, pairs, rows, shape, responses=RESPONSES, reference_logps=in_rows)


def places(pairs: list[Pair], packing: Packing = PACKING) -> tuple[np.ndarray, np.ndarray]:
    """Where `packed` has put each pair: x_BP[places(pairs)] is x of the pairs in their own order."""
    found = {
        i: (row, place)
        for row, numbers in enumerate(_plan(pairs, packing).batches[0])
        for place, i in enumerate(numbers)
    }
    rows, places_in_rows = zip(*(found[i] for i in range(len(pairs))), strict=True)
    return np.array(rows), np.array(places_in_rows)


def _plan(pairs: list[Pair], packing: Packing) -> Plan:
    return plan_training(pairs, np.arange(len(pairs))[None], packing)
