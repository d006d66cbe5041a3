"""Model FLOPs that an iteration spends, as the algorithm asks for them: what baselines are matched by.

Counted are the matmuls of sampling, scoring and training on the rows to train on, without padding and recomputation.
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
    """Of the responses that were written for iteration t to train on; 0 where it takes those of the data, or none."""
    if not is_sampled(run, t):
        return 0.0
    return sum(forward_flops(run.model, choose(pair, ["generated"])) for pair in pairs_of(run, t)[0])


def iteration_flops(run: Run, t: int, spec: TrainingSpec, pairs: Sequence[Pair]) -> float:
    """Of iteration t, whose steps are on such pairs: sampling, scoring, training."""
    return sampling_flops(run, t) + spec.steps * iteration_step_flops(run, t, spec, pairs)


def iteration_step_flops(run: Run, t: int, spec: TrainingSpec, pairs: Sequence[Pair]) -> float:
    """Of a step of iteration t on such pairs, on average, and of the scoring that it needs."""
    passes = spec.flops_multiplier + is_scored(run.config.spin) * (1 + is_mixed(run.config.spin, t))
    return passes * _forward_flops(run, pairs)


def sft_flops(run: Run, spec: TrainingSpec, pairs: Sequence[Pair]) -> float:
    """Of supervised fine-tuning whose steps are on such pairs."""
    return spec.steps * spec.flops_multiplier * _forward_flops(run, pairs)


def _forward_flops(run: Run, pairs: Sequence[Pair]) -> float:
    """Of a forward pass over a batch of such pairs, on average."""
    return sum(forward_flops(run.model, pair) for pair in pairs) * run.config.train.batch_size / len(pairs)


def matched_steps(run: Run, t: int, spec: TrainingSpec, pairs: Sequence[Pair]) -> int:
    """Steps for which iteration t spends what the same iteration of the run in `config.train.match_flops` has spent.

    Raises:
        UserError: they are not enough for a step, or for no step after the warm-up.
    """
    return _matched_steps(run, t, sampling_flops(run, t), iteration_step_flops(run, t, spec, pairs))


def check_matched(run: Run) -> None:
    """Refuse FLOPs to match that cannot be enough, before anything is sampled.

    What an iteration costs is known when its responses are there. Until then each counts as empty, which is a lower
    bound: whatever is refused here would be refused by `matched_steps`, after the sampling.

    Raises:
        UserError: as `matched_steps`; or the run in `config.train.match_flops` has no result of an iteration.
    """
    if not run.config.train.match_flops:
        return
    for t in range(run.config.iterations):
        if not (run.iteration(t) / "model" / "config.json").exists():
            _matched_steps(run, t, *_least_flops(run, t), known="at least ")


def _least_flops(run: Run, t: int) -> tuple[float, float]:
    """(of sampling, of a step and its scoring) of iteration t, if each generated response were empty."""
    spec = spin_spec(run.config, run.model, run.execution, t, steps=1)
    examples = [sft_pair(run, example) for example in run.train_examples]
    asked = [_with_real_alone(pair, ["generated"]) for pair in examples] if is_sampled(run, t) else []
    sampling = run.config.generate.responses * sum(forward_flops(run.model, pair) for pair in asked)
    pairs = [_with_real_alone(pair, spec.objective.responses) for pair in examples]
    return sampling, iteration_step_flops(run, t, spec, pairs)


def _with_real_alone(pair: Pair, names: Sequence[str]) -> Pair:
    """A pair of the real response with the named responses, all of them empty but the real one."""
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
