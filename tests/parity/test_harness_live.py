"""The harness's own `hf` model and ours, live. Needs torch: `pip install torch accelerate`, `pytest tests/parity`."""

import pathlib

import pytest
import tiny_files

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate", reason="the harness's hf model needs it: pip install accelerate")
pytest.importorskip("lm_eval", reason="the harness is not installed: pip install 'spin_jax[eval]'")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from spin_jax.evaluation import harness  # noqa: E402
from spin_jax.evaluation.loaded_model import load_model  # noqa: E402


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A tiny model as ours and as theirs."""
    directory = tiny_files.write_model(tmp_path_factory.mktemp("tiny"))
    config = tiny_files.make_config(directory, pathlib.Path("not read"))
    theirs = HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=3)
    return harness.HarnessModel(load_model(config)), theirs


def ask(kind: str, *arguments: tuple) -> list:
    return [Instance(kind, {}, one, i, metadata=("tiny", i, 1)) for i, one in enumerate(arguments)]


LONG = "".join(chr(97 + i * i % 26) for i in range(300))  # and the model reads 128
CHOICES = [("What? ", answer) for answer in (" yes", "no", "m", "x" * 50)]
CHOICES += [("", "no"), ("", "<s>no"), ("<s>What?", " yes"), (LONG, "ab"), ("a", "b" * 128), ("\n a", " b\n")]


def test_choices(both):
    """Spaces at the border, no question, a BOS that is written, and what is too long."""
    ours, theirs = (model.loglikelihood(ask("loglikelihood", *CHOICES)) for model in both)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [logp for logp, _ in ours] == pytest.approx([logp for logp, _ in theirs], abs=1e-3)


def test_whole_texts(both):
    requests = ask("loglikelihood_rolling", ("How do you do?",), (LONG,), ("",), ("<s>Hm",))
    ours, theirs = (model.loglikelihood_rolling(requests) for model in both)
    assert ours == pytest.approx(theirs, abs=2e-3)


def test_answers(both):
    """Two stop strings or none, ends of the model's own, and a question that is too long."""
    texts = ("Is it?", "Whose?", "No", "Yes", "Which?", "Go on ", LONG[:196])
    requests = ask("generate_until", *[(text, {"until": ["mS", "_$"], "max_gen_toks": 10}) for text in texts])
    requests += ask(
        "generate_until",
        *[
            (text, {"until": ["mS", "_$"], "max_gen_toks": 10, "do_sample": False, "temperature": 0.7})
            for text in texts
        ],
    )
    ours, theirs = (model.generate_until(requests) for model in both)
    assert ours == theirs


def test_chat(both):
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    for length, more in ((2, True), (3, False), (4, True)):
        ours, theirs = (model.apply_chat_template(turns[:length], more) for model in both)
        assert ours == theirs
    assert both[0].chat_template(True) == both[1].chat_template(True)
    assert both[0].tokenizer_name == both[1].tokenizer_name
