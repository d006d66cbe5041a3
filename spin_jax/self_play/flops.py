"""Count the model FLOPs of an iteration, so that baselines can be given as many.

Count the matmuls of sampling, scoring and training that the algorithm needs for the training rows. Do not count
padding, recomputation or held-out rows.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from spin_jax.data.packing import forward_flops
from spin_jax.data.pairs import Pair, choose
from spin_jax.errors import UserError, as_flag
from spin_jax.reports.record import PETA, spent_flops
from spin_jax.self_play.pairs import is_sampled, pairs_of, sft_pair
from spin_jax.self_play.run import Run
from spin_jax.training.programs import TrainingSpec, is_mixed, is_scored, spin_spec
from spin_jax.training.schedule import check_warmup


def sampling_flops(run: Run, t: int) -> float:
    """FLOPs of sampling the responses that iteration t trains on; 0 if it samples none."""
    if not is_sampled(run, t):
        return 0.0
    return sum(forward_flops(run.model, choose(pair, ["generated"])) for pair in pairs_of(run, t)[0])


def iteration_flops(run: Run, t: int, spec: TrainingSpec, pairs: Sequence[Pair]) -> float:
    """FLOPs of iteration t: sampling, scoring, and training on these pairs."""
    return sampling_flops(run, t) + spec.steps * iteration_step_flops(run, t, spec, pairs)


def iteration_step_flops(run: Run, t: int, spec: TrainingSpec, pairs: Sequence[Pair]) -> float:
    """Mean FLOPs of a training step of iteration t on these pairs, with the scoring that it needs."""
    passes = spec.flops_multiplier + is_scored(run.config.spin) * (1 + is_mixed(run.config.spin, t))
    return passes * _forward_flops(run, pairs)


def sft_flops(run: Run, spec: TrainingSpec, pairs: Sequence[Pair]) -> float:
    """FLOPs of supervised fine-tuning on these pairs."""
    return spec.steps * spec.flops_multiplier * _forward_flops(run, pairs)


def _forward_flops(run: Run, pairs: Sequence[Pair]) -> float:
    """Mean FLOPs of a forward pass over a batch of these pairs."""
    return sum(forward_flops(run.model, pair) for pair in pairs) * run.config.train.batch_size / len(pairs)


def matched_steps(run: Run, t: int, spec: TrainingSpec, pairs: Sequence[Pair]) -> int:
    """Return how many steps iteration t can take for the FLOPs of the same iteration of the run in
    `config.train.match_flops`.

    Raises:
        UserError: there are too few for a step, or for a step after the warm-up.
    """
    return _matched_steps(run, t, sampling_flops(run, t), iteration_step_flops(run, t, spec, pairs))


def check_matched(run: Run) -> None:
    """Refuse FLOPs to match that are certainly too few, before anything is sampled.

    The cost of an iteration is known once its responses are. Before that, count each response as empty. That is a lower
    bound, so `matched_steps` would refuse all that is refused here, after the sampling.

    Raises:
        UserError: as `matched_steps`; or the run in `config.train.match_flops` has no result of an iteration.
    """
    if not run.config.train.match_flops:
        return
    for t in range(run.config.iterations):
        if not (run.iteration(t) / "model" / "config.json").exists():
            _matched_steps(run, t, *_least_flops(run, t), known="at least ")


def _least_flops(run: Run, t: int) -> tuple[float, float]:
    """FLOPs of iteration t if each generated response were empty: (of sampling, of a step with its scoring)."""
    spec = spin_spec(run.config, run.model, run.execution, t, steps=1)
    examples = [sft_pair(run, example) for example in run.train_examples]
    asked = [_with_real_alone(pair, ["generated"]) for pair in examples] if is_sampled(run, t) else []
    sampling = run.config.generate.responses * sum(forward_flops(run.model, pair) for pair in asked)
    pairs = [_with_real_alone(pair, spec.objective.responses) for pair in examples]
    return sampling, iteration_step_flops(run, t, spec, pairs)


def _with_real_alone(pair: Pair, names: Sequence[str]) -> Pair:
    """Give a pair that has a real response the named ones, all empty except the real one."""
    real, empty = pair.responses[0], np.zeros(0, np.int32)
    return dataclasses.replace(pair, responses=tuple(real if name == "real" else empty for name in names))


def _matched_steps(run: Run, t: int, sampling: float, step: float, known: str = "") -> int:
    train = run.config.train
    spent, flag = spent_flops(train.match_flops, t), as_flag("train.match_flops", train.match_flops)
    steps = round((spent - sampling) / step)
    if steps < 1:
        raise UserError(
            f"{flag}: its iteration {t} spent {spent / PETA:.3g} petaflops; here sampling costs {known}"
            f"{sampling / PETA:.3g} and a step {known}{step / PETA:.3g}: name a longer run, or lower "
            "--config.train.batch_size"
        )
    check_warmup(steps, train.warmup_ratio, f"the FLOPs of {flag}")
    return steps
