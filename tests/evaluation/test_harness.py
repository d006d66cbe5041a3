"""The harness's requests: log-probs, whole texts and answers as its own `hf` model gives them."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest
import tiny_files

from spin_jax import checkpoints, models
from spin_jax.config import replace
from spin_jax.errors import UserError

pytest.importorskip("lm_eval", reason="the harness is not installed: pip install 'spin_jax[eval]'")
import harness_tasks  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402

from spin_jax.evaluation import harness  # noqa: E402
from spin_jax.evaluation.loaded_model import load_model  # noqa: E402

GOLDEN = pathlib.Path(__file__).parent.parent / "golden/harness.json"
BOS, EOS = "<s>", "</s>"


def ask(kind: str, *arguments: tuple) -> list:
    return [Instance(kind, {}, one, i, metadata=("tiny", i, 1)) for i, one in enumerate(arguments)]


def config_of(directory: pathlib.Path):
    return tiny_files.make_config(directory, pathlib.Path("not read"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_files.write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(directory):
    return harness.HarnessModel(load_model(config_of(directory)))


@pytest.fixture(scope="module")
def logits(directory):
    """Token ids -> the logits behind each of them, [tokens, V], each sequence in a row of its own."""
    config, params = checkpoints.load(directory)

    @jax.jit
    def padded(tokens_BT):
        return models.unembed(config, params, models.forward(config, params, tokens_BT)[0])

    def of(ids: list[int]) -> np.ndarray:
        return np.asarray(padded(np.array([ids + [0] * (160 - len(ids))])))[0, : len(ids)]

    return of


def expected(logits, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    found = logits(context + continuation[:-1])[len(context) - 1 :]
    logps = np.asarray(jax.nn.log_softmax(found))[np.arange(len(continuation)), continuation]
    return float(logps.sum()), bool((found.argmax(-1) == continuation).all())


def greedy(logits, context: list[int], count: int) -> list[int]:
    ids = list(context)
    for _ in range(count):
        ids.append(int(logits(ids)[-1].argmax()))
    return ids[len(context) :]


def check(found: list[tuple[float, bool]], wanted: list[tuple[float, bool]]) -> None:
    np.testing.assert_allclose([logp for logp, _ in found], [logp for logp, _ in wanted], atol=2e-4)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in wanted]


def test_answers_to_shared_and_other_questions(model, logits):
    """One of them greedy; spaces that end a question are its answer's; rows that are too short for all."""
    ids = model.tok_encode
    best = model.tokenizer.decode(greedy(logits, ids("Is it?"), 5))
    assert ids(best) == greedy(logits, ids("Is it?"), 5), "no special tokens, or the test means less"
    answers = [" yes", " no", best, best[:1], "x" * 50, "y" * 50, best]
    requests = [("Is it?", answer) for answer in answers] + [("Why?  ", "not"), ("Why?", "  not"), ("", "no")]
    found = model.loglikelihood(ask("loglikelihood", *requests))
    wanted = [expected(logits, ids("Is it?"), ids(answer)) for answer in answers]
    wanted += [expected(logits, ids("Why?"), ids("  not"))] * 2 + [expected(logits, [model.prefix_token_id], ids("no"))]
    check(found, wanted)
    assert [is_greedy for _, is_greedy in found[:7]] == [False, False, True, True, False, False, True]
    assert ids(BOS)[0] == model.prefix_token_id == model.tokenizer.bos_token_id
    (after_bos,) = model.loglikelihood(ask("loglikelihood", ("", BOS + "no")))  # the BOS is the question then
    check([after_bos], [found[-1]])


def test_a_long_question_loses_its_beginning(model, logits):
    """The last token of an answer is predicted and not read, so that 129 tokens have room."""
    ids = model.tok_encode
    question = "".join(chr(97 + i % 26) for i in range(200))
    found = model.loglikelihood(ask("loglikelihood", (question, "?!"), ("b", "z" * 128)))
    check(found, [expected(logits, ids(question)[-127:], ids("?!")), expected(logits, ids("b"), ids("z" * 128))])


