"""The opponent's log-probs are the policy's own: the same program, the same rows, the same bits."""

import json
import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh

from spin_jax import checkpoints, models, sizing
from spin_jax.config import Config, replace
from spin_jax.data.chat_format import load_chat
from spin_jax.data.packing import Packing, Plan, pack_batch, plan_scoring, plan_training
from spin_jax.data.pairs import Pair
from spin_jax.devices import sharding
from spin_jax.devices.transfer import put
from spin_jax.errors import UserError
from spin_jax.evaluation import scoring
from spin_jax.evaluation.rewards import held_out_rewards, nats_per_token
from spin_jax.evaluation.score_files import Parts, delete_parts, read_scores, write_scores
from spin_jax.evaluation.scoring import check_finite, score, score_steps, scores_key
from spin_jax.models import execution
from spin_jax.training import programs
from spin_jax.training.schedule import batch_order

PAIRS = tiny.pairs(tiny.LENGTHS * 4)  # 32, of mixed lengths
BETA = 5.0  # of the paper's last iteration: it shows what rounding there is


def training_of(model: models.ModelConfig, mesh: Mesh, changes: dict, steps: int) -> programs.Training:
    changes = {"spin.beta": (BETA,), "model.compute_dtype": "bfloat16", "train.micro_batches": 1} | changes
    config = replace(Config(), changes)
    config = sizing.choose(config, model, list(mesh.devices.flat))
    compute = execution.make_compute(config.model, model, mesh)
    return programs.make_training(programs.spin_spec(config, model, compute, 0, steps))


