"""The decode loop: against transformers and against the model without a cache, and row by row in whatever company."""

import dataclasses
import functools
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
from spin_jax.generation.decode_loop import Sampler, prefill_width, queue_places, slot_counts
from spin_jax.generation.engine import Progress, generate
from spin_jax.generation.programs import make_sampler
from spin_jax.generation.response_files import Prompt, Response
from spin_jax.generation.sampling import Decoding
from spin_jax.models import Compute

SEED = 42
CAP = 12  # new tokens
PROMPT_LENGTHS = (1, 8, 3, 5, 2, 7, 4, 6, 40, 3, 1, 70, 2, 9)  # of rows 10, 11, ...
STOP_IDS = (3, 5, 7, 9, 11, 13)
ONE_DEVICE = Compute(mesh=sharding.one_device_mesh())


def settings(**changes) -> GenerateConfig:
    """Four slots, and three prompts prefilled at a time."""
    sizes = {"batch_size": 4, "prefill_batch_size": 3, "tail_batch_size": 2, "prompt_bucket": 32}
    return GenerateConfig(**{"max_new_tokens": CAP} | sizes | changes)


def prompts(lengths: tuple[int, ...] = PROMPT_LENGTHS) -> list[Prompt]:
    """Row numbers are not places."""
    rng = np.random.default_rng(3)
    return [Prompt(10 + i, tiny.tokens(rng, length)) for i, length in enumerate(lengths)]


@functools.cache
def sampler(stop_ids: tuple[int, ...] = STOP_IDS, cap: int = CAP) -> Sampler:
    """One for many tests; top_p in its settings only makes it look at top-p."""
    return make_sampler(tiny.CONFIG, settings(top_p=0.9, max_new_tokens=cap), stop_ids, ONE_DEVICE)


def draw(
    asked: list[Prompt] | None = None,
    *,
    by: Sampler | None = None,
    seed: int = SEED,
    iteration: int = 2,
    params: dict | None = None,
    directory: epath.Path | None = None,
    progress: Progress | None = None,
    **changes,
) -> list[Response]:
    return generate(
        by or sampler(),
        params or tiny.host_params(),
        prompts() if asked is None else asked,
        settings(**changes),
        seed=seed,
        iteration=iteration,
        mesh=ONE_DEVICE.mesh,
        directory=directory,
        progress=progress,
    )


def as_lists(responses: list[Response]) -> list[tuple]:
    return [(one.row, one.number, one.tokens.tolist(), one.finished) for one in responses]


def logits_of(params: dict, tokens_T: np.ndarray, config: models.ModelConfig = tiny.CONFIG) -> np.ndarray:
    """Of every token's successor, without a cache."""
    hidden_1TD, _ = models.forward(config, params, jnp.asarray(tokens_T)[None])
    return np.asarray(models.unembed(config, params, hidden_1TD[0]))


# ---- greedy


def test_greedy_takes_the_best_token_of_the_model_without_a_cache():
    asked = prompts()
    for prompt, response in zip(asked, draw(asked, temperature=0.0), strict=True):
        row_T = np.concatenate([prompt.tokens, response.tokens])
        best_T = logits_of(tiny.host_params(), row_T).argmax(axis=-1)
        np.testing.assert_array_equal(response.tokens, best_T[len(prompt.tokens) - 1 : -1])


