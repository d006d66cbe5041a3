"""One optimizer step, through the real model: objectives, gradients, schedule, optimizer, and what stops it."""

import functools
import json
import math
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import padded
import pytest
import tiny

from spin_jax.data.batch import Batch, HostBatch
from spin_jax.data.pairs import choose
from spin_jax.models import Execution
from spin_jax.objectives import OBJECTIVES
from spin_jax.objectives.interface import Settings, batch_loss
from spin_jax.objectives.logprobs import pair_logprobs
from spin_jax.training.optimizer import learning_rate_schedule, make_optimizer
from spin_jax.training.train_step import TrainState, init_state, make_step

COMPUTE = Execution(remat="none")
BETA = 0.1
VALUE_AT_0 = {"logistic": math.log(2), "hinge": 1.0, "exponential": 1.0, "correlation": 1.0}

logprobs = jax.jit(lambda params, batch: pair_logprobs(tiny.CONFIG, params, batch, COMPUTE))


@functools.cache
def scored_batch(opponent_seed: int) -> Batch:
    """Eight pairs with the log-probs that the model of a seed gives them."""
    pairs = tiny.pairs()
    return tiny.packed(pairs, opponent_logps=pair_logps(tiny.params(opponent_seed))).arrays


def pair_logps(params: dict) -> np.ndarray:
    """log p(y|x) of the eight pairs, f32 [8, 2]."""
    pairs = tiny.pairs()
    return np.asarray(logprobs(params, tiny.packed(pairs).arrays))[tiny.places(pairs)]


class Recorded(NamedTuple):
    """The state of `recorder`."""

    grads: dict


def recorder() -> optax.GradientTransformation:
    """Keeps the gradient that it hands on, so that a test can look at it."""
    return optax.GradientTransformation(
        init=lambda params: Recorded(jax.tree.map(jnp.zeros_like, params)),
        update=lambda grads, state, params: (grads, Recorded(grads)),
    )


def rmsprop(learning_rate: float = 1e-3, clip_norm: float = 1.0) -> optax.GradientTransformation:
    optimizer = make_optimizer("rmsprop", optax.constant_schedule(learning_rate), clip_norm, 0.0)
    return optax.chain(recorder(), optimizer)


def gradient_of(state: TrainState) -> dict:
    """The gradient of the last step, before clipping."""
    return state.opt_state[0].grads


def jitted_step(objective, optimizer: optax.GradientTransformation, micro_batches: int = 1):
    return jax.jit(make_step(objective, optimizer, micro_batches), donate_argnums=0)


@functools.cache
def spin_step(micro_batches: int):
    """One compiled step for all tests of a kind."""
    return jitted_step(
        batch_loss(OBJECTIVES["logistic"], Settings(beta=BETA), tiny.CONFIG, COMPUTE), rmsprop(), micro_batches
    )


@functools.cache
def sft_step(micro_batches: int):
    return jitted_step(batch_loss(OBJECTIVES["sft"], Settings(), tiny.CONFIG, COMPUTE), rmsprop(), micro_batches)


