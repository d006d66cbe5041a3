"""Sampling: against transformers' greedy decoding, against softmax, and row by row in whatever company."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath
from ml_collections import ConfigDict

from spin_jax import models
from spin_jax.config import base_config
from spin_jax.errors import UserError
from spin_jax.models import Compute
from spin_jax.programs import make_sampler
from spin_jax.responses import Prompt, Response, batches_by_length, generate
from spin_jax.sampling import Decoding, Responses, keep_likely, next_tokens, row_keys, sample
from spin_jax.sharding import AXES, make_mesh

SEED = 42
CAP = 6  # new tokens
WIDTH = 8  # prompt slots
PROMPT_LENGTHS = (1, 8, 3, 5, 2, 7, 4, 6)

draw_jit = jax.jit(sample, static_argnums=0, static_argnames=("max_new_tokens", "stop_ids", "truncate", "compute"))


def decoding(temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> Decoding:
    return Decoding(jnp.float32(temperature), jnp.float32(top_p), jnp.int32(top_k))


def prompts() -> list[np.ndarray]:
    """The prompt of row i is prompts()[i]."""
    rng = np.random.default_rng(3)
    return [tiny.tokens(rng, length) for length in PROMPT_LENGTHS]


def draw(
    rows: tuple[int | None, ...] = tuple(range(8)),
    how: Decoding | None = None,
    seed: int = SEED,
    iteration: int = 0,
    stop_ids: tuple[int, ...] = (),
    truncate: bool = False,
    params: dict | None = None,
) -> Responses:
    """Responses to rows, in one batch of their number; None is a filler. Rows 8, 9... have the prompt of row 0."""
    tokens_BP, lengths_B = np.zeros((len(rows), WIDTH), np.int32), np.zeros(len(rows), np.int32)
    for i, row in enumerate(rows):
        if row is not None:
            prompt = prompts()[row if row < 8 else 0]
            tokens_BP[i, : len(prompt)], lengths_B[i] = prompt, len(prompt)
    return jax.device_get(
        draw_jit(
            tiny.CONFIG,
            params or tiny.host_params(),
            tokens_BP,
            lengths_B,
            row_keys(seed, iteration, np.array([row or 0 for row in rows], np.int32)),
            how or decoding(),
            max_new_tokens=CAP,
            stop_ids=stop_ids,
            truncate=truncate,
            compute=Compute(),
        )
    )


# ---- greedy


def test_greedy_takes_the_best_token_of_every_full_forward_pass():
    """Without a cache: the whole row through the model again for every token."""
    forward = jax.jit(functools.partial(models.forward, tiny.CONFIG))
    responses = draw(how=decoding(temperature=0))
    for prompt, tokens_R in zip(prompts(), responses.tokens_BR, strict=True):
        row_T = np.zeros(WIDTH + CAP, np.int32)
        row_T[: len(prompt)] = prompt
        for step in range(CAP):
            hidden_1TD, _ = forward(tiny.host_params(), row_T[None])
            last = len(prompt) + step
            best = np.argmax(models.unembed(tiny.CONFIG, tiny.host_params(), hidden_1TD[0, last - 1]))
            assert tokens_R[step] == best
            row_T[last] = best


def test_greedy_equals_transformers_on_smollm2(smollm2):
    """32 chat prompts of 32 to 103 tokens, 64 new tokens each, f32: `golden/make_sampling_golden.py`."""
    golden = json.loads((pathlib.Path(__file__).parent / "golden" / "greedy.json").read_text())
    config, params = models.load(smollm2)
    settings = generate_settings(temperature=0.0, max_new_tokens=golden["new_tokens"], batch_size=16, prompt_bucket=64)
    sampler = make_sampler(config, settings, tuple(golden["stop_ids"]), Compute())
    asked = [Prompt(row, np.array(tokens, np.int32)) for row, tokens in enumerate(golden["prompts"])]
    answers = generate(sampler, params, asked, settings, seed=SEED, iteration=0, mesh=one_device())
    for answer, tokens in zip(answers, golden["responses"], strict=True):
        assert answer.tokens.tolist() == tokens, f"prompt {answer.row}"
        assert answer.finished == (tokens[-1] in golden["stop_ids"])
    assert 0 < sum(answer.finished for answer in answers) < 32, "both kinds of ending are compared"


# ---- a row is answered the same in any company


@pytest.mark.parametrize(
    "rows",
    [
        (7, 6, 5, 4, 3, 2, 1, 0),  # other places
        (0, 1, 1, 4, 1, 4, 6, 7),  # other neighbours, and the same row twice
        (5, None, None, 2, None, None, None, None),  # fillers
        (3,),
        (6, 0, 4),
    ],
)
def test_a_response_depends_on_its_row_alone(rows):
    everybody, some = draw(), draw(rows)
    for i, row in enumerate(rows):
        if row is None:
            assert some.lengths_B[i] == 0 and not some.tokens_BR[i].any()
        else:
            np.testing.assert_array_equal(some.tokens_BR[i], everybody.tokens_BR[row])


def test_seed_iteration_and_row_each_give_another_response():
    """Rows 0 and 8 have the same prompt."""
    rows = (0, 8, 1, 2, 3, 4, 5, 6)
    first = draw(rows).tokens_BR
    assert not np.array_equal(first[0], first[1])
    for other in (draw(rows, seed=SEED + 1), draw(rows, iteration=1)):
        assert not any(np.array_equal(a, b) for a, b in zip(first, other.tokens_BR, strict=True))
    # A sum of seed and iteration, or of iteration and row, would make these equal.
    keys = {tuple(jax.random.key_data(row_keys(s, t, np.array([i]))[0]).tolist()) for s, t, i in np.ndindex(4, 4, 4)}
    assert len(keys) == 64


# ---- where a response ends


def test_a_response_ends_with_its_first_stop_id():
    free = draw()
    assert not free.finished_B.any() and (free.lengths_B == CAP).all(), "without stop ids all are cut at the cap"
    # In the middle of row 0, at the very start of row 2, and just in time in row 3.
    stop_ids = (int(free.tokens_BR[0, 2]), int(free.tokens_BR[2, 0]), int(free.tokens_BR[3, CAP - 1]))
    stopped = draw(stop_ids=stop_ids)
    for i, tokens_R in enumerate(free.tokens_BR):
        places = np.flatnonzero(np.isin(tokens_R, stop_ids))
        length = places[0] + 1 if places.size else CAP
        assert stopped.lengths_B[i] == length
        assert stopped.finished_B[i] == bool(places.size)
        np.testing.assert_array_equal(stopped.tokens_BR[i], np.where(np.arange(CAP) < length, tokens_R, 0))
    assert stopped.lengths_B[2] == 1 and (stopped.lengths_B[3], stopped.finished_B[3]) == (CAP, True)
    assert not stopped.finished_B.all()


# ---- the distribution


# Quantile 0.999 of chi-square by degrees of freedom.
CHI_SQUARE = {7: 24.32, 15: 37.70}


def chi_square(counts_V: np.ndarray, probabilities_V: np.ndarray) -> float:
    expected_V = probabilities_V * counts_V.sum()
    assert expected_V.min() > 5, "too few draws for the test"
    return float(np.sum((counts_V - expected_V) ** 2 / expected_V))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_softmax(temperature):
    logits_V = np.array([0.0, 1.0, -1.0, 0.5, 2.0, -0.5, 1.5, 0.2], np.float32)
    draws = 8192
    keys = row_keys(SEED, 0, np.arange(draws, dtype=np.int32))
    tokens_B = jax.jit(next_tokens, static_argnums=3)(np.tile(logits_V, (draws, 1)), keys, decoding(temperature), False)
    weights_V = np.exp(logits_V / temperature)
    counts_V = np.bincount(tokens_B, minlength=8)
    assert chi_square(counts_V, weights_V / weights_V.sum()) < CHI_SQUARE[7]
    flat_V = np.exp(logits_V / (1.5 * temperature))
    assert chi_square(counts_V, flat_V / flat_V.sum()) > 2 * CHI_SQUARE[7], "the test would show a wrong temperature"


def test_sampled_first_tokens_follow_the_models_softmax():
    """The whole loop, 8192 rows with one prompt: the 15 most likely tokens and all others together."""
    rows = (0, *range(8, 8199))
    counts_V = np.bincount(draw(rows).tokens_BR[:, 0], minlength=tiny.CONFIG.vocab_size)
    hidden_1TD, _ = models.forward(tiny.CONFIG, tiny.host_params(), prompts()[0][None])
    probabilities_V = np.asarray(
        jax.nn.softmax(models.unembed(tiny.CONFIG, tiny.host_params(), hidden_1TD[0, -1])), np.float64
    )
    likely = np.argsort(-probabilities_V)[:15]

    def binned(values_V: np.ndarray) -> np.ndarray:
        return np.append(values_V[likely], values_V.sum() - values_V[likely].sum())

    assert chi_square(binned(counts_V), binned(probabilities_V)) < CHI_SQUARE[15]


def test_tokens_and_rows_are_drawn_independently():
    """All logits 0, hence uniform tokens: differences, from token to token and from row to row, are uniform too."""
    level = tiny.host_params() | {"final_norm": np.zeros(tiny.CONFIG.hidden_size, np.float32)}
    tokens_BR = draw((0, *range(8, 8199)), params=level).tokens_BR
    for axis in (0, 1):
        counts = np.bincount(np.diff(tokens_BR, axis=axis).ravel() % 16, minlength=16)
        assert chi_square(counts, np.full(16, 1 / 16)) < CHI_SQUARE[15]


# ---- top-k and top-p


def kept_by_the_book(logits_V: np.ndarray, top_p: float, top_k: int) -> np.ndarray:
    """Which tokens stay: the k best, of these the fewest that reach p, and whoever ties with the last of them."""
    order = sorted(range(len(logits_V)), key=lambda v: -logits_V[v])[: top_k or None]
    weights = np.exp(logits_V[order].astype(np.float64))
    needed, total = 0, 0.0
    while needed < len(order) and (needed == 0 or total < top_p * weights.sum() or top_p >= 1):
        total += weights[needed]
        needed += 1
    return logits_V >= logits_V[order[needed - 1]]


@pytest.mark.parametrize("decimals", [5, 0])
def test_keep_likely_is_top_k_then_top_p(decimals):
    logits_BV = np.random.default_rng(0).normal(size=(20, 40), scale=2).round(decimals).astype(np.float32)
    keep = jax.jit(keep_likely)
    for top_p, top_k in ((1.0, 0), (0.9, 0), (0.31, 0), (1.0, 5), (0.77, 5), (0.5, 1), (1e-6, 0), (0.99, 1000)):
        cut_BV = np.asarray(keep(logits_BV, top_p, top_k))
        kept_BV = np.stack([kept_by_the_book(logits_V, top_p, top_k) for logits_V in logits_BV])
        np.testing.assert_array_equal(cut_BV, np.where(kept_BV, logits_BV, -np.inf), err_msg=f"{top_p} {top_k}")


@pytest.mark.parametrize("how", [decoding(top_k=1), decoding(top_p=1e-4)])
def test_the_narrowest_cuts_are_greedy(how):
    greedy = draw(how=decoding(temperature=0)).tokens_BR
    np.testing.assert_array_equal(draw(how=how, truncate=True).tokens_BR, greedy)
    assert not np.array_equal(draw().tokens_BR, greedy)


def test_cuts_that_cut_nothing_change_nothing():
    np.testing.assert_array_equal(draw(truncate=True).tokens_BR, draw().tokens_BR)


# ---- the generation stage


def one_device() -> jax.sharding.Mesh:
    axis_types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh((1, 1, 1), AXES, axis_types, devices=jax.devices()[:1])


def generate_settings(**changes) -> ConfigDict:
    settings = base_config().generate
    settings.update(max_new_tokens=CAP, batch_size=2, prompt_bucket=4)
    settings.update(changes)
    return settings


@functools.cache
def tiny_sampler():
    """One for all tests: top_p=0.9 in its settings only makes it look at top-p."""
    return make_sampler(tiny.CONFIG, generate_settings(top_p=0.9), (3, 5), Compute())


def asked() -> list[Prompt]:
    """Row numbers that are not places: 10, 11, ... 17."""
    return [Prompt(10 + i, tokens) for i, tokens in enumerate(prompts())]


def answer(questions: list[Prompt], sampler=None, directory: epath.Path | None = None, **changes) -> list[Response]:
    return generate(
        sampler or tiny_sampler(),
        tiny.host_params(),
        questions,
        generate_settings(**changes),
        seed=SEED,
        iteration=2,
        mesh=one_device(),
        directory=directory,
    )


def as_lists(responses: list[Response]) -> list[tuple]:
    return [(response.row, response.tokens.tolist(), response.finished) for response in responses]


def test_batches_hold_prompts_of_one_width_longest_first():
    batches = batches_by_length(asked(), batch_size=3, bucket=4)
    assert [(width, [len(p.tokens) for p in batch]) for width, batch in batches] == [
        (8, [8, 5, 7]),
        (8, [6]),
        (4, [1, 3, 2]),
        (4, [4]),
    ]


def test_responses_come_in_the_order_of_the_prompts():
    answers = answer(asked())
    assert [response.row for response in answers] == [prompt.row for prompt in asked()]
    assert as_lists(answer(asked()[::-1])) == as_lists(answers)[::-1]
    assert as_lists(answer(asked()[2:5])) == as_lists(answers)[2:5]
    assert as_lists(answer(asked(), batch_size=3)) == as_lists(answers)


def test_only_what_is_missing_is_drawn_again(tmp_path):
    calls = []

    def counting(*args) -> Responses:
        calls.append(args)
        return tiny_sampler()(*args)

    directory = epath.Path(tmp_path)
    whole = as_lists(answer(asked(), counting, directory))
    parts = {part.name: part.read_text() for part in directory.iterdir()}
    assert sorted(parts) == [f"part-{number:05d}.p000.jsonl" for number in range(4)]
    assert len(calls) == 4
    (directory / "part-00002.p000.jsonl").unlink()
    assert as_lists(answer(asked(), counting, directory)) == whole
    assert len(calls) == 5
    assert {part.name: part.read_text() for part in directory.iterdir()} == parts
    assert as_lists(answer(asked(), counting)) == whole  # and without a directory


def test_one_program_a_width_whatever_is_asked():
    sampler = make_sampler(tiny.CONFIG, generate_settings(top_p=0.9), (3,), Compute())
    answer(asked(), sampler)
    for changes in ({"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.5}, {"top_k": 3}):
        answer([dataclasses.replace(prompt, row=prompt.row + 50) for prompt in asked()[3:]], sampler, **changes)
    assert sampler._cache_size() == 2  # widths 4 and 8


def test_a_batch_that_does_not_split_over_the_devices_is_refused():
    with pytest.raises(UserError, match=r"config\.generate\.batch_size=12 .* 8 devices .* for example 16$"):
        generate(tiny_sampler(), {}, asked(), generate_settings(batch_size=12), seed=0, iteration=0, mesh=make_mesh())
