import math

import numpy as np
import pytest

from spin_jax import checkpoints
from spin_jax.config import ToyConfig
from spin_jax.data.chat_format import chat_format
from spin_jax.data.sources import load_examples
from spin_jax.errors import UserError
from spin_jax.tasks import toy

transformers = pytest.importorskip("transformers")

PROMPT = "k c f a p d"


def test_support_is_a_distribution_over_subsequences():
    choices = toy.support(PROMPT)
    assert len({response for response, _ in choices}) == len(choices) == math.comb(6, 3)
    assert math.isclose(sum(probability for _, probability in choices), 1)
    for response, _ in choices:
        places = [PROMPT.split().index(letter) for letter in response.split()]
        assert len(places) == 3 and places == sorted(places)


@pytest.mark.parametrize("prompt", ["a b c", "a a b c d e", "a b c d e z"])
def test_support_refuses_what_is_no_prompt(prompt):
    with pytest.raises(UserError, match="6 different letters"):
        toy.support(prompt)


def test_examples_are_valid_deterministic_and_apart_from_the_unseen():
    train, unseen = toy.make_examples(7, 200, 50)
    assert (train, unseen) == toy.make_examples(7, 200, 50)
    assert train != toy.make_examples(8, 200, 50)[0]
    prompts = [example.prompt[0]["content"] for example in train]
    assert len(set(prompts) | set(unseen)) == 250
    assert all(example.response in dict(toy.support(prompt)) for example, prompt in zip(train, prompts, strict=True))


def test_examples_follow_the_data_distribution():
    train, _ = toy.make_examples(0, 4000, 1)
    places = np.zeros(6)
    for example in train:
        letters = example.prompt[0]["content"].split()
        places[[letters.index(letter) for letter in example.response.split()]] += 1
    # Each of the six places is taken with probability 1/2; five standard errors are 0.04.
    np.testing.assert_allclose(places / 4000, 0.5, atol=0.04)


def test_too_many_prompts_are_refused():
    with pytest.raises(UserError, match="together at most 6 *"):
        toy.make_examples(0, 12, 12, toy.Task("abcd", 2, 1))


def test_measures_of_known_policies():
    _, prompts = toy.make_examples(0, 1, 5)
    data = toy.exact_measures(lambda rows: np.full(len(rows), -math.log(20)), prompts)
    assert data == pytest.approx({"validity": 1, "kl_to_data": 0}, abs=1e-12)

    # Letter by letter at random among 16, then EOS: 20 right ones of 16^3.
    uniform = toy.exact_measures(lambda rows: np.full(len(rows), -3 * math.log(16)), prompts)
    assert uniform == pytest.approx({"validity": 20 / 16**3, "kl_to_data": math.log(16**3 / 20)})


def test_measures_weigh_the_right_rows():
    # A policy that writes the first subsequence with 0.5, each other one with 0.01, and wrong ones with the rest.
    first = {prompt: toy.support(prompt)[0][0] for prompt in toy.make_examples(0, 1, 3)[1]}

    def logprobs(rows):
        return np.log([0.5 if row.response == first[row.prompt[0]["content"]] else 0.01 for row in rows])

    kl = math.log(1 / 20) - (math.log(0.5) + 19 * math.log(0.01)) / 20
    assert toy.exact_measures(logprobs, list(first)) == pytest.approx({"validity": 0.69, "kl_to_data": kl})


def test_prepared_files_go_the_way_of_any_data_set(tmp_path):
    settings = ToyConfig(train_rows=20, hidden_size=16)
    model, data = toy.prepare(tmp_path, settings, seed=3)
    examples = load_examples(data).examples
    assert examples == toy.make_examples(3, 20, settings.eval_prompts)[0]

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    chat = chat_format(tokenizer)
    prompt, response = (chat.generation_prompt(examples[0].prompt), chat.real_response((examples[0].prompt), "c a d"))
    assert tokenizer.convert_ids_to_tokens(prompt)[0] == "<user>" and len(prompt) == 1 + 6 + 1
    assert tokenizer.convert_ids_to_tokens(response) == ["c", "a", "d", "</s>"]
    assert tokenizer.decode(response, skip_special_tokens=True) == "c a d"

    loaded, params = checkpoints.load(model)
    assert loaded.vocab_size == len(tokenizer) and chat.stop_ids == (tokenizer.eos_token_id,)
    assert params["embed"]["embedding"].shape == (20, 16)


def test_preparing_again_changes_nothing(tmp_path):
    settings = ToyConfig()
    toy.prepare(tmp_path, settings, seed=0)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    toy.prepare(tmp_path, settings, seed=0)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_a_size_that_cannot_be_is_refused(tmp_path):
    settings = ToyConfig(hidden_size=20)
    with pytest.raises(UserError, match="config.toy.hidden_size=20 must be a multiple"):
        toy.prepare(tmp_path, settings, seed=0)


def test_what_a_refused_run_left_is_made_anew(tmp_path):
    for rows in (16, 24, 24):
        settings = ToyConfig(train_rows=rows, eval_prompts=1, hidden_size=16, num_layers=1)
        _, data = toy.prepare(tmp_path / "toy", settings, seed=0)
        assert len(open(data).readlines()) == rows
