"""Measure the models of a run: a row of the summary for each."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from etils import epath

from spin_jax.data.pairs import Pair, TokenIds
from spin_jax.data.sources import Example
from spin_jax.data.tokenize import tokenise
from spin_jax.evaluation.interface import Subject, evaluate, is_due
from spin_jax.evaluation.score_files import delete_parts
from spin_jax.generation.engine import Engine, Progress
from spin_jax.generation.response_files import Response
from spin_jax.reports.record import PETA, SPENT, read_result, write_result
from spin_jax.runtime import metric_writer, multihost, out_of_memory
from spin_jax.self_play.flops import iteration_flops
from spin_jax.self_play.pairs import pairs_of, sft_pair
from spin_jax.self_play.run import Run
from spin_jax.self_play.stages.score import EVALUATION_PARTS, held_out_scores, score_pairs_of
from spin_jax.self_play.training_stage import spin_spec
from spin_jax.training.programs import reads_generated


@out_of_memory.tells("evaluate", out_of_memory.for_training)
def evaluate_start(run: Run) -> None:
    """Measure theta_0, for the summary's first row. As the opponent of iteration 0 it has scored the held-out pairs."""

    def measure() -> dict:
        start = _subject(run, 0, "SFT", run.start_of(0), run.workdir, " SFT")
        return evaluate(dataclasses.replace(start, held_out_logps=functools.partial(held_out_scores, run, 0)))

    _measure_once(run.workdir, measure)


@out_of_memory.tells("evaluate", out_of_memory.for_training)
def evaluate_policy(run: Run, t: int) -> None:
    """Measure theta_{t+1}, for its row of the summary, with the lengths of its opponent's responses. Without held-out
    pairs, take the metrics of the last training step."""

    def measure() -> dict:
        train, held_out = pairs_of(run, t)
        known = {SPENT: iteration_flops(run, t, *spin_spec(run, t)) / PETA}
        if written := train if reads_generated(run.config.spin) else held_out:
            known["generated/tokens"] = float(np.mean([len(pair.responses[1]) for pair in written]))
            known["generated/truncated"] = float(np.mean([pair.truncated[1] for pair in written]))
        if not held_out:
            known |= _last_step(run.iteration(t))
        policy = _subject(run, t, f"iteration {t}", run.start_of(t + 1), run.iteration(t))
        opponent_logps = functools.partial(held_out_scores, run, t)
        return evaluate(
            dataclasses.replace(policy, iteration=t, opponent_logps=opponent_logps), known, costly=is_due(run.config, t)
        )

    _measure_once(run.iteration(t), measure)


def evaluate_control(run: Run, t: int, directory: epath.Path, spent: Callable[[], float]) -> None:
    """Measure the baseline of iteration t in `directory`, for its row of the summary. `spent` gives the FLOPs that it
    was trained for."""

    def measure() -> dict:
        subject = _subject(run, t, f"SFT control {t}", directory / "model", directory, " SFT control")
        return evaluate(subject, {SPENT: spent() / PETA}, costly=is_due(run.config, t))

    _measure_once(directory, measure)


def _measure_once(directory: epath.Path, measure: Callable[[], dict]) -> None:
    """Write `result.json`, a row of the summary, in a directory, unless it has one that can be read."""
    if not multihost.on_process_zero(lambda: read_result(directory)):
        row = measure()
        multihost.on_process_zero(lambda: write_result(directory, row))
        multihost.on_process_zero(lambda: delete_parts(directory, EVALUATION_PARTS))


def _subject(run: Run, t: int, name: str, model: epath.Path, directory: epath.Path, whose: str = "") -> Subject:
    """Describe the model in a directory for evaluators, which measure it on the held-out pairs of iteration t.

    Args:
        directory: of its result.
        whose: ends the name of its progress bar.
    """
    held_out = pairs_of(run, t)[1]

    @functools.cache
    def held_out_logps() -> np.ndarray:
        kept = (directory, EVALUATION_PARTS)
        return score_pairs_of(run, model, held_out, f"iteration {t}: evaluate{whose}", kept)

    def encode(examples: Sequence[Example]) -> list[Pair]:
        return multihost.parallel_map(lambda example: sft_pair(run, example, tokenise(run.chat, example)), examples)

    def generate(
        prompts: Sequence[TokenIds] | Mapping[int, TokenIds], iteration: int = 0, **changes: object
    ) -> list[Response]:
        settings = dataclasses.replace(run.config.generate, **changes)
        engine = Engine.for_chat(run.model, settings, run.decode, run.chat)
        progress = Progress(f"iteration {t}: sample{whose}")
        return engine.generate(
            run.store.params(model), prompts, seed=run.config.seed, iteration=iteration, progress=progress
        )

    return Subject(
        name=name,
        config=run.config,
        chat=run.chat,
        directory=directory,
        source=run.source,
        identity=functools.partial(run.store.identity_of, model),
        params=functools.partial(run.store.params, model),
        encode=encode,
        logprobs=functools.partial(score_pairs_of, run, model),
        generate=generate,
        held_out=held_out,
        held_out_examples=run.held_out_examples,
        held_out_prompts={example.row: run.asked(example.row) for example in run.held_out_examples},
        held_out_logps=held_out_logps,
    )


def _last_step(iteration: epath.Path) -> dict[str, float]:
    """Return margin and accuracy of an iteration's last training step, if its objective has them, for a summary without
    held-out rows."""
    row = metric_writer.read_metrics(iteration / metric_writer.FILE_NAME)[-1]
    return {f"last_step/{name}": row[name] for name in ("rewards/accuracy", "rewards/margin") if name in row}
