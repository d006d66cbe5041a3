"""The baseline of an iteration: plain SFT for as much compute."""

from collections.abc import Sequence

from spin_jax.data.packing import forward_flops
from spin_jax.data.pairs import Pair, choose
from spin_jax.runtime import out_of_memory
from spin_jax.self_play.pairs import pairs_of, sft_pairs
from spin_jax.self_play.run import Run
from spin_jax.self_play.stages.evaluate import evaluate_control
from spin_jax.self_play.training_stage import export_model, fit_stage, is_trained, sft_stage, spin_stage
from spin_jax.training import programs


@out_of_memory.tells("SFT control", out_of_memory.for_training)
def continue_sft(run: Run, t: int) -> None:
    """The baseline: plain SFT of the same start, on the same examples, for the FLOPs that iteration t spent, and its
    summary row."""
    directory = run.iteration(t) / "control"
    start = run.iteration(t - 1) / "control" / "model" if t else run.start_of(0)
    if not is_trained(directory):
        pairs = sft_pairs(run)
        steps = max(1, round(_iteration_flops(run, t) / _sft_step_flops(run, pairs)))
        stage = sft_stage(run, start, pairs, steps, run.config.sft.control_learning_rate)
        name = f"iteration {t}: SFT control"
        export_model(run, directory, fit_stage(run, stage, stage.make_batch(run), directory, name))
    evaluate_control(run, t, directory)


def _iteration_flops(run: Run, t: int) -> float:
    """Model FLOPs that iteration t spends on its training rows: sampling, scoring, training."""
    stage = spin_stage(run, t)
    sampling = sum(forward_flops(run.model, choose(pair, ["generated"])) for pair in pairs_of(run, t)[0])
    spin = run.config.spin
    passes = stage.spec.flops_multiplier + programs.is_scored(spin) * (1 + programs.is_mixed(spin, t))
    return sampling + passes * stage.spec.steps * _forward_flops(run, stage.pairs)


def _sft_step_flops(run: Run, pairs: Sequence[Pair]) -> float:
    spec = programs.sft_spec(run.config, run.model, run.execution, peak=0.0, steps=1)
    return spec.flops_multiplier * _forward_flops(run, pairs)


def _forward_flops(run: Run, pairs: Sequence[Pair]) -> float:
    """Of a forward pass over a batch of such pairs, on average."""
    return sum(forward_flops(run.model, pair) for pair in pairs) * run.config.train.batch_size / len(pairs)