def assert_trees_close(actual: dict, expected: dict, share: float) -> None:
    """Every leaf within `share` of the expected leaf's largest element."""
    for (path, ours), leaf in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        atol = share * np.max(np.abs(leaf))
        np.testing.assert_allclose(ours, leaf, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


# ---- the SPIN objective


@pytest.mark.parametrize("loss", ("logistic", "hinge", "exponential", "correlation"))
def test_the_policy_starts_level_with_its_opponent(loss):
    """Loss l(0), no reward, no margin and no accuracy: nothing has been won yet."""
    objective = jax.jit(batch_loss(OBJECTIVES[loss], Settings(beta=BETA), tiny.CONFIG, COMPUTE))
    value, (metrics, _) = objective(tiny.params(), None, scored_batch(0))
    np.testing.assert_allclose(value, VALUE_AT_0[loss], rtol=2e-7)
    assert metrics["rewards/real"] == metrics["rewards/generated"] == metrics["rewards/margin"] == 0
    assert metrics["rewards/accuracy"] == 0


def test_the_first_gradient_pulls_real_up_and_generated_down():
    """beta l'(0) (grad log p(y) - grad log p(y')) with l'(0) = -1/2."""

    def log_ratio(params: dict) -> jax.Array:
        logps_P2 = pair_logprobs(tiny.CONFIG, params, scored_batch(0), COMPUTE)[tiny.places(tiny.pairs())]
        return jnp.mean(logps_P2[:, 0] - logps_P2[:, 1])

    state, metrics, _ = spin_step(1)(init_state(tiny.params(), rmsprop()), None, scored_batch(0))
    np.testing.assert_allclose(metrics["loss"], math.log(2), rtol=2e-7)
    pull = jax.jit(jax.grad(log_ratio))(tiny.params())
    assert_trees_close(gradient_of(state), jax.tree.map(lambda g: -BETA / 2 * g, pull), 1e-5)


def test_metrics_are_those_of_the_equations():
    """Against equations 4.6 and 4.7 in numpy, with an opponent that is another model."""
    batch = scored_batch(1)
    _, metrics, _ = spin_step(1)(init_state(tiny.params(), rmsprop()), None, batch)
    logps_P2, opponent_P2 = pair_logps(tiny.params()).astype(np.float64), pair_logps(tiny.params(1))
    rewards_P2 = BETA * (logps_P2 - opponent_P2)
    margins_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    expected = {
        "loss": np.mean(np.log1p(np.exp(-margins_P))),
        "rewards/real": rewards_P2[:, 0].mean(),
        "rewards/generated": rewards_P2[:, 1].mean(),
        "rewards/margin": margins_P.mean(),
        "rewards/accuracy": np.mean(margins_P > 0),
        "logps/real": logps_P2[:, 0].mean(),
        "logps/generated": logps_P2[:, 1].mean(),
    }
    # Means over the tokens of each response, and then over pairs.
    lengths_P2 = np.array([[len(response) for response in pair.responses] for pair in tiny.pairs()])
    scores = padded.pair_scores(tiny.CONFIG, tiny.params(), tiny.pairs(), COMPUTE)
    for name, x_P2 in zip(("logps_per_token", "entropy", "token_accuracy"), scores, strict=True):
        expected |= dict(zip((f"{name}/real", f"{name}/generated"), np.mean(x_P2 / lengths_P2, axis=0), strict=True))
    expected["kl/generated"] = np.mean((opponent_P2 - logps_P2)[:, 1] / lengths_P2[:, 1])
    assert 0 < expected["rewards/accuracy"] < 1
    assert metrics.keys() == expected.keys() | {"grad_norm", "healthy"}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_training_prefers_the_real_responses_and_compiles_once():
    state = init_state(tiny.params(), rmsprop())
    for _ in range(10):
        state, metrics, _ = spin_step(1)(state, None, scored_batch(0))
    assert metrics["loss"] < 0.9 * math.log(2)
    assert metrics["rewards/accuracy"] == 1
    assert metrics["rewards/real"] > 0 > metrics["rewards/generated"]
    assert state.step == 10
    assert spin_step(1)._cache_size() == 1


def test_a_live_opponent_is_the_stored_one():
    batch = scored_batch(1)
    stored, live = (init_state(tiny.params(), rmsprop()) for _ in range(2))
    opponent = tiny.params(1)
    for _ in range(4):
        stored, stored_metrics, _ = spin_step(1)(stored, None, batch)
        live, live_metrics, _ = spin_step(1)(live, opponent, batch)
        for name, value in stored_metrics.items():
            np.testing.assert_allclose(live_metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert_trees_close(live.params, stored.params, 1e-5)


# ---- the SFT objective


def sft_batch() -> HostBatch:
    without = [choose(pair, ["real"]) for pair in tiny.pairs()]
    return tiny.packed(without, sft=True)


def test_sft_loss_is_the_mean_over_tokens():
    pairs = tiny.pairs()
    _, metrics, _ = sft_step(1)(init_state(tiny.params(), rmsprop()), None, sft_batch().arrays)
    real_logps_P = pair_logps(tiny.params())[:, 0]
    np.testing.assert_allclose(
        metrics["loss"], -real_logps_P.sum() / sum(len(p.responses[0]) for p in pairs), rtol=1e-6
    )


# ---- micro-batches


@pytest.mark.parametrize("make, micro_batches", [(spin_step, 2), (spin_step, 4), (sft_step, 4)])
def test_micro_batches_change_only_rounding(make, micro_batches):
    batch = scored_batch(1) if make is spin_step else sft_batch().arrays
    whole, whole_metrics, _ = make(1)(init_state(tiny.params(), rmsprop()), None, batch)
    state, metrics, _ = make(micro_batches)(init_state(tiny.params(), rmsprop()), None, batch)
    # Each is off by the f32 rounding of sums over some hundred tokens.
    assert_trees_close(gradient_of(state), gradient_of(whole), 1e-5)
    assert metrics.keys() == whole_metrics.keys()
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=5e-6, atol=1e-6, err_msg=name)


# ---- schedule and optimizer


@pytest.mark.parametrize("steps, ratio, warmup", [(100, 0.1, 10), (95, 0.1, 10), (20, 0.0, 0), (3, 0.5, 2)])
def test_schedule_is_hugging_faces_linear(steps, ratio, warmup):
    schedule = learning_rate_schedule(5e-7, steps, ratio)
    for step in range(steps):
        share = step / warmup if step < warmup else (steps - step) / (steps - warmup)
        np.testing.assert_allclose(schedule(step), 5e-7 * share, rtol=1e-5, atol=1e-13, err_msg=f"step {step}")
    assert schedule(warmup) == np.float32(5e-7)
    assert schedule(steps) == 0
    assert warmup == 0 or schedule(0) == 0


class GivenGradient(NamedTuple):
    """A batch that is the gradient itself."""

    a_1X: jax.Array
    b_1XY: jax.Array


def given_gradient(params: dict, opponent: None, batch: GivenGradient):
    loss = jnp.sum(params["a"] * batch.a_1X[0]) + jnp.sum(params["b"] * batch.b_1XY[0])
    return loss, ({"loss": loss}, jnp.zeros((1, 1, 2)))


def test_rmsprop_follows_torch():
    """torch.optim.RMSprop behind clip_grad_norm_, gradients given, eight steps: `golden/make_sampling_golden.py`."""
    golden = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "rmsprop.json").read_text())
    optimizer = rmsprop(golden["learning_rate"], golden["clip_norm"])
    step = jitted_step(given_gradient, optimizer)
    state = init_state(dict(zip("ab", map(jnp.array, golden["start"]), strict=True)), optimizer)
    for grads, norm, params in zip(golden["grads"], golden["norms"], golden["params"], strict=True):
        state, metrics, _ = step(state, None, GivenGradient(*(jnp.array(grad)[None] for grad in grads)))
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
        for name, expected in zip("ab", params, strict=True):
            np.testing.assert_allclose(state.params[name], expected, rtol=0, atol=1e-6)
    assert min(golden["norms"]) < golden["clip_norm"] < max(golden["norms"])