def test_greedy_equals_transformers_on_smollm2(smollm2):
    """32 chat prompts of 32 to 103 tokens, 64 new tokens each, f32: `golden/make_sampling_golden.py`."""
    golden = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "greedy.json").read_text())
    config, params = checkpoints.load(smollm2)
    chosen = settings(temperature=0.0, max_new_tokens=golden["new_tokens"], batch_size=8, prompt_bucket=64)
    asked = [Prompt(row, np.array(tokens, np.int32)) for row, tokens in enumerate(golden["prompts"])]
    by = make_sampler(config, chosen, tuple(golden["stop_ids"]), ONE_DEVICE)
    answers = generate(by, params, asked, chosen, seed=SEED, iteration=0, mesh=ONE_DEVICE.mesh)
    for answer, tokens in zip(answers, golden["responses"], strict=True):
        assert answer.tokens.tolist() == tokens, f"prompt {answer.row}"
        assert answer.finished == (tokens[-1] in golden["stop_ids"])
    assert 0 < sum(answer.finished for answer in answers) < 32, "both kinds of ending are compared"


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
    usual, others = draw(temperature=temperature), draw(prompts()[::-1], temperature=temperature, **sizes)[::-1]
    assert as_lists(others) == as_lists(usual)
    for one, other in zip(usual, others, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5)


def test_responses_come_in_the_order_of_the_prompts_and_without_the_others():
    everybody = as_lists(draw())
    assert [row for row, *_ in everybody] == [prompt.row for prompt in prompts()]
    assert {len(tokens) for _, _, tokens, _ in everybody} > {1, CAP}, "responses of all lengths are compared"
    assert as_lists(draw(prompts()[5:8])) == everybody[5:8]
    assert as_lists(draw(prompts()[11:12])) == everybody[11:12]
    assert draw([]) == []


def test_slots_are_refilled_while_the_others_go_on():
    """Nothing is compiled anew, no slot waits, and no more steps are made than the tokens need."""
    asked = prompts(PROMPT_LENGTHS * 5)
    by, progress = make_sampler(tiny.CONFIG, settings(), STOP_IDS, ONE_DEVICE), Progress()
    responses = draw(asked, by=by, progress=progress)
    assert by.decode._cache_size() == 1 and by.prefill._cache_size() == 3  # widths
    assert progress.tokens == progress.busy == sum(len(one.tokens) for one in responses)
    assert progress.responses == len(asked)
    assert progress.before_tail > 0.97 and progress.occupancy > 0.9
    static = [Progress() for _ in asked[::4]]  # a batch at a time, each to its slowest row
    for i, of_batch in enumerate(static):
        draw(asked[4 * i : 4 * i + 4], by=by, progress=of_batch, tail_batch_size=4)
    assert sum(of_batch.tokens for of_batch in static) == progress.tokens
    assert progress.steps < 0.7 * sum(of_batch.steps for of_batch in static)


def test_seed_iteration_row_and_number_each_give_another_response():
    """Rows 0 and 1 have the same prompt, and row 1 is asked twice."""
    tokens = prompts()[1].tokens
    asked = [Prompt(0, tokens), Prompt(1, tokens), Prompt(1, tokens, number=1)]
    endless = {"by": sampler(stop_ids=())}
    first = draw(asked, **endless)
    for other in (first[1:] + first[:1], draw(asked, seed=SEED + 1, **endless), draw(asked, iteration=1, **endless)):
        assert not any(np.array_equal(a.tokens, b.tokens) for a, b in zip(first, other, strict=True))
    assert [(one.row, one.number) for one in first] == [(0, 0), (1, 0), (1, 1)]
    assert as_lists(draw(asked[2:], **endless)) == as_lists(first)[2:]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_decode_step_on_one_cpu_copies_neither_weights_nor_cache(dtype, all_passes):
    model = dataclasses.replace(tiny.CONFIG, num_layers=3)
    by = make_sampler(model, settings(), STOP_IDS, dataclasses.replace(ONE_DEVICE, dtype=jnp.dtype(dtype)))
    slots, _ = by.start.eval_shape(4, 3, 64)
    decoding = jax.eval_shape(lambda: Decoding.of(settings(), STOP_IDS))
    kept = jax.ShapeDtypeStruct((), jnp.int32)
    program = by.drain.lower(by.abstract_params, slots, decoding, kept).compile().as_text()
    layer = jax.tree.leaves(by.abstract_params["layers"][0]) + [slots.row.cache["v"][0], slots.row.cache["kT"][0]]
    of_layer = {x.size for x in layer if x.ndim > 1}
    found = re.findall(r"= \w+\[([\d,]+)\]\S* (\S+)\(", program)
    made = [(math.prod(map(int, shape.split(","))), operation) for shape, operation in found]
    copying = ("copy", "transpose", "convert", "dynamic-slice")
    assert not [one for one in made if one[0] in of_layer and one[1] in copying]
    # Each cache is written in place, once.
    assert made.count((layer[-1].size, "dynamic-update-slice")) == 2 * model.num_layers


