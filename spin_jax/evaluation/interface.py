"""What an evaluator is, what it is given, and which ones the config means."""

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
    """A model that is measured, and what a run can do with it. All functions are called by all processes alike.

    Attributes:
        name: "SFT", "iteration 0" or "SFT control 0".
        config: of the run.
        chat: the tokenizer, and the template of prompts.
        directory: where its result goes; an evaluator may keep files there.
        source: of the run's tokenizer and description, which all of its models have.
        identity: () -> its `checkpoints.fingerprint`.
        params: () -> its weights, f32, on the training mesh.
        encode: examples -> token ids of their prompts and responses, in the run's template and cut to its budget.
        logprobs: (pairs, name of the progress bar) -> the model's log-probs of the responses of each, f32 [pairs, Y],
            in nats. A pair is a prompt with any number of responses.
        generate: (token ids of prompts, iteration whose seeds are drawn with, fields of `config.generate` other than
            the run's) -> what `generation.engine.Engine.generate` returns for them.
        held_out: pairs of real and generated responses to the held-out prompts. The opponent of the iteration wrote the
            generated ones.
        held_out_examples: the rows of data that these are of, one for each prompt.
        held_out_prompts: row -> the token ids that a model is asked with, in the order of the examples.
        held_out_logps: () -> the model's log-probs of these, f32 [pairs, 2], in nats.
        opponent_logps: () -> the opponent's; None for a model that has no opponent.
        iteration: the number of the iteration that trained it against its opponent; None for the others.
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
        measure: a model -> {name: number}, which go into `result.json` and the summary. Called by all processes.
        refusal: config of a run -> why its models cannot be measured, if so; read after the evaluator's name.
        auto: whether "auto" takes it where it can measure: it costs little, or a field of its own asks for it.
        costly: whether `config.evaluate.every` says of which iterations it measures models.
    """

    measure: Callable[[Subject], dict[str, float]]
    refusal: Callable[[Config], str | None] = no_refusal
    auto: bool = False
    costly: bool = False


def needs_held_out(config: Config) -> str | None:
    """The `refusal` of an evaluator that measures on held-out rows."""
    return None if config.data.eval_rows else "needs held-out rows: set --config.data.eval_rows, or leave it out"


def chosen(config: Config) -> dict[str, Evaluator]:
    """The evaluators that `config.evaluate.evaluators` names, in its order; "auto" stands for those that the run's data
    allow.

    Raises:
        UserError: one was asked for by name that cannot measure models of this run.
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
    """The summary's row of a model: its name, what is known of it already, and what the evaluators of the run find; the
    costly ones only if asked."""
    row: dict[str, object] = {"model": subject.name, "iteration": subject.iteration, **(known or {})}
    for evaluator in chosen(subject.config).values():
        if costly or not evaluator.costly:
            row |= evaluator.measure(subject)
    return row
