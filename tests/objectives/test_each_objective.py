"""Each objective against numbers: trl's, those of its formula worked out by hand, and what it is at the start."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spin_jax.config import SpinConfig
from spin_jax.errors import UserError
from spin_jax.objectives import OBJECTIVES
from spin_jax.objectives.interface import Settings, check_objective

TRL = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "trl_losses.json").read_text())
LOG2, BETA, E = math.log(2), 0.2, 0.1
SETTINGS = Settings(beta=BETA, label_smoothing=E, noise_ratio=3.0, history_weight=0.5)
# At beta 0.2, smoothing 0.1 and noise ratio 3: the loss at the start, and how fast it falls there with the log-probs of
# the real and of the generated response.
AT_START = {
    "logistic": (LOG2, BETA / 2, -BETA / 2),
    "hinge": (1.0, BETA, -BETA),
    "exponential": (1.0, BETA, -BETA),
    "correlation": (1.0, BETA, -BETA),
    "cdpo": (LOG2, BETA * 0.4, -BETA * 0.4),
    "robust": (LOG2, BETA * 0.625, -BETA * 0.625),
    "ipo": (6.25, 5.0, -5.0),  # 1 / (4 beta^2), and 1 / beta
    "ipo_per_token": (6.25, 5.0 / 4, -5.0 / 2),
    "logistic_per_token": (LOG2, BETA / 2 / 4, -BETA / 2 / 2),
    "sppo_hard": (12.5, 5.0, -5.0),  # 1 / (2 beta^2)
    "space": (math.log(4) + 3 * math.log(4 / 3), BETA * 0.75, -BETA * 0.75),  # mu / (1 + mu)
}
LENGTHS = (4, 2)  # tokens of the real and the generated response


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def of_pair(name: str, settings: Settings, policy, reference, lengths=LENGTHS) -> jax.Array:
    """The loss of one pair, through what training calls."""
    policy_BPY, reference_BPY, lengths_BPY = (jnp.asarray(x)[None, None] for x in (policy, reference, lengths))
    return OBJECTIVES[name].of_pairs(policy_BPY, reference_BPY, lengths_BPY, settings)[0][0, 0]


@pytest.mark.parametrize("one", TRL["losses"], ids=lambda one: f"{one['loss']}-{one['settings']}")
def test_the_values_are_trls(one):
    settings = Settings(**one["settings"])
    pairs = zip(TRL["policy"], TRL["reference"], TRL["lengths"], strict=True)
    found = [of_pair(one["loss"], settings, *pair) for pair in pairs]
    np.testing.assert_allclose(found, one["values"], rtol=1e-12, atol=1e-12)
    assert np.ptp(found) > 1e-3  # the pairs differ


@pytest.mark.parametrize("name", sorted(AT_START))
def test_the_loss_and_its_slopes_at_the_start(name):
    value, *slopes = AT_START[name]
    logps = jnp.array([-7.0, -3.0])
    assert OBJECTIVES[name].at_start(SETTINGS) == pytest.approx(value, rel=1e-7)
    found, (real, generated) = jax.value_and_grad(lambda x: of_pair(name, SETTINGS, x, logps))(logps)
    assert float(found) == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose((-real, -generated), slopes, rtol=1e-12)


def test_every_objective_with_a_reference_has_its_value_at_the_start_here():
    assert {name for name in OBJECTIVES if OBJECTIVES[name].reference} == set(AT_START)
    assert [name for name in OBJECTIVES if OBJECTIVES[name].at_start(SETTINGS) is None] == ["tspin", "sft", "ssd"]


# Policy (-2, -9) and reference (-5, -8): log-ratios 3 and -1, h = 4, the margin 0.8; rewards 0.6 and -0.2.
BY_HAND = {
    "logistic": math.log(1 + math.exp(-0.8)),
    "hinge": 0.2,
    "exponential": math.exp(-0.8),
    "correlation": 0.2,
    "cdpo": 0.9 * math.log(1 + math.exp(-0.8)) + 0.1 * math.log(1 + math.exp(0.8)),
    "robust": math.log(1 + math.exp(-0.8)) - 0.8 * 0.125,
    "ipo": (4 - 2.5) ** 2,
    "ipo_per_token": (3 / 4 + 1 / 2 - 2.5) ** 2,
    "logistic_per_token": math.log(1 + math.exp(-0.2 * (3 / 4 + 1 / 2))),
    "sppo_hard": (3 - 2.5) ** 2 + (-1 + 2.5) ** 2,
    "space": math.log(1 + 3 * math.exp(-0.6)) + 3 * math.log(1 + math.exp(-0.2) / 3),
}


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_one_pair_by_hand(name):
    value = of_pair(name, SETTINGS, (-2.0, -9.0), (-5.0, -8.0))
    assert float(value) == pytest.approx(BY_HAND[name], rel=1e-12)
    with_nll = of_pair(name, SETTINGS._replace(nll_weight=0.3), (-2.0, -9.0), (-5.0, -8.0))
    assert float(with_nll) == pytest.approx(BY_HAND[name] + 0.3 * 2 / 4, rel=1e-12)


def test_t_spin_by_hand():
    """Rewards of real -2, generated -9 and proto -4 are -0.4, -1.8 and -0.8: margins 1.4 and -1.0."""
    value = of_pair("tspin", SETTINGS, (-2.0, -9.0, -4.0), (0.0, 0.0, 0.0), (4, 2, 3))
    assert float(value) == pytest.approx(math.log1p(math.exp(-1.4)) + 0.5 * math.log1p(math.exp(1.0)), rel=1e-12)


def test_metrics_hold_the_rewards_of_whole_responses_and_both_addends():
    arrays = (jnp.array([[[-2.0, -9.0]]]), jnp.array([[[-5.0, -8.0]]]), jnp.array([[LENGTHS]]))
    for name in AT_START:
        _, metrics = OBJECTIVES[name].of_pairs(*arrays, SETTINGS._replace(nll_weight=0.3))
        found = {key: float(value[0, 0]) for key, value in metrics.items()}
        rewards = {"rewards/real": 0.6, "rewards/generated": -0.2, "rewards/margin": 0.8, "rewards/accuracy": 1.0}
        addends = {"loss/objective": BY_HAND[name], "loss/nll": 0.5}
        assert found == pytest.approx(rewards | addends | {"logps/real": -2.0, "logps/generated": -9.0}), name


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_place_without_a_pair_is_finite_and_so_is_its_gradient(name):
    """Its weight is 0, and 0 times infinity would be NaN."""
    objective = OBJECTIVES[name]
    zeros = jnp.zeros((1, 1, len(objective.responses)))

    def loss(policy_BPY):
        settings = SETTINGS._replace(nll_weight=0.3 * (name not in ("sft", "ssd")))
        return jnp.sum(objective.of_pairs(policy_BPY, zeros, zeros.astype(jnp.int32), settings)[0])

    value, gradient = jax.value_and_grad(loss)(zeros)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"label_smoothing": 0.1},
            r"label_smoothing=0.1 is not read by --config.spin.loss=logistic: leave it at .*=0.0",
        ),
        ({"loss": "ipo", "noise_ratio": 2.0}, "noise_ratio=2.0 is not read by --config.spin.loss=ipo"),
        ({"loss": "space", "history_weight": (0.3,)}, "history_weight=.* is not read by --config.spin.loss=space"),
        ({"loss": "sft", "nll_weight": 1.0}, "nll_weight=1.0 is not read by --config.spin.loss=sft"),
        ({"loss": "tspin", "opponent_share": 0.5}, "opponent_share=0.5 is not read by --config.spin.loss=tspin"),
        ({"loss": "cdpo"}, "loss=cdpo is logistic without label smoothing: write --config.spin.label_smoothing=0.1"),
        (
            {"opponent_share": 0.5, "opponent": "live"},
            "needs log-probs of two models.*write --config.spin.opponent=stored",
        ),
    ],
)
def test_settings_that_an_objective_does_not_read_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        check_objective(SpinConfig(**fields))


def test_settings_that_it_reads_are_taken():
    for fields in (
        {"loss": "tspin", "history_weight": (1.0,), "nll_weight": 0.1, "beta": (1.0,)},
        {"loss": "robust", "label_smoothing": 0.2, "opponent_share": 0.5},
        {"loss": "space", "noise_ratio": 4.0, "opponent": "live"},
        {"loss": "sft"},
    ):
        check_objective(SpinConfig(**fields))
    assert Settings.at(SpinConfig(beta=(0.1, 5.0)), 3) == Settings(beta=5.0, history_weight=0.1)
