"""Where each objective ends, on a policy small enough for exact expectations: what docs/objectives.md says of it.

One prompt and five responses. The policy is a softmax of five numbers; an expectation is a sum over all pairs, or
triples, of responses. The loss is that of training, `Objective.of_pairs`. All in float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from spin_jax.objectives import OBJECTIVES
from spin_jax.objectives.interface import Settings

V, E = 5, 0.1
LENGTHS_V = np.array([1, 2, 3, 2, 4])  # tokens, for what is normalised by them
ONES_V = np.ones(V, int)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normalise(logits_V: np.ndarray) -> np.ndarray:
    return logits_V - np.logaddexp.reduce(logits_V)


def random_logps(seed: int) -> np.ndarray:
    return normalise(np.random.default_rng(seed).normal(size=V))


DATA_V, OPPONENT_V, FIRST_V = map(random_logps, range(3))  # log p_data, log p_t, log p_0
SETTINGS = Settings(label_smoothing=E)


@functools.partial(jax.jit, static_argnames=("name", "noise_ratio", "nll_weight"))
def _loss(theta_V, data_V, opponent_V, reference_V, first_V, lengths_V, traced, name, noise_ratio, nll_weight):
    objective, policy_V = OBJECTIVES[name], jax.nn.log_softmax(theta_V)
    # Every pair (y, y') or triple (y, y', y_0), with y ~ p_data, y' ~ p_t, y_0 ~ p_0.
    drawn = (data_V, opponent_V, first_V)[: len(objective.responses)]
    ids_PY = jnp.stack([ids.ravel() for ids in jnp.meshgrid(*[jnp.arange(V)] * len(drawn))], axis=1)
    weights_P = jnp.exp(sum(logps_V[ids_PY[:, y]] for y, logps_V in enumerate(drawn)))
    settings = Settings(noise_ratio=noise_ratio, nll_weight=nll_weight, **traced)
    loss_BP, _ = objective.of_pairs(
        policy_V[ids_PY][None], reference_V[ids_PY][None], lengths_V[ids_PY][None], settings
    )
    return jnp.sum(weights_P * loss_BP[0])


gradient_of = jax.jit(jax.grad(_loss), static_argnames=("name", "noise_ratio", "nll_weight"))
hessian_of = jax.jit(jax.hessian(_loss), static_argnames=("name", "noise_ratio", "nll_weight"))


class Game:
    """An objective's exact loss as a function of theta, at an opponent and a reference (the opponent, if not given)."""

    def __init__(self, name, settings, opponent_V=OPPONENT_V, reference_V=None, data_V=DATA_V, lengths_V=ONES_V):
        traced = settings._asdict()
        static = {key: traced.pop(key) for key in ("noise_ratio", "nll_weight")}
        reference_V = opponent_V if reference_V is None else reference_V
        self.opponent_V, self.args = opponent_V, (data_V, opponent_V, reference_V, FIRST_V, lengths_V, traced)
        self.loss, self.gradient, self.hessian = (
            functools.partial(function, name=name, **static) for function in (_loss, gradient_of, hessian_of)
        )

    def at(self, theta_V: np.ndarray) -> float:
        return float(self.loss(theta_V, *self.args))

    def slope(self, theta_V: np.ndarray) -> np.ndarray:
        return np.asarray(self.gradient(theta_V, *self.args))

    def minimise(self) -> np.ndarray:
        """Log-probs of the policy with the least loss, from the opponent on, as an iteration goes. Comparing losses
        ends where they differ by rounding: a Newton step, of the gradient alone, takes it from there."""
        calls = {"args": self.args, "jac": self.gradient, "hess": self.hessian, "options": {"gtol": 1e-13}}
        result = scipy.optimize.minimize(self.loss, self.opponent_V, method="trust-exact", **calls)
        found_V = result.x - np.linalg.lstsq(result.hess, result.jac, rcond=1e-9)[0]
        assert np.abs(self.slope(found_V)).max() < 1e-12, result
        return normalise(found_V)


def share_of_data() -> tuple[np.ndarray, float]:
    """s = p_data / (p_data + p_t) [V], and D = E_data s - E_t s."""
    data_V, opponent_V = np.exp(DATA_V), np.exp(OPPONENT_V)
    share_V = data_V / (data_V + opponent_V)
    return share_V, float(share_V @ (data_V - opponent_V))


def scaled_by_length(score_V: np.ndarray) -> np.ndarray:
    """p_t exp(|y| (score + Z)) with the constant Z that makes the sum 1."""
    total = lambda z: np.logaddexp.reduce(OPPONENT_V + LENGTHS_V * (score_V + z))  # noqa: E731
    return OPPONENT_V + LENGTHS_V * (score_V + scipy.optimize.brentq(total, -50, 50, xtol=1e-15))


