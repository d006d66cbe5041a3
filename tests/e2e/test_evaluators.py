"""What an evaluator can do with a model of a run: sample from it, score with it, keep files."""

import numpy as np
import tiny_files

import spin_jax
from spin_jax.data.pairs import Pair
from spin_jax.data.sources import Example
from spin_jax.evaluation import EVALUATORS
from spin_jax.evaluation.interface import Evaluator, Subject
from spin_jax.reports.record import RunRecord


def greedy(subject: Subject) -> dict[str, float]:
    """Greedy responses to the held-out prompts: how long they are, and how likely by the engine and by the scorer."""
    prompts = [pair.prompt for pair in subject.held_out]
    responses = subject.generate(prompts, temperature=0.0, max_new_tokens=5)
    pairs = [
        Pair(row, -1, prompt, (response.tokens, response.tokens[:1]), (response.truncated, True))
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]
    logps = subject.logprobs(pairs, "greedy, scored")
    sampled = [(float(response.logprobs.sum()), float(response.logprobs[0])) for response in responses]
    np.testing.assert_allclose(logps, sampled, rtol=1e-4, atol=1e-4)
    (subject.directory / "greedy.txt").write_text("\n".join(subject.chat.codec.decode(y.tokens) for y in responses))
    examples = [Example(0, ({"role": "user", "content": "abc"},), "cba")]
    (encoded,) = subject.encode(examples)
    assert subject.chat.codec.decode(encoded.responses[0]) == "cba"
    longest = max(len(response.tokens) for response in responses)
    return {"greedy/logp": float(np.mean(logps[:, 0])), "greedy/longest": longest}


def test_an_evaluator_samples_scores_and_keeps_files(tiny_model, tmp_path, own_registries):
    """Of the model that a run starts from, and of the one that it makes; its numbers are in the summary."""
    EVALUATORS.register("greedy", Evaluator(greedy))
    settings = {"iterations": 1, "evaluate.evaluators": ("greedy",)}
    spin_jax.spin(spin_jax.load(tiny_model), tiny_files.make_rows(), tmp_path, tiny_files.SETTINGS | settings)
    start, policy = RunRecord.load(tmp_path).results
    assert start["model"] == "SFT" and policy["model"] == "iteration 0" and policy["iteration"] == 0
    for row, directory in ((start, tmp_path), (policy, tmp_path / "iteration_0")):
        assert row["greedy/logp"] < 0 and 1 <= row["greedy/longest"] <= 5
        assert not any(name.startswith("held_out") for name in row), "the one evaluator that was named"
        assert len((directory / "greedy.txt").read_text().splitlines()) >= 1
    assert start["greedy/logp"] != policy["greedy/logp"]
    assert "greedy" in (tmp_path / "summary.txt").read_text()
