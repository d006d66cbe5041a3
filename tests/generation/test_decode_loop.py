"""The decode loop: against transformers and against the model without a cache, and row by row in whatever company."""

import dataclasses
import json
import logging
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath
from test_sampling import CHI_SQUARE, chi_square

from spin_jax import checkpoints, models
from spin_jax.config import GenerateConfig
from spin_jax.devices import sharding
from spin_jax.errors import UserError
from spin_jax.generation import stop_strings
from spin_jax.generation.engine import Engine, Progress, prefill_width, slot_counts
from spin_jax.generation.response_files import Response
from spin_jax.models import Execution

SEED = 42
CAP = 12  # new tokens
PROMPT_LENGTHS = (1, 8, 3, 5, 2, 7, 4, 6, 40, 3, 1, 70, 2, 9)  # of rows 10, 11, ...
STOP_IDS = (3, 5, 7, 9, 11, 13)
ONE_DEVICE = Execution(mesh=sharding.one_device_mesh())


def settings(**changes) -> GenerateConfig:
    """Four slots, and three prompts prefilled at a time."""
    sizes = {"batch_size": 4, "prefill_batch_size": 3, "tail_batch_size": 2, "prompt_bucket": 32}
    return GenerateConfig(**{"max_new_tokens": CAP} | sizes | changes)


def prompts(lengths: tuple[int, ...] = PROMPT_LENGTHS) -> dict[int, np.ndarray]:
    """Indices are not places."""
    rng = np.random.default_rng(3)
    return {10 + i: tiny.tokens(rng, length) for i, length in enumerate(lengths)}


def backwards(asked: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    return dict(reversed(asked.items()))


def draw(
    asked: dict[int, np.ndarray] | None = None,
    *,
    stop_ids: tuple[int, ...] = STOP_IDS,
    stops_AV: np.ndarray | None = None,
    params: dict | None = None,
    seed: int = SEED,
    iteration: int = 2,
    directory: epath.Path | None = None,
    progress: Progress | None = None,
    **changes,
) -> list[Response]:
    by = Engine(tiny.CONFIG, settings(**changes), ONE_DEVICE, stop_ids, stops_AV)
    called = {"seed": seed, "iteration": iteration, "directory": directory, "progress": progress}
    return by.generate(params or tiny.host_params(), prompts() if asked is None else asked, **called)


def as_lists(responses: list[Response]) -> list[tuple]:
    return [(one.row, one.number, one.tokens.tolist(), one.truncated) for one in responses]


def logits_of(params: dict, tokens_T: np.ndarray, config: models.ModelConfig = tiny.CONFIG) -> np.ndarray:
    """Of every token's successor, without a cache."""
    hidden_1TD, _ = models.forward(config, params, jnp.asarray(tokens_T)[None])
    return np.asarray(models.unembed(config, params, hidden_1TD[0]))


# ---- greedy


def test_greedy_takes_the_best_token_of_the_model_without_a_cache():
    asked = prompts()
    for response in draw(asked, temperature=0.0):
        row_T = np.concatenate([asked[response.row], response.tokens])
        best_T = logits_of(tiny.host_params(), row_T).argmax(axis=-1)
        np.testing.assert_array_equal(response.tokens, best_T[len(asked[response.row]) - 1 : -1])


def test_greedy_equals_transformers_on_smollm2(smollm2):
    """16 chat prompts of 32 to 103 tokens, 32 new tokens each, f32: part of `golden/make_sampling_golden.py`."""
    golden = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "greedy.json").read_text())
    config, params = checkpoints.load(smollm2)
    chosen = settings(temperature=0.0, max_new_tokens=32, batch_size=8, prompt_bucket=64)
    by = Engine(config, chosen, ONE_DEVICE, tuple(golden["stop_ids"]))
    answers = by.generate(params, golden["prompts"][::2], seed=SEED)
    for answer, tokens in zip(answers, golden["responses"][::2], strict=True):
        assert answer.tokens.tolist() == tokens[:32], f"prompt {answer.row}"
        assert answer.truncated == (answer.tokens[-1] not in golden["stop_ids"])
    assert 0 < sum(answer.truncated for answer in answers) < 16, "both kinds of ending are compared"