def test_adamw_decays_weights_and_clips():
    """First step from zero moments: -lr (sign(g) + decay p), clipped or not."""
    optimizer = make_optimizer("adamw", optax.constant_schedule(0.01), 1.0, 0.5)
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[3.0]])}
    batch = GivenGradient(jnp.array([[30.0, -40.0]]), jnp.array([[[0.5]]]))
    state, metrics, _ = jitted_step(given_gradient, optimizer)(init_state(params, optimizer), None, batch)
    np.testing.assert_allclose(metrics["grad_norm"], math.sqrt(2500.25), rtol=1e-6)
    np.testing.assert_allclose(state.params["a"], [1 - 0.01 * (1 + 0.5), -2 - 0.01 * (-1 - 1.0)], rtol=1e-5)
    np.testing.assert_allclose(state.params["b"], [[3 - 0.01 * (1 + 1.5)]], rtol=1e-5)


# ---- what stops a run, and donation


def assert_trees_equal(actual, expected) -> None:
    for (path, ours), leaf in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, leaf, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_loss_that_is_not_finite_changes_nothing_then_or_later(micro_batches):
    step, good = spin_step(micro_batches), scored_batch(1)
    opponent_BP2 = good.reference_logps_BPY.copy()
    opponent_BP2[1, 0, 1] = np.nan  # one response of one pair was never scored
    state, metrics, _ = step(init_state(tiny.params(), rmsprop()), None, good)
    assert metrics["healthy"] and state.healthy
    before = jax.device_get(state)
    state, metrics, _ = step(state, None, good._replace(reference_logps_BPY=opponent_BP2))
    assert not np.isfinite(metrics["loss"])
    for _ in range(2):
        assert not metrics["healthy"] and not state.healthy
        assert_trees_equal(state._replace(healthy=True), before)
        state, metrics, _ = step(state, None, good)
    assert np.isfinite(metrics["loss"])


def test_a_gradient_that_is_not_finite_changes_nothing():
    optimizer = rmsprop()
    params = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
    before = jax.device_get(init_state(params, optimizer))
    batch = GivenGradient(jnp.array([[1e30, 1.0, 1.0]]), jnp.ones((1, 2, 2)))  # its square is beyond f32
    state, metrics, _ = jitted_step(given_gradient, optimizer)(init_state(params, optimizer), None, batch)
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert not metrics["healthy"] and not state.healthy
    assert_trees_equal(state._replace(healthy=True), before)


@pytest.mark.filterwarnings("error")
def test_a_step_consumes_the_state_it_is_given():
    state = init_state(tiny.params(), rmsprop())
    given = jax.tree.leaves(state)
    state, _, _ = spin_step(1)(state, None, scored_batch(0))
    assert all(leaf.is_deleted() for leaf in given)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
