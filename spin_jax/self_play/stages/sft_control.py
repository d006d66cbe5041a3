"""The baseline of an iteration: plain SFT for as much compute."""

from spin_jax.runtime import out_of_memory
from spin_jax.self_play.flops import iteration_flops, sft_flops
from spin_jax.self_play.pairs import sft_pairs
from spin_jax.self_play.run import Run
from spin_jax.self_play.stages.evaluate import evaluate_control
from spin_jax.self_play.training_stage import (
    TrainingStage,
    export_model,
    fit_stage,
    is_trained,
    sft_stage,
    spin_spec,
)


@out_of_memory.tells("SFT control", out_of_memory.for_training)
def continue_sft(run: Run, t: int) -> None:
    """Train and measure the baseline: plain SFT from the same start, on the same examples, for the FLOPs that iteration
    t has spent."""
    directory = run.iteration(t) / "control"
    if not is_trained(directory):
        stage, name = _control_stage(run, t), f"iteration {t}: SFT control"
        export_model(run, directory, fit_stage(run, stage, stage.make_batch(run), directory, name))

    def spent() -> float:
        stage = _control_stage(run, t)
        return sft_flops(run, stage.spec, stage.pairs)

    evaluate_control(run, t, directory, spent)


def _control_stage(run: Run, t: int) -> TrainingStage:
    start = run.iteration(t - 1) / "control" / "model" if t else run.start_of(0)
    pairs, peak = sft_pairs(run), run.config.sft.control_learning_rate
    one = sft_stage(run, start, pairs, 1, peak)
    steps = iteration_flops(run, t, *spin_spec(run, t)) / sft_flops(run, one.spec, pairs)
    return sft_stage(run, start, pairs, max(1, round(steps)), peak)
