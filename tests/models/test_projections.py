"""Matmuls and their gradients in bfloat16 on a CPU, which has ways of its own to compute them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from spin_jax import models
from spin_jax.models import Execution
from spin_jax.models.projections import project

BFLOAT16 = Execution(jnp.dtype(jnp.bfloat16))
SIZES = dict(zip("BTDNKHFV", (2, 64, 16, 4, 2, 3, 12, 10), strict=True))


@pytest.mark.parametrize(
    ("expression", "out_dtype"),
    [
        ("BTD,DNH->BTNH", jnp.bfloat16),
        ("BTD,DKH->BTKH", jnp.bfloat16),
        ("BTNH,NHD->BTD", jnp.bfloat16),
        ("BTD,DF->BTF", jnp.bfloat16),
        ("BTF,FD->BTD", jnp.bfloat16),
        ("BTD,VD->BTV", jnp.float32),
        ("BTD,DV->BTV", jnp.float32),
    ],
)
def test_projections_are_exact_on_small_integers(expression, out_dtype):
    """bfloat16 holds integers up to 256: results and dx are not larger. Sums over tokens are, and are f32."""
    assert BFLOAT16.on_one_cpu
    inputs, y_axes = expression.split("->")
    x_axes, w_axes = inputs.split(",")
    rng = np.random.default_rng(0)

    def draw(axes: str, low: int) -> np.ndarray:
        return rng.integers(low, 4, [SIZES[axis] for axis in axes])

    x, w, dy = draw(x_axes, 0), draw(w_axes, -3), draw(y_axes, 0)
    y, vjp = jax.vjp(
        jax.jit(lambda x, w: project(expression, x, w, (None,) * len(w_axes), BFLOAT16, out_dtype)),
        jnp.asarray(x, jnp.bfloat16),
        jnp.asarray(w, jnp.float32),
    )
    dx, dw = vjp(jnp.asarray(dy, out_dtype))
    assert (y.dtype, dx.dtype, dw.dtype) == (out_dtype, jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(y, np.einsum(expression, x, w))
    np.testing.assert_array_equal(dx, np.einsum(f"{y_axes},{w_axes}->{x_axes}", dy, w))
    np.testing.assert_array_equal(dw, np.einsum(f"{x_axes},{y_axes}->{w_axes}", x, dy))
    assert np.any(dw.astype(jnp.bfloat16) != dw)


@pytest.mark.parametrize("tied", [False, True])
def test_a_models_gradient_in_bfloat16_is_close_to_that_in_f32(tied):
    config = dataclasses.replace(tiny.CONFIG, tie_embeddings=tied)
    params = tiny.params()
    if tied:
        del params["lm_head"]
    tokens_BT = np.stack([tiny.tokens(np.random.default_rng(seed), 24) for seed in range(4)])

    def loss(params, execution):
        hidden_BTD, _ = models.forward(config, params, tokens_BT[:, :-1], execution=execution)
        logps_BTV = jax.nn.log_softmax(models.unembed(config, params, hidden_BTD, execution))
        return -jnp.take_along_axis(logps_BTV, tokens_BT[:, 1:, None], axis=2).mean()

    gradient = jax.jit(jax.grad(loss), static_argnames="execution")
    exact, rounded = gradient(params, execution=Execution()), gradient(params, execution=BFLOAT16)

    def error(exact: jax.Array, rounded: jax.Array) -> float:
        assert rounded.dtype == jnp.float32
        return float(jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact))

    errors = jax.tree.leaves(jax.tree.map(error, exact, rounded))
    # From tokens through two layers and back it is some fifty roundings, each by at most 2**-9 of what is rounded.
    assert 1e-3 < max(errors) < 50 * 2**-9
