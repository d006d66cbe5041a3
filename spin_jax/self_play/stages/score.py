"""The score stage: the opponent's log-probs of the pairs of every training step, and of the held-out ones."""

import itertools
from collections.abc import Sequence

import numpy as np
from etils import epath

from spin_jax.data.packing import Plan, make_packing, plan_scoring
from spin_jax.data.pairs import Pair
from spin_jax.devices import sharding
from spin_jax.evaluation import scoring
from spin_jax.evaluation.score_files import Parts, delete_parts, read_scores, write_scores
from spin_jax.evaluation.scoring import score, score_steps, scores_key
from spin_jax.runtime import multihost, out_of_memory
from spin_jax.self_play.pairs import pairs_of
from spin_jax.self_play.run import Run
from spin_jax.self_play.training_stage import TrainingStage, first_state, is_trained, spin_stage
from spin_jax.training import programs

EVALUATION_PARTS = "evaluation-part"  # what a cut evaluation leaves to the next one


@out_of_memory.tells("score", out_of_memory.for_training)
def score_pairs(run: Run, t: int) -> None:
    """The opponent's log-probs of the pairs of every training step, `scores/steps.npz`, and of the held-out ones,
    `scores/held_out.npz`.

    Nothing is done where they are there, made by the programs that this run trains with, nor once the iteration has
    trained. With a live opponent, or without a reference, only the held-out pairs are scored.
    """
    if is_trained(run.iteration(t)):
        return
    held_out_scores(run, t)
    if programs.is_scored(run.config.spin):
        step_scores(run, t, spin_stage(run, t))


def score_pairs_of(
    run: Run, model: epath.Path, pairs: Sequence[Pair], name: str, kept: tuple[epath.Path, str] | None = None
) -> np.ndarray:
    """Log-probs of pairs, [pairs, Y], under the model in a directory. `kept`: where, and by what name, a pass that is
    cut leaves what it has scored to the next."""
    if not pairs:
        return np.zeros((0, 2), np.float32)
    plan, parts = _scoring_plan(run, pairs), None
    if kept:
        key = scores_key(pairs, plan, run.compute, model=run.store.identity_of(model))
        parts = Parts(kept[0], key, run.config.train.checkpoint_every, kept[1])
    return score(
        scoring.make_scorer(run.model, run.compute),
        run.store.params(model),
        run.model,
        pairs,
        plan,
        sharding=sharding.batch_sharding(run.compute.mesh),
        name=name,
        parts=parts,
    )


def _scoring_plan(run: Run, pairs: Sequence[Pair]) -> Plan:
    settings = run.config.train
    packing = make_packing(settings, run.compute.mesh)
    return plan_scoring(pairs, settings.batch_size // settings.micro_batches, packing)


def held_out_scores(run: Run, t: int) -> np.ndarray:
    """log p_t of the held-out pairs of iteration t, [pairs, Y]: stored, or computed and stored."""
    pairs = pairs_of(run, t)[1]
    if not pairs:
        return np.zeros((0, 2), np.float32)
    directory, start = run.iteration(t) / "scores", run.start_of(t)
    path, kept = directory / "held_out.npz", (directory, "held_out-part")
    key = scores_key(pairs, _scoring_plan(run, pairs), run.compute, model=run.store.identity_of(start))
    logps = multihost.on_first(lambda: read_scores(path, key))
    if logps is None:
        logps = score_pairs_of(run, start, pairs, f"iteration {t}: score held-out pairs", kept)
        multihost.on_first(lambda: write_scores(path, key, logps, pairs))
        multihost.on_first(lambda: delete_parts(*kept))
    return logps


def steps_path(run: Run, t: int) -> epath.Path:
    return run.iteration(t) / "scores" / "steps.npz"


def step_scores(run: Run, t: int, stage: TrainingStage) -> np.ndarray:
    """log p_t of the pairs of each training step of iteration t, [steps, pairs of a batch, Y]: stored, or computed and
    stored. Those of another mesh or version of jax are made anew: they would not cancel."""
    path, model = steps_path(run, t), run.store.identity_of(stage.start)
    key = scores_key(stage.pairs, stage.plan, run.compute, stage.spec.micro_batches, model)
    logps = multihost.on_first(lambda: read_scores(path, key))
    if logps is None:
        state, frozen = first_state(run, stage)
        state, logps = score_steps(
            programs.make_training(stage.spec).step,
            state,
            frozen,
            plan=stage.plan,
            make_batch=stage.make_batch(run),
            sharding=sharding.batch_sharding(run.compute.mesh),
            parts=Parts(path.parent, key, run.config.train.checkpoint_every),
            name=f"iteration {t}: score",
        )
        scored = [stage.pairs[i] for rows in stage.plan.batches for i in itertools.chain(*rows)]
        multihost.on_first(lambda: write_scores(path, key, logps, scored))
        if not stage.spec.rank:
            run.store.keep_params(stage.start, state.params)  # which training starts from
    return logps