# ---- a row is answered the same in any company


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "sizes",
    [
        {"batch_size": 1},
        {"batch_size": 2, "prefill_batch_size": 1},
        {"batch_size": 3},
        {"batch_size": 8, "prefill_batch_size": 8},
        {"batch_size": 8, "tail_batch_size": 8},
        {"batch_size": 16, "prompt_bucket": 128},
    ],
)
def test_a_response_depends_on_its_row_alone(sizes, temperature):
    """Whatever the slots, the queue, how many are left at the end, the width of prompts and their order."""
    usual = draw(temperature=temperature)
    others = draw(backwards(prompts()), temperature=temperature, **sizes)[::-1]
    assert as_lists(others) == as_lists(usual)
    for one, other in zip(usual, others, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5)


def test_responses_come_in_the_order_of_the_prompts_and_without_the_others():
    everybody = as_lists(draw())
    assert [row for row, *_ in everybody] == list(prompts())
    assert {len(tokens) for _, _, tokens, _ in everybody} > {1, CAP}, "responses of all lengths are compared"
    for few in (slice(5, 8), slice(11, 12)):
        assert as_lists(draw(dict(list(prompts().items())[few]))) == everybody[few]
    assert draw({}) == []


def test_slots_are_refilled_while_the_others_go_on():
    """Nothing is compiled anew, no slot waits, and no more steps are made than the tokens need."""
    asked = prompts(PROMPT_LENGTHS * 5)
    progress, programs = Progress(), Engine(tiny.CONFIG, settings(), ONE_DEVICE).programs
    for program in (programs.decode, programs.prefill):
        program.clear_cache()
    responses = draw(asked, progress=progress)
    assert programs.decode._cache_size() == 1 and programs.prefill._cache_size() == 3  # widths
    assert progress.tokens == progress.busy == sum(len(one.tokens) for one in responses)
    assert progress.responses == len(asked)
    assert progress.before_tail > 0.97 and progress.occupancy > 0.9
    static = [Progress() for _ in list(asked)[::4]]  # a batch at a time, each to its slowest row
    for i, of_batch in enumerate(static):
        draw(dict(list(asked.items())[4 * i : 4 * i + 4]), progress=of_batch, tail_batch_size=4)
    assert sum(of_batch.tokens for of_batch in static) == progress.tokens
    assert progress.steps < 0.7 * sum(of_batch.steps for of_batch in static)


def test_seed_iteration_index_and_number_each_give_another_response():
    """Both prompts are the same, and two responses are drawn to each."""
    asked, endless = dict.fromkeys((0, 1), prompts()[11]), {"stop_ids": (), "responses": 2}
    first = draw(asked, **endless)
    for other in (first[1:] + first[:1], draw(asked, seed=SEED + 1, **endless), draw(asked, iteration=1, **endless)):
        assert not any(np.array_equal(a.tokens, b.tokens) for a, b in zip(first, other, strict=True))
    assert [(one.row, one.number) for one in first] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert as_lists(draw({1: asked[1]}, stop_ids=())) == as_lists(first)[2:3]