def test_bfloat16_matmuls_beside_a_float32_cache_draw_what_the_model_says(all_passes):
    """Log-probs of the drawn tokens, by the program that scores them, in the same dtype."""
    compute = dataclasses.replace(ONE_DEVICE, dtype=jnp.dtype(jnp.bfloat16))
    by = make_sampler(tiny.CONFIG, settings(), STOP_IDS, compute)
    assert by.start.eval_shape(4, 3, 64)[0].row.cache["v"][0].dtype == jnp.float32
    for prompt, response in zip(prompts(), draw(by=by), strict=True):
        row = np.concatenate([prompt.tokens, response.tokens])[None]
        hidden_1TD, _ = models.forward(tiny.CONFIG, tiny.params(), row, compute=compute)
        logits_1TV = models.unembed(tiny.CONFIG, tiny.params(), hidden_1TD, compute)
        logprobs_T = jax.nn.log_softmax(logits_1TV[0])[np.arange(row.size - 1), row[0, 1:]]
        expected = logprobs_T[-len(response.tokens) :]
        np.testing.assert_allclose(response.logprobs, expected, atol=0.1)  # bfloat16 has 8 bits, logits are up to 8


def test_a_sliding_window_keeps_what_it_sees_and_no_more():
    """Prompts and responses longer than the window, whose ring comes round."""
    config = dataclasses.replace(tiny.CONFIG, sliding_window=5)
    chosen = settings(temperature=0.0)
    by = make_sampler(config, chosen, (), ONE_DEVICE)
    slots, queue = by.start.eval_shape(4, 3, 128)
    assert slots.row.cache["v"][0].shape[2] == 10 and queue.row.cache["v"][0].shape[2] == 5
    params = tiny.host_params()
    responses = generate(by, params, prompts(), chosen, seed=0, iteration=0, mesh=ONE_DEVICE.mesh)
    for prompt, response in zip(prompts(), responses, strict=True):
        row_T = np.concatenate([prompt.tokens, response.tokens])
        best_T = logits_of(params, row_T, config).argmax(axis=-1)
        np.testing.assert_array_equal(response.tokens, best_T[len(prompt.tokens) - 1 : -1])


# ---- where a response ends


def test_a_response_ends_with_its_first_stop_id():
    free = draw(by=sampler(stop_ids=()))
    assert all(len(one.tokens) == CAP and not one.finished for one in free), "without stop ids all are cut at the cap"
    # In the middle of the first, at the very start of the third, and just in time in the fourth.
    stop_ids = (int(free[0].tokens[2]), int(free[2].tokens[0]), int(free[3].tokens[CAP - 1]))
    for one, stopped in zip(free, draw(by=sampler(stop_ids)), strict=True):
        places = np.flatnonzero(np.isin(one.tokens, stop_ids))
        length = places[0] + 1 if places.size else CAP
        assert (len(stopped.tokens), stopped.finished) == (length, bool(places.size))
        np.testing.assert_array_equal(stopped.tokens, one.tokens[:length])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_response_ends_before_the_least_length(temperature):
    short, long = (draw(min_new_tokens=least, temperature=temperature) for least in (0, 6))
    assert min(len(one.tokens) for one in short) < 6
    for one, other in zip(short, long, strict=True):
        assert len(other.tokens) >= 6 and not np.isin(other.tokens[:5], STOP_IDS).any()
        agreed = min(len(one.tokens) - one.finished, 6)  # the very tokens, up to where the other would have ended
        np.testing.assert_array_equal(one.tokens[:agreed], other.tokens[:agreed])


