"""Sampling in int8: how far from the model it is, and that meshes and caches agree about it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from spin_jax import models, sharding
from spin_jax.config import base_config
from spin_jax.models import Columns, Compute
from spin_jax.models.cache import to_int8
from spin_jax.models.compute import Quantised, project, project_quantised
from spin_jax.programs import make_resharding, make_sampler
from spin_jax.responses import Prompt, generate
from spin_jax.sharding import AXES

ONE_DEVICE = Compute(mesh=sharding.one_device_mesh())


@pytest.mark.parametrize("axis", [-1, 0, (0, 1)])
def test_rounding_is_within_half_a_step(axis):
    x = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    x[:, :, 1] *= 100  # another scale
    numbers, scale = to_int8(x, axis)
    largest = np.abs(x).max(axis=axis, keepdims=True)
    assert numbers.dtype == jnp.int8 and np.abs(numbers).max() == 127
    assert np.all(np.abs(x - numbers * np.expand_dims(scale, axis)) <= largest / 254 * 1.0001)
    zeros = to_int8(np.zeros((3, 2), np.float32))
    assert not np.any(zeros[0]) and np.all(np.isfinite(zeros[1]))


@pytest.mark.parametrize(
    ("expression", "shape", "axes", "inputs"),
    [
        ("BTD,DNH->BTNH", (32, 4, 8), ("embed", "heads", "head_dim"), (0,)),
        ("BTNH,NHD->BTD", (4, 8, 32), ("heads", "head_dim", "embed"), (0, 1)),
        ("BTD,DF->BTF", (32, 48), ("embed", "mlp"), (0,)),
    ],
)
def test_a_matmul_is_that_of_the_rounded_weight(expression, shape, axes, inputs):
    rng = np.random.default_rng(1)
    w = rng.normal(size=shape).astype(np.float32)
    x = rng.normal(size=(2, 3, *shape[: len(inputs)])).astype(np.float32)
    weight = Quantised(*to_int8(w, inputs))
    rounded = weight.w * np.expand_dims(weight.scale, inputs)
    y = project_quantised(expression, x, weight, ONE_DEVICE, jnp.float32)
    np.testing.assert_allclose(y, project(expression, x, rounded, axes, ONE_DEVICE, jnp.float32), rtol=1e-5, atol=1e-5)


def logprobs(params: dict, tokens_BT: np.ndarray, cache_dtype: jnp.dtype) -> np.ndarray:
    """Of the last 16 tokens, fed one by one to a cache of such a dtype."""
    cache = models.init_cache(tiny.CONFIG, len(tokens_BT), tokens_BT.shape[1], cache_dtype)
    step = jax.jit(lambda *arguments: models.forward(tiny.CONFIG, *arguments, compute=ONE_DEVICE))
    first = tokens_BT.shape[1] - 16
    hidden_BTD, cache = step(params, tokens_BT[:, :first], None, cache, Columns())
    found = []
    for i in range(first, tokens_BT.shape[1]):
        logits_BV = models.unembed(tiny.CONFIG, params, hidden_BTD[:, -1], ONE_DEVICE)
        found.append(np.take_along_axis(np.asarray(jax.nn.log_softmax(logits_BV)), tokens_BT[:, i : i + 1], axis=1))
        positions_B1 = np.full((len(tokens_BT), 1), i, np.int32)
        hidden_BTD, cache = step(params, tokens_BT[:, i : i + 1], positions_B1, cache, Columns(i))
    return np.concatenate(found, axis=1)


def test_what_int8_costs():
    """Of random weights, which is worse than it gets: logits are several nats apart."""
    tokens_BT = tiny.tokens(np.random.default_rng(2), 8 * 24).reshape(8, 24)
    params = tiny.params()
    exact, cache, weights = (
        logprobs(params, tokens_BT, jnp.float32),
        logprobs(params, tokens_BT, jnp.int8),
        logprobs(models.quantise(params, jnp.float32), tokens_BT, jnp.float32),
    )
    assert np.std(exact) > 1
    for found in (cache, weights):
        assert 1e-4 < np.abs(found - exact).mean() < 0.05


def test_a_cache_in_int8_is_as_large_as_it_says():
    plain, int8 = (
        sum(x.nbytes for name, x in models.init_cache(tiny.CONFIG, 2, 16, dtype).items() if name != "positions")
        for dtype in (jnp.bfloat16, jnp.int8)
    )
    head_dim = tiny.CONFIG.head_dim
    assert int8 / plain == (head_dim + 4) / (2 * head_dim)


def test_responses_in_int8_are_the_same_on_one_device_and_on_eight():
    asked = [Prompt(row, tiny.tokens(np.random.default_rng(row), 1 + row % 7)) for row in range(12)]
    settings = base_config().generate
    settings.update(max_new_tokens=8, batch_size=8, prefill_batch_size=8, prompt_bucket=8)
    settings.update(cache_dtype="int8", weight_dtype="int8")

    def responses(*sizes: int) -> list[list[int]]:
        axis_types = (jax.sharding.AxisType.Auto,) * 3
        devices = jax.devices()[: np.prod(sizes)]
        compute = Compute(mesh=jax.make_mesh(sizes, AXES, axis_types, devices=devices))
        params = make_resharding(tiny.CONFIG, compute, "int8")(tiny.params())
        sampler = make_sampler(tiny.CONFIG, settings, (3,), compute)
        drawn = generate(sampler, params, asked, settings, seed=0, iteration=0, mesh=compute.mesh)
        return [one.tokens.tolist() for one in drawn]

    assert responses(1, 1, 1) == responses(4, 1, 2)