def test_whole_texts(model, logits):
    """Each token is predicted once, behind as much as the model reads."""
    ids = model.tok_encode
    short, long = "How do you do?", "".join(chr(97 + i * i % 26) for i in range(300))
    whole = [model.prefix_token_id, *ids(long)]
    parts = [(whole[:1], whole[1:129]), (whole[128:129], whole[129:257]), (whole[172:257], whole[257:])]
    wanted = [expected(logits, whole[:1], ids(short))[0], sum(expected(logits, *part)[0] for part in parts), 0.0]
    found = model.loglikelihood_rolling(ask("loglikelihood_rolling", (short,), (long,), ("",)))
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_greedy_answers(model, logits):
    """To the first of several stop strings, or to none, and with the beginning of a question cut."""
    ids, decode = model.tok_encode, model.tokenizer.decode
    long = "".join(chr(97 + i % 26) for i in range(196))
    whole = {text: decode(greedy(logits, ids(text)[-118:], 10)) for text in ("Is it?", "Whose?", long, "No")}
    assert [len(whole[text]) for text in ("Is it?", "Whose?", long)] == [10] * 3, "no special tokens"
    assert whole["No"].index(EOS) == 1
    first, second = whole["Is it?"][4:6], whole["Is it?"][7:9]
    assert not any(stop in whole[text] for stop in (first, second) for text in ("Whose?", long))
    settings = {"until": ["never written", first, second], "max_gen_toks": 10, "do_sample": False}
    others = {"until": settings["until"], "max_new_tokens": 10, "num_beams": 1}
    requests = [("Is it?", settings), (long, others), ("No", settings), ("Whose?", others), ("", others)]
    requests.append(("Is it?", settings | {"temperature": 0.7}))  # greedy all the same, as it says
    found = model.generate_until(ask("generate_until", *requests))
    cut = whole["Is it?"].split(first)[0]
    assert len(cut) <= 4 and [*found[:4], found[5]] == [cut, whole[long], whole["No"][0], whole["Whose?"], cut]
    after_bos = decode(greedy(logits, [model.prefix_token_id], 10), skip_special_tokens=True)
    assert after_bos.startswith(found[4]) and found[4]


def test_sampled_answers(model):
    """Repeated, they differ; asked again, they are the same."""
    settings = {"until": "never", "max_gen_toks": 10, "do_sample": True, "temperature": 2.0}
    requests = ask("generate_until", *[("Is it?", settings)] * 4)
    found = model.generate_until(requests)
    assert len(set(found)) == 4 and model.generate_until(requests) == found
    fields = harness.sampling_fields(settings | {"top_p": 0.9, "until": ["", "."]})
    assert fields == {"max_new_tokens": 10, "stop_strings": (".",), "temperature": 2.0, "top_p": 0.9}


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("loglikelihood", ("What?", ""), "task tiny: an answer to 'What?' is empty: mend the task"),
        ("loglikelihood", ("  ", "x"), "no token is left of the question or of its answer"),
        ("loglikelihood", ("x", "y" * 129), "an answer of 129 tokens; the model reads 128 at most"),
        (
            "generate_until",
            ("x", {"max_gen_toks": 128}),
            "answers of 128 tokens (max_gen_toks), and the model reads 128",
        ),
        ("generate_until", ("x", {"num_beams": 4}), "have num_beams, which is not known here: they may have until"),
    ],
)
def test_refusals(model, kind, arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        getattr(model, kind)(ask(kind, arguments))


def test_a_chat_template_is_applied_or_missed(model, directory, tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    assert model.apply_chat_template(turns[:1]) == f"u:Hi{EOS}a:"
    assert model.apply_chat_template(turns, add_generation_prompt=False) == f"u:Hi{EOS}a:Yes"
    bare = tiny_files.write_model(tmp_path)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="the tokenizer has no chat template: leave --apply_chat_template out, or set"):
        harness.HarnessModel(load_model(config_of(bare))).apply_chat_template(turns)


# ---- a real model, against what the `hf` model of the harness said: golden/make_harness_golden.py


@pytest.fixture(scope="module")
def tasks(assets, tmp_path_factory):
    return harness_tasks.write_tasks(assets, tmp_path_factory.mktemp("tasks"))


def test_every_answer_is_that_of_hf(smollm2, tasks):
    """A device alone: what several make of it is seen above."""
    sizes = {"train.row_length": 512, "train.length_multiple": 128, "generate.prompt_bucket": 64}
    model = harness.HarnessModel(load_model(replace(config_of(smollm2), sizes), jax.devices()[:1]))
    harness_tasks.check_same(harness_tasks.ask(model, tasks), json.loads(GOLDEN.read_text()))