def test_params_may_lie_anywhere():
    """numpy, on another device, laid out already, or split over devices: the same responses."""
    by, host = Engine(tiny.CONFIG, settings(), ONE_DEVICE, STOP_IDS), tiny.host_params()
    other = jax.device_put(host, jax.devices()[-1])
    split = jax.device_put(host, models.param_shardings(sharding.make_mesh(tensor=2), tiny.CONFIG))
    laid_out = by.lay_out(other)
    assert by.lay_out(laid_out) is laid_out
    expected = as_lists(by.generate(host, prompts()))
    for params in (other, split, laid_out):
        assert as_lists(by.generate(params, prompts())) == expected


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_decode_step_on_one_cpu_copies_neither_weights_nor_cache(dtype, all_passes):
    model = dataclasses.replace(tiny.CONFIG, num_layers=3)
    by = Engine(model, settings(), dataclasses.replace(ONE_DEVICE, dtype=jnp.dtype(dtype)), STOP_IDS)
    arguments = by.abstract_calls(64)["drain"]
    program, (params, slots, *_) = by.programs.drain.lower(*arguments).compile().as_text(), arguments
    layer = jax.tree.leaves(params["layers"][0]) + [slots.row.cache["v"][0], slots.row.cache["kT"][0]]
    of_layer = {x.size for x in layer if x.ndim > 1}
    found = re.findall(r"= \w+\[([\d,]+)\]\S* (\S+)\(", program)
    made = [(math.prod(map(int, shape.split(","))), operation) for shape, operation in found]
    copying = ("copy", "transpose", "convert", "dynamic-slice")
    assert not [one for one in made if one[0] in of_layer and one[1] in copying]
    # Each cache is written in place, once.
    assert made.count((layer[-1].size, "dynamic-update-slice")) == 2 * model.num_layers


def test_bfloat16_matmuls_beside_a_float32_cache_draw_what_the_model_says(all_passes):
    """Log-probs of the drawn tokens, by the program that scores them, in the same dtype."""
    execution = dataclasses.replace(ONE_DEVICE, dtype=jnp.dtype(jnp.bfloat16))
    by = Engine(tiny.CONFIG, settings(), execution, STOP_IDS)
    assert by.abstract_calls(64)["drain"][1].row.cache["v"][0].dtype == jnp.float32

    @jax.jit
    def logprobs_of(row_1T: jax.Array) -> jax.Array:
        hidden_1TD, _ = models.forward(tiny.CONFIG, tiny.params(), row_1T, execution=execution)
        logits_1TV = models.unembed(tiny.CONFIG, tiny.params(), hidden_1TD, execution)
        return jax.nn.log_softmax(logits_1TV[0])[np.arange(row_1T.size - 1), row_1T[0, 1:]]

    for response in by.generate(tiny.host_params(), prompts(), seed=SEED, iteration=2):
        row = np.concatenate([prompts()[response.row], response.tokens])
        padded = np.pad(row, (0, 128 - len(row)))[None]  # one shape, and so one program
        expected = logprobs_of(padded)[: len(row) - 1][-len(response.tokens) :]
        np.testing.assert_allclose(response.logprobs, expected, atol=0.1)  # bfloat16 has 8 bits, logits are up to 8


def test_a_sliding_window_keeps_what_it_sees_and_no_more():
    """Prompts and responses longer than the window, whose ring comes round."""
    config = dataclasses.replace(tiny.CONFIG, sliding_window=5)
    by = Engine(config, settings(temperature=0.0), ONE_DEVICE)
    _, slots, queue, *_ = by.abstract_calls(128)["decode"]
    assert slots.row.cache["v"][0].shape[2] == 10 and queue.row.cache["v"][0].shape[2] == 5
    params = tiny.host_params()
    for response in by.generate(params, prompts()):
        prompt = prompts()[response.row]
        best_T = logits_of(params, np.concatenate([prompt, response.tokens]), config).argmax(axis=-1)
        np.testing.assert_array_equal(response.tokens, best_T[len(prompt) - 1 : -1])


# ---- where a response ends


def test_a_response_ends_with_its_first_stop_id():
    free = draw(stop_ids=())
    assert all(len(one.tokens) == CAP and one.truncated for one in free), "without stop ids all reach the cap"
    # In the middle of the first, at the very start of the third, and just in time in the fourth.
    stop_ids = (int(free[0].tokens[2]), int(free[2].tokens[0]), int(free[3].tokens[CAP - 1]))
    for one, stopped in zip(free, draw(stop_ids=stop_ids), strict=True):
        places = np.flatnonzero(np.isin(one.tokens, stop_ids))
        length = places[0] + 1 if places.size else CAP
        assert (len(stopped.tokens), stopped.truncated) == (length, not places.size)
        np.testing.assert_array_equal(stopped.tokens, one.tokens[:length])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_response_ends_before_the_least_length(temperature):
    short, long = (draw(min_new_tokens=least, temperature=temperature) for least in (0, 6))
    assert min(len(one.tokens) for one in short) < 6
    for one, other in zip(short, long, strict=True):
        assert len(other.tokens) >= 6 and not np.isin(other.tokens[:5], STOP_IDS).any()
        agreed = min(
            len(one.tokens) - (not one.truncated), 6
        )  # the very tokens, up to where the other would have ended
        np.testing.assert_array_equal(one.tokens[:agreed], other.tokens[:agreed])