# ---- what the tokens are


def test_sampled_first_tokens_follow_the_models_softmax():
    """The whole loop, 8192 rows with one prompt: the 15 most likely tokens and all others together."""
    tokens = prompts()[1].tokens
    asked = [Prompt(row, tokens) for row in range(8192)]
    chosen = {"max_new_tokens": 1, "batch_size": 1024, "prefill_batch_size": 1024, "tail_batch_size": 1024}
    responses = draw(asked, by=sampler((), cap=1), **chosen)
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
    asked = [Prompt(row, np.ones(1, np.int32)) for row in range(4096)]
    sizes = {"batch_size": 512, "prefill_batch_size": 512, "tail_batch_size": 512}
    tokens_BC = np.stack([one.tokens for one in draw(asked, by=sampler(()), params=level, **sizes)])
    for axis in (0, 1):
        counts = np.bincount(np.diff(tokens_BC, axis=axis).ravel() % 16, minlength=16)
        assert chi_square(counts, np.full(16, 1 / 16)) < CHI_SQUARE[15]


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.5, "top_k": 5}])
def test_logprobs_are_the_models_own(changes):
    """At temperature 1 with nothing cut, however a token was drawn."""
    for prompt, response in zip(prompts(), draw(**changes), strict=True):
        logits_TV = logits_of(tiny.host_params(), np.concatenate([prompt.tokens, response.tokens]))
        logprobs_TV = np.asarray(jax.nn.log_softmax(logits_TV[len(prompt.tokens) - 1 : -1]))
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


# ---- sizes


def test_sizes_are_few():
    assert slot_counts(64, 8, 1) == [8, 16, 32, 64]
    assert slot_counts(64, 8, 4) == [32, 64]
    assert slot_counts(6, 1, 1) == [3, 6]
    assert [queue_places(16, 64, shards) for shards in (1, 3, 32)] == [16, 18, 32]
    assert queue_places(16, 4, 2) == 4
    assert [prefill_width(length, 64) for length in (1, 64, 65, 128, 129, 500)] == [64, 64, 128, 128, 256, 512]
    assert [prefill_width(length, 48) for length in (48, 49, 97)] == [48, 96, 192]


def test_slots_that_do_not_split_over_the_devices_are_refused():
    with pytest.raises(UserError, match=r"batch_size=12 does not split over 8 devices .*generate.batch_size=16$"):
        generate(sampler(), {}, prompts(), settings(batch_size=12), seed=0, iteration=0, mesh=sharding.make_mesh())


def test_rows_that_have_no_number_are_refused():
    with pytest.raises(UserError, match="at most 16,777,216 rows"):
        draw([Prompt(2**24, np.ones(1, np.int32))])


# ---- stop strings


def test_a_response_ends_with_the_token_that_completes_a_stop_string():
    """Of a vocabulary of one byte a token; the automaton starts anew in each response."""
    free = draw(by=sampler(stop_ids=()))
    pieces = [bytes([65 + token]) for token in range(tiny.CONFIG.vocab_size)]
    strings = [
        b"".join(pieces[token] for token in one.tokens[i : i + n])
        for one, i, n in zip(free, (0, 4, 7), (2, 3, 1), strict=False)
    ]
    table = stop_strings.table_of(strings, pieces)
    stopped = draw(by=dataclasses.replace(sampler(stop_ids=()), stops_SV=table), batch_size=2)
    lengths = []
    for one, cut in zip(free, stopped, strict=True):
        text = b"".join(pieces[token] for token in one.tokens)
        ends = [text.find(string) + len(string) for string in strings if string in text]
        np.testing.assert_array_equal(cut.tokens, one.tokens[: min(ends, default=CAP)])
        assert not cut.finished
        lengths.append(len(cut.tokens))
    assert lengths[0] == 2 and lengths[1] <= 7 and lengths[2] <= 8
