"""What a trained model is measured by: its row of the summary."""

from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from spin_jax.config import at_iteration
from spin_jax.data.sources import Example
from spin_jax.data.tokenize import tokenise
from spin_jax.evaluation.rewards import held_out_rewards, nats_per_token
from spin_jax.evaluation.score_files import delete_parts
from spin_jax.reports.record import read_result, write_result
from spin_jax.runtime import metric_writer, multihost, out_of_memory
from spin_jax.self_play.pairs import pairs_of, sft_pair
from spin_jax.self_play.run import Run
from spin_jax.self_play.stages.score import EVALUATION_PARTS, held_out_scores, score_pairs_of


@out_of_memory.tells("evaluate", out_of_memory.for_training)
def describe_start(run: Run) -> None:
    """The summary's first row: theta_0, the opponent of iteration 0, which has scored the held-out pairs."""

    def measure() -> dict:
        row = {"model": "SFT", "iteration": None}
        if held_out := pairs_of(run, 0)[1]:
            row["held_out/nats_per_token"] = nats_per_token(held_out, held_out_scores(run, 0))
        return row | exact_measures(run, run.start_of(0))

    measure_once(run.workdir, measure)


@out_of_memory.tells("evaluate", out_of_memory.for_training)
def evaluate_policy(run: Run, t: int) -> None:
    """The summary's row of theta_{t+1}: rewards of held-out pairs against the opponent of iteration t, which wrote
    their y'. Without held-out pairs, what the last training step had."""

    def measure() -> dict:
        train, held_out = pairs_of(run, t)
        row = {"model": f"iteration {t}", "iteration": t}
        row["generated/tokens"] = float(np.mean([len(pair.responses[1]) for pair in train]))
        row["generated/cut"] = float(np.mean([pair.truncated[1] for pair in train]))
        if not held_out:
            return row | _last_step(run.iteration(t)) | exact_measures(run, run.start_of(t + 1))
        kept = run.iteration(t), EVALUATION_PARTS
        by_policy = score_pairs_of(run, run.start_of(t + 1), held_out, f"iteration {t}: evaluate", kept)
        row["held_out/nats_per_token"] = nats_per_token(held_out, by_policy)
        row |= held_out_rewards(by_policy, held_out_scores(run, t), at_iteration(run.config.spin.beta, t))
        return row | exact_measures(run, run.start_of(t + 1))

    measure_once(run.iteration(t), measure)


def _last_step(iteration: epath.Path) -> dict[str, float]:
    """Margin and accuracy of an iteration's last training step, as far as its objective has them, for a summary without
    held-out rows."""
    row = metric_writer.read_metrics(iteration / metric_writer.FILE_NAME)[-1]
    return {f"last_step/{name}": row[name] for name in ("rewards/accuracy", "rewards/margin") if name in row}


def measure_once(directory: epath.Path, measure: Callable[[], dict]) -> None:
    """`result.json` in a directory: a row of the summary, measured where there is none that can be read."""
    if not multihost.on_first(lambda: read_result(directory)):
        row = measure()
        multihost.on_first(lambda: write_result(directory, row))
        multihost.on_first(lambda: delete_parts(directory, EVALUATION_PARTS))


def exact_measures(run: Run, model: epath.Path) -> dict[str, float]:
    """What can be computed exactly where the data distribution is known: nothing, unless the task is the toy one."""
    if run.config.data.train != "toy:":
        return {}
    from spin_jax.tasks import toy

    settings = run.config.toy
    _, unseen = toy.make_examples(run.config.seed, settings.train_rows, settings.eval_prompts)

    def logprobs(examples: Sequence[Example]) -> np.ndarray:
        pairs = multihost.shared(lambda example: sft_pair(run, example, tokenise(run.chat, example)), examples)
        return score_pairs_of(run, model, pairs, "exact measures")[:, 0]

    return toy.exact_measures(logprobs, unseen)
