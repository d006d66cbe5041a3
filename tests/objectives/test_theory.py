"""The theorems of the SPIN paper (arXiv 2401.01335), on a policy small enough for exact expectations.

One prompt and six responses. The policy is a softmax of six numbers, theta; p_data and the opponent p_t are any two
positive distributions; an expectation over pairs (y, y') is a sum over all thirty-six. All in float64.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from spin_jax.objectives import margin_losses
from spin_jax.objectives.margin_losses import rewards

V = 6  # responses
SLOPES = {"logistic": -1 / 2, "hinge": -1.0, "exponential": -1.0, "correlation": -1.0}  # l'(0)
AT_ZERO = {"logistic": math.log(2), "hinge": 1.0, "exponential": 1.0, "correlation": 1.0}  # l(0)
LOSSES = {name: getattr(margin_losses, name) for name in ("logistic", "hinge", "exponential", "correlation")}
every_loss = pytest.mark.parametrize("loss", sorted(LOSSES))
every_seed = pytest.mark.parametrize("seed", range(4))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def random_logps(seed: int, name: str) -> np.ndarray:
    """Log-probs [V] of a random distribution, different for each name."""
    logits_V = np.random.default_rng([seed, *name.encode()]).normal(size=V)
    return normalise(logits_V)


def normalise(logits_V: np.ndarray) -> np.ndarray:
    return logits_V - np.logaddexp.reduce(logits_V)


def margins(theta_V: jax.Array, opponent_V: jax.Array, beta: float) -> jax.Array:
    """The argument of l in equation 4.7 for every pair (y, y'), [V, V]."""
    rewards_V = rewards(jax.nn.log_softmax(theta_V), opponent_V, beta)
    return rewards_V[:, None] - rewards_V[None, :]


@functools.partial(jax.jit, static_argnames="loss")
def spin_loss(theta_V, data_V, opponent_V, beta: float, loss: str, temperature: float = 1.0) -> jax.Array:
    """L_SPIN(theta, theta_t) of equation 4.7: y ~ p_data, y' ~ p_t at a temperature; both given as log-probs."""
    weights_VV = jnp.exp(data_V)[:, None] * jax.nn.softmax(opponent_V / temperature)[None, :]
    return jnp.sum(weights_VV * LOSSES[loss](margins(theta_V, opponent_V, beta)))


gradient = jax.jit(jax.grad(spin_loss), static_argnames="loss")
hessian = jax.jit(jax.hessian(spin_loss), static_argnames="loss")


def minimise(data_V: np.ndarray, opponent_V: np.ndarray, beta: float) -> np.ndarray:
    """Log-probs of the policy with the least logistic loss, started at the opponent as Algorithm 1 does."""
    result = scipy.optimize.minimize(
        spin_loss,
        opponent_V,
        args=(data_V, opponent_V, beta, "logistic"),
        jac=gradient,
        hess=hessian,
        method="trust-exact",
        options={"gtol": 1e-12},
    )
    assert np.abs(result.jac).max() < 1e-8
    return normalise(result.x)


def kl(p_V: np.ndarray, q_V: np.ndarray) -> float:
    """KL(p || q) in nats, of two log-prob vectors."""
    return float(np.sum(np.exp(p_V) * (p_V - q_V)))


@every_loss
def test_assumption_5_1(loss):
    """Assumption 5.1: l'(t) <= 0 for all t, l'(0) < 0, l convex. And the values the other tests rely on."""
    points = jnp.linspace(-8.0, 8.0, 401)
    assert jax.grad(LOSSES[loss])(0.0) == SLOPES[loss]
    slopes = jax.vmap(jax.grad(LOSSES[loss]))(points)
    assert (slopes <= 0).all()
    assert (jnp.diff(slopes) >= 0).all()


@every_seed
@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0, 5.0])
def test_theorem_5_4_minimiser(seed, beta):
    """Theorem 5.4: with the logistic loss, p_{t+1} is p_t (p_data / p_t)^{1/lambda}, normalised."""
    data_V, opponent_V = random_logps(seed, "data"), random_logps(seed, "opponent")
    expected_V = normalise(opponent_V + (data_V - opponent_V) / beta)
    np.testing.assert_allclose(np.exp(minimise(data_V, opponent_V, beta)), np.exp(expected_V), rtol=0, atol=1e-6)
    if beta == 1.0:  # a full step: the data itself
        np.testing.assert_allclose(expected_V, data_V, atol=1e-12)


@every_seed
def test_lemma_c_2_least_loss(seed):
    """Lemma C.2: least logistic loss = log 2 - JSD(p_+ || p_-); p_+ = p_data(y) p_t(y'), p_- = p_t(y) p_data(y')."""
    data_V, opponent_V = random_logps(seed, "data"), random_logps(seed, "opponent")
    plus = (data_V[:, None] + opponent_V[None, :]).ravel()
    minus = (opponent_V[:, None] + data_V[None, :]).ravel()
    middle = np.logaddexp(plus, minus) - math.log(2)
    jsd = (kl(plus, middle) + kl(minus, middle)) / 2
    for beta in (0.5, 1.0, 5.0):
        least = spin_loss(minimise(data_V, opponent_V, beta), data_V, opponent_V, beta, loss="logistic")
        assert float(least) == pytest.approx(math.log(2) - jsd, abs=1e-10)
    assert jsd > 0.01  # the distributions differ, so this was not log 2 = log 2