def plan_of(pairs: list[Pair], size: int, epochs: int, packing: Packing) -> Plan:
    return plan_training(pairs, batch_order(len(pairs), size, 0, epochs * len(pairs) // size), packing)


def score_all(training, state, frozen, model, pairs, plan, mesh, parts, watch: Callable = lambda step: None):
    def make_batch(step: int):
        watch(step)
        return pack_batch(model, pairs, plan.batches[step], plan.shapes[step])

    placed = sharding.batch_sharding(mesh)
    settings = {"plan": plan, "make_batch": make_batch, "sharding": placed, "parts": parts, "name": "score"}
    return score_steps(training.step, state, frozen, **settings)


def first_metrics(training, state, frozen, model, pairs, plan, mesh, scores) -> list[dict]:
    """Of a training step on each batch, all from the same state: where the policy is its opponent."""
    found = []
    for rows, shape, logps in zip(plan.batches, plan.shapes, scores, strict=True):
        batch = pack_batch(model, pairs, rows, shape, reference_logps=logps).arrays
        fresh = jax.tree.map(jnp.copy, state)  # the step donates it
        _, metrics, _ = training.step(fresh, frozen, put(batch, sharding.batch_sharding(mesh)), False)
        found.append(jax.device_get(metrics))
    return found


def assert_level(metrics: dict) -> None:
    """Policy and opponent are the same function: no reward, to the bit."""
    assert metrics["rewards/real"] == metrics["rewards/generated"] == metrics["rewards/margin"] == 0
    assert metrics["rewards/accuracy"] == 0 and metrics["grad_norm"] > 0
    np.testing.assert_allclose(metrics["loss"], math.log(2), rtol=1e-6)


# ---- exactness


@pytest.mark.parametrize(
    "sizes, changes",
    [
        ((1, 1, 1), {}),
        ((2, 2, 2), {"model.remat": "none", "model.logits_chunk": 4, "train.micro_batches": 2}),
        ((1, 2, 1), {"lora.rank": 2}),
    ],
    ids=["one device", "three axes", "low-rank"],
)
def test_every_batch_of_every_epoch_starts_level_in_bfloat16(tmp_path, sizes, changes):
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    pairs = PAIRS[:16]
    plan = plan_of(pairs, 8, 3, Packing(8, 32, 32))  # one length, and so one program
    training = training_of(tiny.CONFIG, mesh, changes, len(plan.batches))
    params, frozen = jax.device_put(tiny.host_params(), models.param_shardings(mesh, tiny.CONFIG)), None
    if "lora.rank" in changes:
        frozen, params = params, programs.make_adapters(tiny.CONFIG, 2, mesh)(jax.random.key(0))
    state = training.init(params)
    before = jax.device_get(state)
    state, scores = score_all(training, state, frozen, tiny.CONFIG, pairs, plan, mesh, Parts(tmp_path, "key", 100))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)
    assert scores.shape == (6, 8, 2) and scores.max() < 0
    for metrics in first_metrics(training, state, frozen, tiny.CONFIG, pairs, plan, mesh, scores):
        assert_level(metrics)


def test_a_real_model_starts_level_in_bfloat16_where_other_rows_do_not(assets, smollm2, tmp_path):
    """SmolLM2 on real text. In other rows the same log-probs are off by more than half a nat a pair."""
    rows, chat = (
        json.loads((assets / "data" / "gpteacher" / "roleplay.json").read_text())[:8],
        load_chat(smollm2, "chat"),
    )

    def ids(question: dict, answer: dict) -> np.ndarray:
        return chat.real_response([{"role": "user", "content": question["instruction"]}], answer["response"])[:100]

    asked = [chat.generation_prompt([{"role": "user", "content": row["instruction"]}])[-30:] for row in rows]
    pairs = [Pair(i, 0, asked[i], (ids(rows[i], rows[i]), ids(rows[i], rows[i - 1])), (False, False)) for i in range(8)]
    mesh = sharding.one_device_mesh()
    model, params = checkpoints.load(smollm2, shardings=models.param_shardings(mesh, checkpoints.read_config(smollm2)))
    plan, packing = plan_of(pairs, 4, 2, Packing(1, 256, 1024)), Packing(1, 256, 512)
    training = training_of(model, mesh, {}, len(plan.batches))
    config = sizing.choose(Config(), model, list(mesh.devices.flat))
    compute = execution.make_compute(config.model, model, mesh)
    bfloat16 = scoring.make_scorer(model, models.Compute(**vars(compute) | {"dtype": jnp.bfloat16}))
    placed = sharding.batch_sharding(mesh)
    other = score(bfloat16, params, model, pairs, plan_scoring(pairs, 4, packing), sharding=placed, name="other rows")
    state, scores = score_all(training, training.init(params), None, model, pairs, plan, mesh, Parts(tmp_path, "", 99))
    for metrics in first_metrics(training, state, None, model, pairs, plan, mesh, scores):
        assert_level(metrics)
    order = [i for rows in plan.batches for row in rows for i in row]
    differences = scores.reshape(-1, 2) - other[order]
    assert 0.1 < np.std(differences[:, 0] - differences[:, 1]) < 3


# ---- a pass that is cut, and what is stored


class Cut(Exception):
    pass


def test_a_pass_that_was_cut_goes_on_where_it_was(tmp_path):
    mesh, plan = sharding.one_device_mesh(), plan_of(PAIRS, 4, 1, Packing(1, 8, 32))
    training = training_of(tiny.CONFIG, mesh, {}, 8)

    def run(directory, every: int, watch: Callable) -> np.ndarray:
        parts = Parts(directory, "key", every)
        state = training.init(tiny.params())
        return score_all(training, state, None, tiny.CONFIG, PAIRS, plan, mesh, parts, watch)[1]

    whole = run(tmp_path / "whole", 100, lambda step: None)

    def cut(step: int) -> None:
        if step == 6:
            raise Cut

    with pytest.raises(Cut):
        run(tmp_path / "cut", 2, cut)
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {"part-000000.npz", "part-000002.npz"}
    asked = []
    np.testing.assert_array_equal(run(tmp_path / "cut", 3, asked.append), whole)
    assert asked == [4, 5, 6, 7]
    (tmp_path / "cut" / "part-000002.npz").write_bytes(b"half of a fi")
    asked.clear()
    np.testing.assert_array_equal(run(tmp_path / "cut", 100, asked.append), whole)
    assert asked == [2, 3, 4, 5, 6, 7]


def test_an_evaluation_that_was_cut_goes_on_where_it_was(tmp_path):
    """Its batches hold as many pairs as fit, one more and the next fewer."""
    mesh = sharding.one_device_mesh()
    plan, compute = plan_scoring(PAIRS, 6, Packing(1, 8, 64)), models.Compute(mesh=mesh)
    assert len({sum(map(len, rows)) for rows in plan.batches}) > 1 and len(plan.batches) > 3
    scorer, calls = scoring.make_scorer(tiny.CONFIG, compute), []

    def run(parts, stop_at=None):
        def logprobs(*arguments):
            if len(calls) == stop_at:
                raise Cut
            calls.append(None)
            return scorer(*arguments)

        placed = sharding.batch_sharding(mesh)
        return score(logprobs, tiny.params(), tiny.CONFIG, PAIRS, plan, sharding=placed, name="", parts=parts)

    whole = run(None)
    calls.clear()
    with pytest.raises(Cut):
        run(Parts(tmp_path, "key", 1, "evaluation-part"), stop_at=2)
    calls.clear()
    np.testing.assert_array_equal(run(Parts(tmp_path, "key", 1, "evaluation-part")), whole)
    assert len(calls) == len(plan.batches) - 2
    delete_parts(tmp_path, "evaluation-part")
    assert not list(tmp_path.iterdir())


def test_scores_are_read_for_what_they_were_made_of(tmp_path, caplog):
    plan, logps = plan_of(PAIRS, 8, 1, Packing(1, 8, 32)), np.full((4, 8, 2), -1.5, np.float32)
    compute = models.Compute(mesh=sharding.one_device_mesh())
    key, path = scores_key(PAIRS, plan, compute), tmp_path / "steps.npz"
    scored = [PAIRS[i] for rows in plan.batches for row in rows for i in row]
    (tmp_path / "part-000000.npz").write_bytes(b"")
    write_scores(path, key, logps, scored)
    assert [file.name for file in tmp_path.iterdir()] == ["steps.npz"]
    np.testing.assert_array_equal(read_scores(path, key), logps)
    with np.load(path) as stored:
        assert stored["rows"].flatten().tolist() == [pair.row for pair in scored]
    others = {
        "pairs": scores_key(PAIRS[::-1], plan, compute),
        "batches": scores_key(PAIRS, plan_of(PAIRS, 4, 1, Packing(1, 8, 32)), compute),
        "dtype": scores_key(PAIRS, plan, models.Compute(mesh=compute.mesh, dtype=jnp.bfloat16)),
        "mesh": scores_key(PAIRS, plan, models.Compute(mesh=sharding.make_mesh())),
        "parts": scores_key(PAIRS, plan, compute, micro_batches=2),
        "model": scores_key(PAIRS, plan, compute, model={"weights": "others"}),
    }
    assert len({key, *others.values()}) == 7
    with caplog.at_level(logging.WARNING):
        assert read_scores(path, others["mesh"]) is None
        path.write_bytes(path.read_bytes()[:-40])
        assert read_scores(path, key) is None
    assert "scored anew" in caplog.messages[0] and "damaged" in caplog.messages[1]
    assert read_scores(tmp_path / "nothing.npz", key) is None


def test_scores_that_are_not_finite_name_their_rows():
    logps = np.array([(-1.0, -2.0), (np.nan, -1.0), (-1.0, -np.inf)], np.float32)
    with pytest.raises(
        UserError, match=r"2 pair\(s\) are not finite \(rows 5, 9\).*--config.model.compute_dtype=float32"
    ):
        check_finite(logps, np.array([7, 9, 5]))


# ---- measures


def test_held_out_measures():
    policy, opponent = np.array([(-1.0, -9.0), (-4.0, -4.0)]), np.array([(-2.0, -5.0), (-4.0, -5.0)])
    assert held_out_rewards(policy, opponent, 2.0) == {
        "held_out/rewards/accuracy": 0.5,
        "held_out/rewards/margin": 4.0,
        "held_out/rewards/real": 1.0,
        "held_out/rewards/generated": -3.0,
    }
    pairs = tiny.pairs(tiny.LENGTHS[:2])  # 4 and 1 tokens
    assert nats_per_token(pairs, policy) == 1.0
