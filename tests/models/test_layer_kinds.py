"""Models whose layers differ: some see a window alone, every n-th sees all, and each kind turns by angles of its own.

Their logits are held to those of transformers in test_llama.py and tests/parity; here are the other ways to compute.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import padded
import pytest
import tiny

from spin_jax.config import GenerateConfig, LoraConfig
from spin_jax.data.packing import Packing, forward_flops
from spin_jax.devices import sharding
from spin_jax.generation.engine import Engine
from spin_jax.models import (
    Execution,
    abstract_params,
    attach,
    flops_per_token,
    forward,
    init_adapters,
    merge,
    param_shardings,
    unembed,
    unembed_flops,
)
from spin_jax.objectives.logprobs import pair_logprobs

CONFIG = dataclasses.replace(
    tiny.CONFIG,
    model_type="gemma3_text",
    num_layers=4,
    sliding_window=5,
    full_attention_every=2,
    local_rope_theta=100.0,
    tie_embeddings=True,
    qk_norm=True,
    query_pre_attn_scalar=16,
    activation="gelu_pytorch_tanh",
    scale_embeddings=True,
    post_norms=True,
    norm_offset=1.0,
)
PAIRS = tiny.pairs()
IN_TWO_ROWS = Packing(2, 1, 1000)
WEIGHTS_P2 = jnp.arange(1.0, 2 * len(PAIRS) + 1).reshape(-1, 2)


@functools.cache
def params() -> dict:
    """Large enough that whatever goes wrong shows."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.25 * rng.standard_normal(x.shape, np.float32), abstract_params(CONFIG))


def logprobs_and_gradients(logprobs, params: dict) -> tuple[jax.Array, dict]:
    """Gradients of a weighted sum, so that no response's can stand in for another's."""

    def weighted(params: dict) -> tuple[jax.Array, jax.Array]:
        logps_P2 = logprobs(params)
        return jnp.sum(WEIGHTS_P2 * logps_P2), logps_P2

    gradients, logps_P2 = jax.jit(jax.grad(weighted, has_aux=True))(params)
    return logps_P2, gradients


@functools.cache
def expected() -> tuple[jax.Array, dict]:
    """By the book: a row for each response."""
    return logprobs_and_gradients(lambda params: padded.pair_logprobs(CONFIG, params, PAIRS, Execution()), params())


def assert_close(found: tuple[jax.Array, dict], share: float = 2e-5) -> None:
    np.testing.assert_allclose(found[0], expected()[0], rtol=5e-6)
    leaves = zip(jax.tree.leaves_with_path(found[1]), jax.tree.leaves(expected()[1]), strict=True)
    for (path, ours), theirs in leaves:
        name, largest = jax.tree_util.keystr(path), np.max(np.abs(theirs))
        assert largest > 0, f"{name}: no gradient to compare"
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=share * largest, err_msg=name)


def packed_logprobs(execution: Execution, packing: Packing = IN_TWO_ROWS):
    batch, places = tiny.packed(PAIRS, packing).arrays, tiny.places(PAIRS, packing)
    return lambda params: pair_logprobs(CONFIG, params, batch, execution)[places]


@pytest.mark.parametrize(
    ("attention", "remat"), [(None, "none"), (None, "mlp"), ("tiled", "full"), ("flash", "attention")]
)
def test_packed_rows_are_a_row_for_each_response(attention, remat):
    """Rows of dozens of tokens with several pairs in each, under a window of five."""
    execution = Execution(remat=remat, kernel=attention, mesh=sharding.one_device_mesh())
    assert_close(logprobs_and_gradients(packed_logprobs(execution), params()))


@pytest.mark.usefixtures("all_passes")
@pytest.mark.parametrize("attention", [None, "tiled"])
def test_eight_devices_compute_what_one_does(attention):
    mesh = sharding.make_mesh(2, 2, 2)
    placed = jax.device_put(params(), param_shardings(mesh, CONFIG))
    execution = Execution(mesh=mesh, kernel=attention)
    assert_close(logprobs_and_gradients(packed_logprobs(execution, Packing(4, 8, 32)), placed))


def test_low_rank_updates_are_those_of_the_merged_weights():
    adapters = init_adapters(CONFIG, LoraConfig(rank=3), jax.random.key(0))
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)  # b is no longer zero
    logprobs = packed_logprobs(Execution())
    attached, merged = (logprobs(how(params(), adapters, 0.5)) for how in (attach, merge))
    np.testing.assert_allclose(attached, merged, rtol=2e-5)
    assert np.max(np.abs(merged - expected()[0])) > 1


@pytest.mark.parametrize("devices", [1, 8])  # a cache by layer, and one array for all layers
def test_greedy_sampling_takes_the_best_token_of_the_model_without_a_cache(devices):
    """Prompts and responses longer than the window: layers that see all need all of them."""
    sizes = {"batch_size": 8, "prefill_batch_size": 8, "tail_batch_size": 8, "prompt_bucket": 8}
    mesh = sharding.decode_mesh(sharding.make_mesh(devices=jax.devices()[:devices]), min(devices, 2))
    engine = Engine(CONFIG, GenerateConfig(max_new_tokens=12, temperature=0.0, **sizes), Execution(mesh=mesh), ())
    rng = np.random.default_rng(3)
    prompts = [tiny.tokens(rng, length) for length in (1, 8, 3, 14, 2, 7, 4, 9, 5)]
    for prompt, response in zip(prompts, engine.generate(params(), prompts, seed=0), strict=True):
        row_T = np.concatenate([prompt, response.tokens])
        hidden_1TD, _ = forward(CONFIG, params(), row_T[None])
        best_T = np.argmax(unembed(CONFIG, params(), hidden_1TD[0]), axis=-1)
        np.testing.assert_array_equal(response.tokens, best_T[len(prompt) - 1 : -1])


def test_a_layer_counts_the_keys_that_it_sees():
    """Two layers see up to five keys, two all of them."""
    (pair,) = tiny.pairs(((7, 4, 1),))
    seen = {window: sum(min(i, window) for i in (*range(1, 8), 8, 9, 10)) for window in (5, 99)}
    per_token = flops_per_token(CONFIG, (seen[5] + seen[99]) / 2 / 10)
    assert forward_flops(CONFIG, pair) == pytest.approx(10 * per_token + 5 * unembed_flops(CONFIG))


def test_a_config_of_fewer_layers_keeps_the_rule():
    assert CONFIG.windows == (5, None, 5, None)
    assert CONFIG.window_shares == {5: 0.5, None: 0.5} and CONFIG.furthest is None
    assert dataclasses.replace(CONFIG, num_layers=1).windows == (5,)