@every_loss
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_theorem_5_2_data_is_a_fixed_point(loss, beta):
    """Theorem 5.2, sufficiency: at p_t = p_data no policy has a smaller loss than theta_t, for any lambda."""
    data_V = random_logps(0, "data")
    np.testing.assert_allclose(gradient(data_V, data_V, data_V, beta, loss=loss), np.zeros(V), atol=1e-14)
    generator = np.random.default_rng(1)
    for scale in (1e-3, 0.1, 1.0, 5.0):
        thetas_NV = data_V + scale * generator.normal(size=(50, V))
        losses_N = jax.vmap(lambda theta_V: spin_loss(theta_V, data_V, data_V, beta, loss=loss))(thetas_NV)
        assert (losses_N >= AT_ZERO[loss] - 1e-12 * jnp.maximum(1.0, jnp.abs(losses_N))).all()
        if loss in ("logistic", "exponential"):  # strictly convex: any other policy is worse
            assert (losses_N > AT_ZERO[loss]).all()


@every_loss
@every_seed
def test_theorem_5_2_only_data_is_a_fixed_point(loss, seed):
    """Theorem 5.2, necessity: at p_t != p_data some lambda makes theta_t beatable.

    Its proof follows g(lambda), the loss of p_data as the policy: g(0) = l(0) and g'(0) = l'(0) [KL(p_data || p_t) +
    KL(p_t || p_data)] < 0, so that all small lambda will do.
    """
    data_V, opponent_V = random_logps(seed, "data"), random_logps(seed, "opponent")
    slope = jax.grad(spin_loss, argnums=3)(data_V, data_V, opponent_V, 0.0, loss=loss)
    expected = SLOPES[loss] * (kl(data_V, opponent_V) + kl(opponent_V, data_V))
    assert float(slope) == pytest.approx(expected, rel=1e-12)
    assert expected < -0.1
    for beta in (1e-3, 1e-2, 1e-1):
        assert spin_loss(data_V, data_V, opponent_V, beta, loss=loss) < AT_ZERO[loss]
    assert np.abs(gradient(opponent_V, data_V, opponent_V, 0.1, loss=loss)).max() > 1e-3  # and descent finds it


@every_loss
@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_an_iteration_starts_at_l_of_zero(loss, beta):
    """Equation 4.7 at theta = theta_t: every margin is 0, so the loss is log 2 (logistic) or 1, whatever the data."""
    data_V, opponent_V = random_logps(0, "data"), random_logps(0, "opponent")
    assert (margins(opponent_V, jax.nn.log_softmax(opponent_V), beta) == 0.0).all()
    start = spin_loss(opponent_V, data_V, opponent_V, beta, loss=loss)
    assert float(start) == pytest.approx(AT_ZERO[loss], abs=1e-14)
    # And as training computes it, in float32: the nearest float32 to l(0).
    assert LOSSES[loss](jnp.zeros((), jnp.float32)) == np.float32(AT_ZERO[loss])


@every_loss
@every_seed
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_first_gradient_is_that_of_sft(loss, seed, beta):
    """Equation 4.7 at theta = theta_t: the expected gradient is lambda |l'(0)| times the gradient of -E log p_theta(y).

    Because E_{y' ~ p_t} grad log p_theta(y') = 0 (a score has mean zero): true of samples at temperature 1 only.
    """
    data_V, opponent_V = random_logps(seed, "data"), random_logps(seed, "opponent")
    sft_V = jax.grad(lambda theta_V: -jnp.sum(jnp.exp(data_V) * jax.nn.log_softmax(theta_V)))(opponent_V)
    factor = beta * -SLOPES[loss]
    first_V = gradient(opponent_V, data_V, opponent_V, beta, loss=loss)
    np.testing.assert_allclose(first_V, factor * sft_V, rtol=1e-10, atol=1e-14)
    colder_V = gradient(opponent_V, data_V, opponent_V, beta, loss=loss, temperature=0.5)
    assert jnp.abs(colder_V - factor * sft_V).max() > 0.05 * factor


@pytest.mark.parametrize("beta", [0.5, 0.8, 1.5, 2.0, 5.0])
def test_iterating_theorem_5_4(beta):
    """Theorem 5.4 iterated: log(p_t / p_data), less its mean, is multiplied by (1 - 1/lambda) in every iteration.

    So lambda > 1/2 converges to p_data, in damped steps above 1; and lambda = 1/2 swings about it for ever.
    """
    data_V, policy_V = random_logps(0, "data"), random_logps(0, "opponent")

    def error(policy_V):
        return (policy_V - data_V) - np.mean(policy_V - data_V)

    start_V = error(policy_V)
    for iteration in range(1, 5):
        policy_V = minimise(data_V, policy_V, beta)
        np.testing.assert_allclose(error(policy_V), (1 - 1 / beta) ** iteration * start_V, rtol=0, atol=1e-6)
