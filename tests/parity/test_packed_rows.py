"""Packed rows of real text under a real model, against a row for each response: log-probs and gradients."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import padded
from transformers import AutoTokenizer

from spin_jax import checkpoints
from spin_jax.data.chat_format import chat_format
from spin_jax.data.packing import Packing, pack_batch, plan_training
from spin_jax.data.pairs import Pair
from spin_jax.models import Execution
from spin_jax.objectives.logprobs import pair_logprobs

COMPUTE = Execution(remat="full")
WEIGHTS_P2 = np.array([[1.0, -1.0], [0.5, 2.0], [-1.5, 0.25]], np.float32)


def real_pairs(assets, smollm2) -> list[Pair]:
    """Three instructions with their answers, and as generated responses the answers of three others."""
    chat = chat_format(AutoTokenizer.from_pretrained(smollm2))
    rows = json.loads((assets / "data/rasbt_instruction/instruction-data.json").read_text())[:6]
    pairs = []
    for row, other in zip(rows[:3], rows[3:], strict=True):
        prompt = [{"role": "user", "content": f"{row['instruction']}\n{row['input']}"}]
        responses = (chat.real_response(prompt, answer["output"]) for answer in (row, other))
        pairs.append(Pair(len(pairs), 0, chat.training_prompt(prompt), tuple(responses), (False, False)))
    return pairs


def test_logprobs_and_gradients_are_those_of_padded_rows(assets, smollm2):
    config, params = checkpoints.load(smollm2)
    pairs = real_pairs(assets, smollm2)
    plan = plan_training(pairs, np.arange(3)[None], Packing(1, 16, 512))
    (rows,), (shape,) = plan.batches, plan.shapes
    assert shape.rows == 1 and plan.fill > 0.9
    order = np.argsort(rows[0])
    batch = pack_batch(config, pairs, rows, shape).arrays

    def weighted(logprobs, params: dict) -> tuple[jax.Array, jax.Array]:
        logps_P2 = logprobs(params)
        return jnp.sum(WEIGHTS_P2 * logps_P2), logps_P2

    def packed_logprobs(params: dict) -> jax.Array:
        return pair_logprobs(config, params, batch, COMPUTE)[0][order]

    def padded_logprobs(params: dict) -> jax.Array:
        return padded.pair_logprobs(config, params, pairs, COMPUTE)

    found, expected = (
        jax.jit(jax.grad(functools.partial(weighted, logprobs), has_aux=True))(params)
        for logprobs in (packed_logprobs, padded_logprobs)
    )
    np.testing.assert_allclose(found[1], expected[1], rtol=2e-5)  # seen: 6e-6
    # Seen: 8e-6.
    leaves = zip(jax.tree_util.tree_leaves_with_path(found[0]), jax.tree.leaves(expected[0]), strict=True)
    for (path, ours), theirs in leaves:
        error = jnp.linalg.norm((ours - theirs).ravel()) / jnp.linalg.norm(theirs.ravel())
        assert error < 3e-5, (jax.tree_util.keystr(path), error)
