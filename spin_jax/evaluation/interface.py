"""Define evaluators: what one is, what it is given, and which ones a config names."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from etils import epath

from spin_jax.config import Config
from spin_jax.data.chat_format import ChatFormat
from spin_jax.data.pairs import Pair
from spin_jax.data.sources import Example
from spin_jax.errors import UserError
from spin_jax.evaluation import EVALUATORS
from spin_jax.registry import no_refusal


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to measure, and what can be done with it. All processes must call its functions alike.

    Attributes:
        name: "SFT", "iteration 0" or "SFT control 0".
        config: of the run.
        chat: the tokenizer, and the template of prompts.
        directory: of its result; an evaluator may write files there.
        source: directory of the run's tokenizer and description, which all of its models share.
        identity: () -> the model's `checkpoints.fingerprint`.
        params: () -> its weights, f32, on the training mesh.
        encode: examples -> token ids of their prompts and responses, in the run's template and cut to its budget.
        logprobs: (pairs, name of the progress bar) -> the model's log-probs of the responses of each, f32 [pairs, Y],
            in nats. A pair is a prompt with any number of responses.
        generate: (token ids of prompts, iteration whose seeds to use, changes to fields of `config.generate`) -> what
            `generation.engine.Engine.generate` returns.
        held_out: pairs of real and generated responses to the held-out prompts. The iteration's opponent wrote the
            generated ones.
        held_out_examples: the examples of these pairs, one for each prompt.
        held_out_prompts: row -> the token ids that a model is asked with, in the order of the examples.
        held_out_logps: () -> the model's log-probs of `held_out`, f32 [pairs, 2], in nats.
        opponent_logps: () -> the opponent's log-probs; None for a model without an opponent.
        iteration: the iteration that trained the model against its opponent; None for other models.
    """

    name: str
    config: Config
    chat: ChatFormat
    directory: epath.Path
    source: epath.Path
    identity: Callable[[], Mapping[str, str]]
    params: Callable[[], dict]
    encode: Callable[[Sequence[Example]], list[Pair]]
    logprobs: Callable[[Sequence[Pair], str], np.ndarray]
    generate: Callable[..., list]
    held_out: Sequence[Pair]
    held_out_examples: Sequence[Example]
    held_out_prompts: Mapping[int, np.ndarray]
    held_out_logps: Callable[[], np.ndarray]
    opponent_logps: Callable[[], np.ndarray] | None = None
    iteration: int | None = None


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Measures of a model.

    Attributes:
        measure: model -> {name: number}, for `result.json` and the summary. All processes call it.
        refusal: config of a run -> why its models cannot be measured, worded to follow the evaluator's name; None if
            they can.
        auto: whether "auto" includes it, where it can measure. Such an evaluator costs little, or a field of its own
            asks for it.
        costly: whether it measures only the iterations that `config.evaluate.every` names.
    """

    measure: Callable[[Subject], dict[str, float]]
    refusal: Callable[[Config], str | None] = no_refusal
    auto: bool = False
    costly: bool = False


def needs_held_out(config: Config) -> str | None:
    """The `refusal` of an evaluator that measures on held-out rows."""
    return None if config.data.eval_rows else "needs held-out rows: set --config.data.eval_rows, or leave it out"


def chosen(config: Config) -> dict[str, Evaluator]:
    """Return the evaluators that `config.evaluate.evaluators` names, in its order. "auto" stands for all with `auto`
    that can measure models of this run.

    Raises:
        UserError: an evaluator named in the config cannot measure models of this run.
    """
    found = {}
    for asked in config.evaluate.evaluators:
        for name in EVALUATORS if asked == "auto" else (asked,):
            evaluator = EVALUATORS[name]
            reason = evaluator.refusal(config)
            if asked == "auto" and (reason or not evaluator.auto):
                continue
            if reason:
                raise UserError(f"--config.evaluate.evaluators: {name} {reason}")
            found[name] = evaluator
    return found


def is_due(config: Config, t: int) -> bool:
    """Whether costly evaluators measure the models of iteration t."""
    return (t + 1) % config.evaluate.every == 0 or t + 1 == config.iterations


def evaluate(subject: Subject, known: Mapping[str, float] | None = None, *, costly: bool = True) -> dict[str, object]:
    """Return a model's row of the summary: its name, what is `known` already, and what the run's evaluators measure,
    without the costly ones unless `costly`."""
    row: dict[str, object] = {"model": subject.name, "iteration": subject.iteration, **(known or {})}
    for evaluator in chosen(subject.config).values():
        if costly or not evaluator.costly:
            row |= evaluator.measure(subject)
    return row
