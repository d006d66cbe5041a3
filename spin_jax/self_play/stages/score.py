"""The score stage: the opponent's log-probs of the pairs of every training step, and of the held-out ones."""

import itertools
from collections.abc import Sequence

import numpy as np
from etils import epath

from spin_jax.data.pairs import Pair
from spin_jax.evaluation.score_files import Parts, delete_parts, read_scores, write_scores
from spin_jax.evaluation.scoring import Scorer, StepProgram, score_batches, scores_key
from spin_jax.runtime import multihost, out_of_memory
from spin_jax.self_play.pairs import pairs_of
from spin_jax.self_play.run import Run
from spin_jax.self_play.training_stage import TrainingStage, is_trained, spin_stage
from spin_jax.training import programs

EVALUATION_PARTS = "evaluation-part"  # what an interrupted evaluation leaves to the next one


@out_of_memory.tells("score", out_of_memory.for_training)
def score_pairs(run: Run, t: int) -> None:
    """Compute the opponent's log-probs of the pairs of every training step (`scores/steps.npz`) and of the held-out
    pairs (`scores/held_out.npz`).

    Do nothing if the iteration has trained, or if the files hold scores by the programs that this run trains with. With
    a live opponent, or without a reference, score the held-out pairs only.
    """
    if is_trained(run.iteration(t)):
        return
    held_out_scores(run, t)
    if programs.is_scored(run.config.spin):
        step_scores(run, t, spin_stage(run, t))


def score_pairs_of(
    run: Run, model: epath.Path, pairs: Sequence[Pair], name: str, parts: tuple[epath.Path, str] | None = None
) -> np.ndarray:
    """Return log-probs of pairs, [pairs, Y], under the model in a directory.

    Args:
        parts: (directory, name) of files that keep the scores of an interrupted pass for the next one.
    """
    scorer, kept = _scorer(run), None
    if parts:
        directory, file = parts
        key = scorer.key(pairs, run.store.identity_of(model))
        kept = Parts(directory, key, run.config.train.checkpoint_every, file)
    return scorer.score(run.store.params(model), pairs, name, kept)


def _scorer(run: Run) -> Scorer:
    return Scorer(run.model, run.config.train, run.execution)


def held_out_scores(run: Run, t: int) -> np.ndarray:
    """Return log p_t of iteration t's held-out pairs, [pairs, Y]. Read stored scores, or compute and store them."""
    pairs = pairs_of(run, t)[1]
    if not pairs:
        return np.zeros((0, 2), np.float32)
    directory, start = run.iteration(t) / "scores", run.start_of(t)
    path, parts = directory / "held_out.npz", (directory, "held_out-part")
    key = _scorer(run).key(pairs, run.store.identity_of(start))
    logps = multihost.on_process_zero(lambda: read_scores(path, key))
    if logps is None:
        logps = score_pairs_of(run, start, pairs, f"iteration {t}: score held-out pairs", parts)
        multihost.on_process_zero(lambda: write_scores(path, key, logps, pairs))
        multihost.on_process_zero(lambda: delete_parts(*parts))
    return logps


def steps_path(run: Run, t: int, name: str = "steps") -> epath.Path:
    return run.iteration(t) / "scores" / f"{name}.npz"


def step_scores(run: Run, t: int, stage: TrainingStage) -> np.ndarray:
    """Return the reference's log-probs of the pairs of each training step of iteration t, [steps, pairs of a batch, Y].

    They are the opponent's, or alpha log p_t + (1 - alpha) log p_0 with alpha = `config.spin.opponent_share`. The
    normaliser of this geometric mixture depends on the prompt alone, and cancels in a margin, so it is left out.
    """
    if not programs.is_mixed(run.config.spin, t):
        return _step_scores_of(run, t, stage, stage.start)
    share = np.float32(run.config.spin.opponent_share)
    first = _step_scores_of(run, t, stage, run.start_of(0), "first_steps")
    return share * _step_scores_of(run, t, stage, stage.start) + (1 - share) * first


def _step_scores_of(run: Run, t: int, stage: TrainingStage, start: epath.Path, name: str = "steps") -> np.ndarray:
    """Return log-probs under the model in `start`. Read those that are stored under a name, or compute and store them.
    Scores of another mesh or version of jax are not used: their rounding would not cancel the policy's."""
    path, model = steps_path(run, t, name), run.store.identity_of(start)
    key = scores_key(stage.pairs, stage.plan, run.execution, run.config.train.micro_batches, model)
    logps = multihost.on_process_zero(lambda: read_scores(path, key))
    if logps is None:
        program = StepProgram(stage.training.step, *stage.training.begin(run.store.take_params(start), stage.seed))
        parts = Parts(path.parent, key, run.config.train.checkpoint_every)
        loop = f"iteration {t}: score" + (" under theta_0" if start != stage.start else "")
        logps = np.stack(score_batches(program, stage.make_batch(run), stage.plan, loop, parts))
        scored = [stage.pairs[i] for rows in stage.plan.batches for i in itertools.chain(*rows)]
        multihost.on_process_zero(lambda: write_scores(path, key, logps, scored))
        if not run.config.lora.rank:
            run.store.keep_params(start, program.state.params)  # training starts from them
    return logps