# ---- one iteration


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_one_iteration_logistic_and_exponential(beta):
    """p_t (p_data / p_t)^{1/beta} (Theorem 5.4), and with the exponential half of its exponent."""
    for name, power in (("logistic", 1 / beta), ("exponential", 1 / (2 * beta))):
        expected_V = normalise(OPPONENT_V + power * (DATA_V - OPPONENT_V))
        np.testing.assert_allclose(Game(name, Settings(beta)).minimise(), expected_V, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_one_iteration_of_ipo(beta):
    """p_t exp( s / (beta (1 + D)) ), s = p_data / (p_data + p_t), D = E_data s - E_t s: a bounded step."""
    share_V, distance = share_of_data()
    expected_V = normalise(OPPONENT_V + share_V / (beta * (1 + distance)))
    np.testing.assert_allclose(Game("ipo", Settings(beta)).minimise(), expected_V, atol=1e-10)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_one_iteration_normalised_by_length(beta):
    """The same, but that log-ratios are those of the sums times |y|, with a constant in the exponent."""
    share_V, distance = share_of_data()
    scores = {"logistic_per_token": (DATA_V - OPPONENT_V) / beta, "ipo_per_token": share_V / (beta * (1 + distance))}
    for name, score_V in scores.items():
        found_V = Game(name, Settings(beta), lengths_V=LENGTHS_V).minimise()
        np.testing.assert_allclose(found_V, scaled_by_length(score_V), atol=1e-10, err_msg=name)


@pytest.mark.parametrize("noise_ratio", [0.5, 1.0, 4.0])
def test_one_iteration_of_space_is_the_data(noise_ratio):
    """At its beta, 1, and whatever mu."""
    found_V = Game("space", Settings(beta=1.0, noise_ratio=noise_ratio)).minimise()
    np.testing.assert_allclose(found_V, DATA_V, atol=1e-10)


def test_one_iteration_of_sppo_hard():
    """No closed form: the least squares' f = (p_data - p_t) / (p_data + p_t) / (2 beta), bent to a distribution."""
    found_V = Game("sppo_hard", Settings(beta=0.7)).minimise()
    data_V, opponent_V, ratio_V = np.exp(DATA_V), np.exp(OPPONENT_V), found_V - OPPONENT_V
    multiplier = -ratio_V @ (data_V + opponent_V)
    residual_V = (data_V + opponent_V) * ratio_V - (data_V - opponent_V) / 1.4 + multiplier * np.exp(found_V)
    np.testing.assert_allclose(residual_V, 0, atol=1e-10)
    assert abs(multiplier) > 1e-2  # so that it does bend


@pytest.mark.parametrize(
    "name, corrected", [("cdpo", lambda a: (1 - 2 * E) * a + E), ("robust", lambda a: (a - E) / 0.8)]
)
def test_one_iteration_with_wrong_labels(name, corrected):
    """Where two responses are in play, sigmoid(margin) is the corrected share of pairs that the first of them wins."""
    nothing = -60.0  # log-prob of the other three
    data_V, opponent_V = (normalise(np.array([np.log(p), np.log(1 - p), *[nothing] * 3])) for p in (0.7, 0.4))
    found_V = Game(name, SETTINGS._replace(beta=2.0), opponent_V, data_V=data_V).minimise()
    wins, loses = 0.7 * 0.6, 0.3 * 0.4
    share = corrected(wins / (wins + loses))
    margin = 2.0 * ((found_V - opponent_V)[0] - (found_V - opponent_V)[1])
    assert margin == pytest.approx(np.log(share / (1 - share)), abs=1e-10)


def test_robust_has_no_minimum_where_the_data_is_surer_than_its_labels_can_be():
    """The first response wins 99% of its pairs with the second, more than 1 - e: the margin grows for ever."""
    nothing = -60.0
    data_V, opponent_V = (normalise(np.array([np.log(p), np.log(1 - p), *[nothing] * 3])) for p in (0.9, 0.1))
    game = Game("robust", SETTINGS._replace(beta=1.0), opponent_V, data_V=data_V)
    losses = [game.at(opponent_V + margin * np.array([1, 0, 0, 0, 0])) for margin in (0, 5, 50, 500)]
    assert (np.diff(losses) < 0).all() and losses[-1] < -10


def test_correlation_ends_at_a_point():
    """It is linear in theta: descent goes on for ever, to the response whose p_data - p_t is the largest."""
    game, difference_V = Game("correlation", Settings(beta=0.3)), np.exp(DATA_V) - np.exp(OPPONENT_V)
    for theta_V in (OPPONENT_V, DATA_V, FIRST_V):
        np.testing.assert_allclose(game.slope(theta_V), -0.3 * difference_V, atol=1e-14)
    late_V = OPPONENT_V + 1e4 * difference_V
    assert np.exp(normalise(late_V))[difference_V.argmax()] > 0.999 and game.at(late_V) < -10


def test_hinge_moves_log_ratios_by_multiples_of_1_over_beta():
    """The loss is piecewise linear, and its least value a linear program: f = k / beta with whole numbers k, up to a
    constant. It is no more than 1 less the total variation, what one step of 1 / beta where p_data > p_t gives."""
    beta, (data_V, opponent_V) = 0.7, (np.exp(DATA_V), np.exp(OPPONENT_V))
    weights = np.outer(data_V, opponent_V).ravel()
    i, j = (ids.ravel() for ids in np.meshgrid(range(V), range(V), indexing="ij"))
    slack = np.concatenate([beta * (np.eye(V)[j] - np.eye(V)[i]), -np.eye(V * V)], axis=1)  # 1 - beta (f_i - f_j) <= s
    bounds = [(None, None)] * V + [(0, None)] * V**2
    best = scipy.optimize.linprog(np.r_[np.zeros(V), weights], slack, -np.ones(V**2), bounds=bounds, method="highs-ds")
    steps_V = beta * (best.x[:V] - best.x[0])
    np.testing.assert_allclose(steps_V, steps_V.round(), atol=1e-9)
    game = Game("hinge", Settings(beta))
    assert game.at(OPPONENT_V + best.x[:V]) == pytest.approx(best.fun, abs=1e-12)
    assert best.fun <= 1 - np.maximum(data_V - opponent_V, 0).sum() + 1e-12
    assert game.at(OPPONENT_V + (data_V > opponent_V) / beta) == pytest.approx(
        1 - np.maximum(data_V - opponent_V, 0).sum(), abs=1e-12
    )


# ---- the fixed point


# What one iteration leaves of a small log(p_t / p_data), as a function of beta.
LEFT = {
    "logistic": lambda beta: 1 - 1 / beta,
    "exponential": lambda beta: 1 - 1 / (2 * beta),
    "cdpo": lambda beta: 1 - (1 - 2 * E) / beta,
    "robust": lambda beta: 1 - 1 / (beta * (1 - 2 * E)),
    "ipo": lambda beta: 1 - 1 / (4 * beta),
    "ipo_per_token": lambda beta: 1 - 1 / (4 * beta),  # of responses that are equally long
    "logistic_per_token": lambda beta: 1 - 1 / beta,
    "sppo_hard": lambda beta: 1 - 1 / (4 * beta),
    "space": lambda beta: 1 - 1 / beta,
}
BY_HALVES = {  # the beta with which half of it is left
    "logistic": 2.0,
    "exponential": 1.0,
    "cdpo": 2 * (1 - 2 * E),
    "robust": 2 / (1 - 2 * E),
    "ipo": 0.5,
    "ipo_per_token": 0.5,
    "logistic_per_token": 2.0,
    "sppo_hard": 0.5,
    "space": 2.0,
}


@pytest.mark.parametrize("name", sorted(LEFT))
def test_iterations_converge_to_the_data(name):
    settings, policy_V, errors = SETTINGS._replace(beta=BY_HALVES[name]), OPPONENT_V, []
    assert LEFT[name](settings.beta) == pytest.approx(0.5)
    for _ in range(12):
        policy_V = Game(name, settings, policy_V).minimise()
        errors.append(np.abs(policy_V - DATA_V).max())
    assert errors[-1] / errors[-2] == pytest.approx(0.5, abs=1e-3)
    assert errors[-1] < 1e-3


WITH_REFERENCE = sorted(name for name in OBJECTIVES if OBJECTIVES[name].reference)


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_at_the_data_nothing_does_better(name):
    """p_t = p_data: the start is a minimum, for responses of any lengths; and it is one nowhere else."""
    settings = SETTINGS._replace(beta=0.5)
    game = Game(name, settings, DATA_V, lengths_V=LENGTHS_V)
    np.testing.assert_allclose(game.slope(DATA_V), 0, atol=1e-13)
    others_NV = DATA_V + np.random.default_rng(0).normal(size=(20, V))
    losses_N = [game.at(theta_V) for theta_V in others_NV]
    assert min(losses_N) >= OBJECTIVES[name].at_start(settings) * (1 - 1e-6)
    assert np.abs(Game(name, settings, lengths_V=LENGTHS_V).slope(OPPONENT_V)).max() > 1e-3


def test_at_the_data_correlation_and_hinge_cannot_tell():
    """Any policy is as good with correlation, and with hinge any whose log-ratios differ by less than 1 / beta."""
    far_V, near_V = FIRST_V, DATA_V + 0.9 / 0.5 * np.array([1, 0, 0.5, 0.2, 1])
    assert Game("correlation", Settings(beta=0.5), DATA_V).at(far_V) == pytest.approx(1, abs=1e-12)
    assert Game("hinge", Settings(beta=0.5), DATA_V).at(near_V) == pytest.approx(1, abs=1e-12)
    assert Game("hinge", Settings(beta=0.5), DATA_V).at(DATA_V + 3 * (near_V - DATA_V)) > 1.01


# ---- T-SPIN, alpha-SPIN, the NLL term


@pytest.mark.parametrize("history_weight", [0.0, 0.7])
def test_t_spin_at_iteration_0(history_weight):
    """p_t = p_0: p is proportional to ( p_data / p_0 + b )^{1/beta}."""
    found_V = Game("tspin", Settings(beta=0.8, history_weight=history_weight), FIRST_V).minimise()
    expected_V = normalise(np.log(np.exp(DATA_V - FIRST_V) + history_weight) / 0.8)
    np.testing.assert_allclose(found_V, expected_V, atol=1e-10)


def test_t_spin_without_history_rests_at_a_flatter_distribution_than_the_data():
    """p proportional to p_data^{1/(1 + beta)}; an iteration multiplies the distance in logs by -1/beta, so that the
    paper's beta of 1 swings about it."""
    for beta in (1.0, 2.0):
        settings, rest_V = Settings(beta=beta), normalise(DATA_V / (1 + beta))
        np.testing.assert_allclose(Game("tspin", settings, rest_V).minimise(), rest_V, atol=1e-10)
        found_V = Game("tspin", settings).minimise()
        expected_V = normalise(rest_V - (OPPONENT_V - rest_V) / beta)
        np.testing.assert_allclose(found_V, expected_V, atol=1e-10)
    assert np.abs(Game("tspin", Settings(beta=1.0), DATA_V).slope(DATA_V)).max() > 1e-2


def test_t_spin_with_history_does_not_rest_at_the_data_either():
    """p_t = p_data: the next policy is proportional to ( p_data / (p_data + b p_0) )^{1/beta}."""
    found_V = Game("tspin", Settings(beta=0.8, history_weight=0.7), DATA_V).minimise()
    expected_V = normalise((DATA_V - np.logaddexp(DATA_V, FIRST_V + np.log(0.7))) / 0.8)
    np.testing.assert_allclose(found_V, expected_V, atol=1e-10)


def test_alpha_spin_rests_between_theta_0_and_the_data():
    """Reference m = p_t^alpha p_0^{1 - alpha}: one iteration gives m (p_data / p_t)^{1/beta}, and rests at
    p_0^w p_data^{1 - w} with w = beta (1 - alpha) / (1 + beta (1 - alpha))."""
    alpha, beta = 0.6, 2.0

    def iterate(policy_V):
        mixture_V = alpha * policy_V + (1 - alpha) * FIRST_V  # not normalised, as the score stage has it
        return Game("logistic", Settings(beta), policy_V, mixture_V).minimise(), mixture_V

    found_V, mixture_V = iterate(OPPONENT_V)
    np.testing.assert_allclose(found_V, normalise(mixture_V + (DATA_V - OPPONENT_V) / beta), atol=1e-10)
    weight = beta * (1 - alpha) / (1 + beta * (1 - alpha))
    rest_V = normalise(weight * FIRST_V + (1 - weight) * DATA_V)
    np.testing.assert_allclose(iterate(rest_V)[0], rest_V, atol=1e-10)
    assert np.abs(rest_V - DATA_V).max() > 0.1


def test_the_nll_term_rests_at_the_data_over_its_length():
    """Normalised by |y| it is least at p proportional to p_data / |y|: the data where responses are equally long."""
    settings, short_V = Settings(beta=2.0, nll_weight=0.5), normalise(DATA_V - np.log(LENGTHS_V))

    def slope_of_nll(theta_V, lengths_V):
        with_nll, without = (
            Game("logistic", one, lengths_V=lengths_V).slope(theta_V) for one in (settings, Settings(beta=2.0))
        )
        return with_nll - without

    np.testing.assert_allclose(slope_of_nll(short_V, LENGTHS_V), 0, atol=1e-14)
    np.testing.assert_allclose(slope_of_nll(DATA_V, ONES_V), 0, atol=1e-14)
    assert np.abs(slope_of_nll(DATA_V, LENGTHS_V)).max() > 1e-3
    np.testing.assert_allclose(Game("logistic", settings, DATA_V).minimise(), DATA_V, atol=1e-10)
    nearer_V, plain_V = Game("logistic", settings).minimise(), Game("logistic", Settings(beta=2.0)).minimise()
    assert np.exp(DATA_V) @ nearer_V > np.exp(DATA_V) @ plain_V  # and log p(y) falls less, or rises more
