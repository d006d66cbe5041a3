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
from spin_jax.config import Config, GenerateConfig, TrainConfig, replace
from spin_jax.data.chat_format import load_chat
from spin_jax.data.packing import Packing, Plan, pack_batch, plan_training
from spin_jax.data.pairs import Pair
from spin_jax.devices import sharding
from spin_jax.devices.transfer import to_devices
from spin_jax.errors import UserError
from spin_jax.evaluation import scoring
from spin_jax.evaluation.rewards import held_out_rewards, nats_per_token, pair_rewards
from spin_jax.evaluation.score_files import Parts, delete_parts, read_scores, write_scores
from spin_jax.evaluation.scoring import Scorer, StepProgram, check_finite, score_batches, scores_key
from spin_jax.generation.engine import Engine
from spin_jax.models.execution import make_execution
from spin_jax.training import programs
from spin_jax.training.schedule import batch_order

PAIRS = tiny.pairs(tiny.LENGTHS * 4)  # 32, of mixed lengths
BETA = 5.0  # of the paper's last iteration: it shows what rounding there is


def training_of(model: models.ModelConfig, mesh: Mesh, changes: dict, steps: int) -> programs.Training:
    changes = {"spin.beta": (BETA,), "model.compute_dtype": "bfloat16", "train.micro_batches": 1} | changes
    config = replace(Config(), changes)
    config = sizing.choose(config, model, list(mesh.devices.flat))
    execution = make_execution(config.model, model, mesh)
    return programs.make_training(programs.spin_spec(config, model, execution, 0, steps))


