"""Exact measures of the toy task, whose data distribution is known."""

from collections.abc import Sequence

import numpy as np

from spin_jax.config import Config
from spin_jax.data.sources import Example
from spin_jax.evaluation.interface import Evaluator, Subject
from spin_jax.tasks import toy


def _measure(subject: Subject) -> dict[str, float]:
    settings = subject.config.toy
    _, unseen = toy.make_examples(subject.config.seed, settings.train_rows, settings.eval_prompts)

    def logprobs(examples: Sequence[Example]) -> np.ndarray:
        return subject.logprobs(subject.encode(examples), "exact measures")[:, 0]

    return toy.exact_measures(logprobs, unseen)


def _refusal(config: Config) -> str | None:
    return None if config.data.train == "toy:" else "measures the task of --config.data.train=toy: alone: leave it out"


exact = Evaluator(_measure, _refusal, auto=True)