# ---- what the tokens are


def test_sampled_first_tokens_follow_the_models_softmax():
    """The whole loop, 8192 rows with one prompt: the 15 most likely tokens and all others together."""
    tokens = prompts()[11]
    chosen = {"max_new_tokens": 1, "batch_size": 1024, "prefill_batch_size": 1024, "tail_batch_size": 1024}
    responses = draw(dict.fromkeys(range(8192), tokens), stop_ids=(), **chosen)
    counts_V = np.bincount([one.tokens[0] for one in responses], minlength=tiny.CONFIG.vocab_size)
    logits_V = logits_of(tiny.host_params(), tokens)[-1].astype(np.float64)
    probabilities_V = np.exp(logits_V) / np.exp(logits_V).sum()
    likely = np.argsort(-probabilities_V)[:15]

    def binned(values_V: np.ndarray) -> np.ndarray:
        return np.append(values_V[likely], values_V.sum() - values_V[likely].sum())

    assert chi_square(binned(counts_V), binned(probabilities_V)) < CHI_SQUARE[15]


def test_tokens_and_rows_are_drawn_independently():
    """All logits 0, hence uniform tokens: differences, from token to token and from row to row, are uniform too."""
    level = tiny.host_params() | {"final_norm": np.zeros(tiny.CONFIG.hidden_size, np.float32)}
    asked = dict.fromkeys(range(4096), np.ones(1, np.int32))
    sizes = {"batch_size": 512, "prefill_batch_size": 512, "tail_batch_size": 512}
    tokens_BO = np.stack([one.tokens for one in draw(asked, stop_ids=(), params=level, **sizes)])
    for axis in (0, 1):
        counts = np.bincount(np.diff(tokens_BO, axis=axis).ravel() % 16, minlength=16)
        assert chi_square(counts, np.full(16, 1 / 16)) < CHI_SQUARE[15]


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.5, "top_k": 5}])
def test_logprobs_are_the_models_own(changes):
    """At temperature 1 with no token filtered out, however a token was drawn."""
    for response in draw(**changes):
        prompt = prompts()[response.row]
        logits_TV = logits_of(tiny.host_params(), np.concatenate([prompt, response.tokens]))
        logprobs_TV = np.asarray(jax.nn.log_softmax(logits_TV[len(prompt) - 1 : -1]))
        exact_T = np.take_along_axis(logprobs_TV, response.tokens[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(response.logprobs, exact_T, atol=2e-5)


# ---- on disk


def test_only_what_is_missing_is_drawn_again(tmp_path, caplog):
    directory = epath.Path(tmp_path)
    whole, progress = as_lists(draw(directory=directory)), Progress()
    parts = sorted(part.name for part in directory.iterdir())
    assert len(parts) > 3 and parts == [f"part-{i:05d}.p000.jsonl" for i in range(int(parts[-1][5:10]) + 1)]
    assert as_lists(draw(directory=directory, progress=progress)) == whole and progress.steps == 0
    lost = (directory / parts[1]).read_text().splitlines()
    (directory / parts[1]).unlink()
    (directory / parts[2]).write_text((directory / parts[2]).read_text()[:-9])
    lost += (directory / parts[2]).read_text().splitlines()
    with caplog.at_level(logging.WARNING):
        assert as_lists(draw(directory=directory, progress=progress)) == whole
    assert [record.getMessage() for record in caplog.records] == [
        f"{directory / parts[2]} is damaged: its responses are drawn again"
    ]
    drawn = [one for one in directory.glob("part-*.jsonl") if one.name not in parts]
    assert sum(len(part.read_text().splitlines()) for part in drawn) == len(lost)


def test_a_damaged_part_is_left_for_somebody_to_look_at(tmp_path):
    directory = epath.Path(tmp_path)
    (directory / "part-00007.p000.jsonl").write_text("no JSON")
    draw(directory=directory)
    assert (directory / "part-00007.p000.jsonl").read_text() == "no JSON"
    assert sorted(part.name for part in directory.iterdir())[1] == "part-00008.p000.jsonl"


def test_parts_of_an_earlier_version_are_read(tmp_path):
    """They have "finished" where a response is not truncated."""
    directory = epath.Path(tmp_path)
    drawn, progress = as_lists(draw(directory=directory)), Progress()
    for part in directory.glob("part-*.jsonl"):
        lines = part.read_text().replace('"truncated": true', '"finished": false')
        part.write_text(lines.replace('"truncated": false', '"finished": true'))
    assert as_lists(draw(directory=directory, progress=progress)) == drawn and progress.steps == 0


# ---- sizes


def test_sizes_are_few():
    assert slot_counts(1000, 64, 8, 1) == [64, 32, 16, 8]
    assert slot_counts(1000, 64, 8, 4) == [64, 32]
    assert slot_counts(1000, 6, 1, 1) == [6, 3]
    assert slot_counts(17, 64, 8, 1) == [32, 16, 8] and slot_counts(16, 64, 8, 1) == [16, 8]
    assert slot_counts(3, 64, 8, 1) == [4] and slot_counts(3, 64, 8, 4) == [4]
    for wanted, slots, places in ((16, 64, 16), (3, 64, 3), (16, 4, 4)):
        by = Engine(tiny.CONFIG, settings(prefill_batch_size=wanted, batch_size=slots), ONE_DEVICE)
        assert by.abstract_calls(8)["prefill"][2].lengths_E.shape == (places,)
    assert [prefill_width(length, 64) for length in (1, 64, 65, 128, 129, 500)] == [64, 64, 128, 128, 256, 512]
    assert [prefill_width(length, 48) for length in (48, 49, 97)] == [48, 96, 192]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 12}, "batch_size=12 does not split over 8 devices .*generate.batch_size=16$"),
        ({"batch_size": 0}, "batch_size and prefill_batch_size must be at least 1"),
        ({"batch_size": 16, "stop_strings": ("#",)}, "make the engine with Engine.for_chat"),
    ],
)
def test_engines_that_cannot_sample_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Engine(tiny.CONFIG, settings(**changes), Execution(mesh=sharding.make_mesh()))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({2**24: [1]}, "at most 16,777,216 rows"),
        ({0: [1], 5: []}, "prompt 5 must be a list of token ids"),
        ({0: "abc"}, "prompt 0 must be a list of token ids"),
        ({0: [1, 64]}, "prompt 0 has token ids 1 to 64: the model's are 0 to 63"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(asked, message):
    with pytest.raises(UserError, match=message):
        draw(asked)


# ---- stop strings


def test_a_response_ends_with_the_token_that_completes_a_stop_string():
    """Of a vocabulary of one byte a token; the automaton starts anew in each response."""
    free = draw(stop_ids=())
    pieces = [bytes([65 + token]) for token in range(tiny.CONFIG.vocab_size)]
    strings = [
        b"".join(pieces[token] for token in one.tokens[i : i + n])
        for one, i, n in zip(free, (0, 4, 7), (2, 3, 1), strict=False)
    ]
    table = stop_strings.table_of(strings, pieces)
    stopped = draw(stop_ids=(), stops_AV=table, batch_size=2)
    lengths = []
    for one, cut in zip(free, stopped, strict=True):
        text = b"".join(pieces[token] for token in one.tokens)
        ends = [text.find(string) + len(string) for string in strings if string in text]
        np.testing.assert_array_equal(cut.tokens, one.tokens[: min(ends, default=CAP)])
        assert cut.truncated
        lengths.append(len(cut.tokens))
    assert lengths[0] == 2 and lengths[1] <= 7 and lengths[2] <= 8
