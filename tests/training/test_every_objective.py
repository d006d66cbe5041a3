"""Training steps with each objective, through the real model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from spin_jax.data.packing import pack_batch, plan_training
from spin_jax.data.pairs import ALL_RESPONSES, choose
from spin_jax.models import Execution
from spin_jax.objectives import OBJECTIVES
from spin_jax.objectives.interface import Settings, batch_loss
from spin_jax.training.optimizer import make_optimizer
from spin_jax.training.train_step import init_state, make_step

COMPUTE = Execution(remat="none")
SETTINGS = Settings(beta=0.3, label_smoothing=0.1, noise_ratio=2.0, history_weight=0.5)


def with_proto(pairs: list) -> list:
    """Pairs of three responses, the third another one."""
    protos = [pair.responses[1][::-1] for pair in pairs]
    return [
        dataclasses.replace(pair, responses=(*pair.responses, proto), truncated=(*pair.truncated, False))
        for pair, proto in zip(pairs, protos, strict=True)
    ]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_starts_at_its_own_value_and_learns(name):
    """The first loss is that of `at_start`, NLL apart; and a few steps on one batch lower it."""
    objective = OBJECTIVES[name]
    pairs = [choose(pair, objective.responses) for pair in with_proto(tiny.pairs())]
    plan = plan_training(pairs, np.arange(len(pairs))[None], tiny.PACKING)
    laid = {"responses": objective.responses, "mean_over": objective.mean_over}
    batch = pack_batch(tiny.CONFIG, pairs, plan.batches[0], plan.shapes[0], **laid).arrays
    settings = SETTINGS._replace(nll_weight=0.0 if name in ("sft", "ssd") else 0.1)
    optimizer = make_optimizer("rmsprop", optax.constant_schedule(1e-4), 1.0, 0.0)
    loss = batch_loss(objective, settings, tiny.CONFIG, COMPUTE)
    step = jax.jit(make_step(loss, optimizer, micro_batches=1), donate_argnums=0)

    state, _, logps = step(init_state(tiny.params(), optimizer), None, batch, jnp.bool_(True))
    logps, losses = np.asarray(logps), []
    if objective.reference:  # NaN otherwise, which nobody reads
        batch = batch._replace(reference_logps_BPY=logps)
    for _ in range(4):
        state, metrics, _ = step(state, None, batch, jnp.bool_(False))
        assert metrics["healthy"]
        losses.append({key: float(value) for key, value in metrics.items()})
    first, last = losses[0], losses[-1]
    assert last["loss"] < first["loss"] - 1e-4
    if name in ("sft", "ssd"):
        return
    assert first["loss"] == pytest.approx(first["loss/objective"] + 0.1 * first["loss/nll"], rel=1e-6)
    per_token = [-logps[place][0] / len(pair.responses[0]) for pair, place in _placed(pairs, plan)]
    assert first["loss/nll"] == pytest.approx(float(np.mean(per_token)), rel=1e-5)
    if objective.reference:
        assert first["loss/objective"] == pytest.approx(objective.at_start(settings), rel=1e-6)
        assert first["rewards/margin"] == first["rewards/accuracy"] == 0
    assert last["rewards/margin"] > first["rewards/margin"]
    assert {f"rewards/{response}" for response in objective.responses} <= set(first)
    assert {f"logps/{response}" for response in objective.responses} <= set(first)


def _placed(pairs: list, plan) -> list:
    """Each pair with its (row, place) in the batch."""
    rows = plan.batches[0]
    return [(pairs[i], (row, place)) for row, numbers in enumerate(rows) for place, i in enumerate(numbers)]


def test_the_responses_are_those_that_a_pair_can_have():
    for name in OBJECTIVES:
        assert set(OBJECTIVES[name].responses) <= set(ALL_RESPONSES)