def plan_of(pairs: list[Pair], size: int, epochs: int, packing: Packing) -> Plan:
    return plan_training(pairs, batch_order(len(pairs), size, 0, epochs * len(pairs) // size), packing)


def score_all(training, state, frozen, model, pairs, plan, parts, watch: Callable = lambda step: None):
    def make_batch(step: int):
        watch(step)
        return pack_batch(model, pairs, plan.batches[step], plan.shapes[step])

    program = StepProgram(training.step, state, frozen)
    scores = np.stack(score_batches(program, make_batch, plan, "score", parts))
    return program.state, scores


def first_metrics(training, state, frozen, model, pairs, plan, mesh, scores) -> list[dict]:
    """Of a training step on each batch, all from the same state: where the policy is its opponent."""
    found = []
    for rows, shape, logps in zip(plan.batches, plan.shapes, scores, strict=True):
        batch = pack_batch(model, pairs, rows, shape, reference_logps=logps).arrays
        fresh = jax.tree.map(jnp.copy, state)  # the step donates it
        _, metrics, _ = training.step(fresh, frozen, to_devices(batch, sharding.batch_sharding(mesh)), False)
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
    state, frozen = training.begin(jax.device_put(tiny.host_params(), models.param_shardings(mesh, tiny.CONFIG)), 0)
    assert (frozen is not None) == ("lora.rank" in changes)
    before = jax.device_get(state)
    state, scores = score_all(training, state, frozen, tiny.CONFIG, pairs, plan, Parts(tmp_path, "key", 100))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)
    assert scores.shape == (6, 8, 2) and scores.max() < 0
    for metrics in first_metrics(training, state, frozen, tiny.CONFIG, pairs, plan, mesh, scores):
        assert_level(metrics)


def test_a_real_model_starts_level_in_bfloat16_where_other_rows_do_not(assets, smollm2, tmp_path):
    """SmolLM2 on real text. In other rows the same log-probs are off by more than half a nat a pair."""
    rows, chat = (
        json.loads((assets / "data" / "gpteacher" / "roleplay.json").read_text())[:4],
        load_chat(smollm2, "chat"),
    )

    def ids(question: dict, answer: dict) -> np.ndarray:
        return chat.real_response([{"role": "user", "content": question["instruction"]}], answer["response"])[:60]

    asked = [chat.generation_prompt([{"role": "user", "content": row["instruction"]}])[-30:] for row in rows]
    pairs = [Pair(i, 0, asked[i], (ids(rows[i], rows[i]), ids(rows[i], rows[i - 1])), (False, False)) for i in range(4)]
    mesh = sharding.one_device_mesh()
    model, params = checkpoints.load(smollm2, shardings=models.param_shardings(mesh, checkpoints.read_config(smollm2)))
    plan = plan_of(pairs, 2, 1, Packing(1, 64, 512))
    training = training_of(model, mesh, {}, len(plan.batches))
    train = {"train.batch_size": 4, "train.micro_batches": 1, "train.row_length": 256, "train.length_multiple": 64}
    config = replace(Config(), {"model.compute_dtype": "bfloat16"} | train)
    config = sizing.choose(config, model, list(mesh.devices.flat))
    other = Scorer(model, config.train, make_execution(config.model, model, mesh)).score(params, pairs)
    state, scores = score_all(training, training.init(params), None, model, pairs, plan, Parts(tmp_path, "", 99))
    for metrics in first_metrics(training, state, None, model, pairs, plan, mesh, scores):
        assert_level(metrics)
    order = [i for rows in plan.batches for row in rows for i in row]
    differences = scores.reshape(-1, 2) - other[order]
    assert 0.1 < np.std(differences[:, 0] - differences[:, 1]) < 3


# ---- any prompts and responses


def scorer_of(mesh: Mesh, execution: models.Execution | None = None, **train) -> Scorer:
    sizes = {"batch_size": 8, "micro_batches": 1, "row_length": 64, "length_multiple": 8} | train
    return Scorer(tiny.CONFIG, TrainConfig(**sizes), execution or models.Execution(mesh=mesh))


def texts() -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Nine prompts, and up to four responses to each: a single token, and all lengths mixed."""
    rng, lengths = np.random.default_rng(1), ((4, 9), (1,), (2, 7, 1, 5), (), (3, 3, 8), (6, 1), (9,), (2,), (5, 4))
    prompts = [tiny.tokens(rng, length) for length in (3, 1, 9, 4, 12, 2, 7, 5, 6)]
    return prompts, [[tiny.tokens(rng, length) for length in of_prompt] for of_prompt in lengths]


def alone(prompt_T: np.ndarray, response_T: np.ndarray) -> np.ndarray:
    """log p of each token, from a row of its own with all logits."""
    row_T = np.concatenate([prompt_T, response_T])
    hidden_1TD, _ = models.forward(tiny.CONFIG, tiny.host_params(), row_T[None])
    logps_TV = jax.nn.log_softmax(models.unembed(tiny.CONFIG, tiny.host_params(), hidden_1TD)[0])
    return np.asarray(logps_TV)[np.arange(len(prompt_T) - 1, len(row_T) - 1), response_T]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 1), (2, 2, 2), (4, 1, 2)])
@pytest.mark.parametrize("chunk", [0, 4])
def test_logprobs_are_those_of_a_row_for_each_response(sizes, chunk):
    """In nats and token by token, for any number of responses, on every mesh, wherever the params lie."""
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    scorer = scorer_of(mesh, models.Execution(mesh=mesh, logits_chunk=chunk))
    prompts, responses = texts()
    expected = [[alone(x, y) for y in answers] for x, answers in zip(prompts, responses, strict=True)]
    elsewhere = jax.device_put(tiny.host_params(), jax.devices()[-1])
    for params in (tiny.host_params(), elsewhere):
        logps = scorer.logprobs(params, prompts, responses)
        assert logps.shape == (9, 4) and logps.dtype == np.float32
        assert np.isfinite(logps).sum(axis=1).tolist() == [len(answers) for answers in responses]
        for found, wanted in zip(logps, expected, strict=True):
            np.testing.assert_allclose(found[: len(wanted)], [one.sum() for one in wanted], atol=1e-4)
    by_token = scorer.token_logprobs(tiny.host_params(), prompts, responses)
    assert list(map(len, by_token)) == list(map(len, responses))
    for found, wanted in zip(sum(by_token, []), sum(expected, []), strict=True):
        np.testing.assert_allclose(found, wanted, atol=5e-5)


def test_sampled_logprobs_are_the_scorers():
    """What a response was drawn with is what scoring says of it."""
    mesh, sizes = sharding.one_device_mesh(), {"batch_size": 8, "prefill_batch_size": 8, "prompt_bucket": 16}
    settings = GenerateConfig(max_new_tokens=9, responses=3, **sizes)
    prompts, params = texts()[0], tiny.host_params()
    drawn = Engine(tiny.CONFIG, settings, models.Execution(mesh=mesh), stop_ids=(3, 5, 7, 9)).generate(params, prompts)
    responses = [[one.tokens for one in drawn if one.row == row] for row in range(len(prompts))]
    by_token = scorer_of(mesh).token_logprobs(params, prompts, responses)
    for one, found in zip(drawn, sum(by_token, []), strict=True):
        np.testing.assert_allclose(found, one.logprobs, atol=5e-5)


def test_the_scorer_and_the_scoring_of_pairs_are_one_program():
    scorer, pairs = scorer_of(sharding.one_device_mesh()), PAIRS[:8]
    logps = scorer.logprobs(tiny.host_params(), [pair.prompt for pair in pairs], [pair.responses for pair in pairs])
    np.testing.assert_array_equal(logps, scorer.score(tiny.params(), pairs))
    assert scorer.logprobs(tiny.host_params(), [], []).shape == (0, 0)
    assert scorer.token_logprobs(tiny.host_params(), [[1]], [[]]) == [[]]


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        ([[1], [2]], [[[3]]], "2 prompts, 1 lists of responses: give a list for each prompt"),
        ([[1], []], [[[3]], [[4]]], "prompt 1 must be a list of token ids, one at least"),
        ([[1]], [[[3], []]], "response 1 to prompt 0 must be a list of token ids, one at least"),
        ([[1]], [[3, 4]], "response 0 to prompt 0 must be a list of token ids, one at least"),
        ([[1]], [[[3, 64]]], "response 0 to prompt 0 has token ids 3 to 64: the model's are 0 to 63"),
    ],
)
def test_what_cannot_be_scored_is_refused(prompts, responses, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        scorer_of(sharding.one_device_mesh()).logprobs(tiny.host_params(), prompts, responses)


# ---- a pass that is cut, and what is stored


class Cut(Exception):
    pass


def test_a_pass_that_was_cut_goes_on_where_it_was(tmp_path):
    mesh, plan = sharding.one_device_mesh(), plan_of(PAIRS, 4, 1, Packing(1, 8, 32))
    training = training_of(tiny.CONFIG, mesh, {}, 8)

    def run(directory, every: int, watch: Callable) -> np.ndarray:
        parts = Parts(directory, "key", every)
        state = training.init(tiny.params())
        return score_all(training, state, None, tiny.CONFIG, PAIRS, plan, parts, watch)[1]

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


def test_an_evaluation_that_was_cut_goes_on_where_it_was(tmp_path, monkeypatch):
    """Its batches hold as many pairs as fit, one more and the next fewer."""
    scorer = scorer_of(sharding.one_device_mesh(), batch_size=6)
    batches = scorer.plan(PAIRS).batches
    assert len({sum(map(len, rows)) for rows in batches}) > 1 and len(batches) > 3
    calls, pack = [], scoring.pack_batch

    def run(stop_at=None, parts=True):
        def watched(*arguments):
            if len(calls) == stop_at:
                raise Cut
            calls.append(None)
            return pack(*arguments)

        monkeypatch.setattr(scoring, "pack_batch", watched)
        calls.clear()
        return scorer.score(tiny.host_params(), PAIRS, parts=parts and Parts(tmp_path, "key", 1, "evaluation-part"))

    whole = run(parts=None)
    with pytest.raises(Cut):
        run(stop_at=3)
    np.testing.assert_array_equal(run(), whole)
    assert len(calls) == len(batches) - 2  # the third was computed, and not yet read
    delete_parts(tmp_path, "evaluation-part")
    assert not list(tmp_path.iterdir())


def test_scores_are_read_for_what_they_were_made_of(tmp_path, caplog):
    plan, logps = plan_of(PAIRS, 8, 1, Packing(1, 8, 32)), np.full((4, 8, 2), -1.5, np.float32)
    execution = models.Execution(mesh=sharding.one_device_mesh())
    key, path = scores_key(PAIRS, plan, execution), tmp_path / "steps.npz"
    scored = [PAIRS[i] for rows in plan.batches for row in rows for i in row]
    (tmp_path / "part-000000.npz").write_bytes(b"")
    write_scores(path, key, logps, scored)
    assert [file.name for file in tmp_path.iterdir()] == ["steps.npz"]
    np.testing.assert_array_equal(read_scores(path, key), logps)
    with np.load(path) as stored:
        assert stored["rows"].flatten().tolist() == [pair.row for pair in scored]
    others = {
        "pairs": scores_key(PAIRS[::-1], plan, execution),
        "batches": scores_key(PAIRS, plan_of(PAIRS, 4, 1, Packing(1, 8, 32)), execution),
        "dtype": scores_key(PAIRS, plan, models.Execution(mesh=execution.mesh, dtype=jnp.bfloat16)),
        "mesh": scores_key(PAIRS, plan, models.Execution(mesh=sharding.make_mesh())),
        "parts": scores_key(PAIRS, plan, execution, micro_batches=2),
        "model": scores_key(PAIRS, plan, execution, model={"weights": "others"}),
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
    assert held_out_rewards(pair_rewards(policy, opponent, 2.0)) == {
        "held_out/rewards/accuracy": 0.5,
        "held_out/rewards/margin": 4.0,
        "held_out/rewards/real": 1.0,
        "held_out/rewards/generated": -3.0,
    }
    pairs = tiny.pairs(tiny.LENGTHS[:2])  # 4 and 1 tokens
    assert nats_per_token(pairs, policy) == 1.0
