"""The baseline of an iteration: plain SFT for as much compute."""

from spin_jax.runtime import out_of_memory
from spin_jax.self_play.flops import iteration_flops, sft_step_flops
from spin_jax.self_play.pairs import sft_pairs
from spin_jax.self_play.run import Run
from spin_jax.self_play.stages.evaluate import evaluate_control
from spin_jax.self_play.training_stage import export_model, fit_stage, is_trained, sft_stage, spin_stage


@out_of_memory.tells("SFT control", out_of_memory.for_training)
def continue_sft(run: Run, t: int) -> None:
    """The baseline: plain SFT of the same start, on the same examples, for the FLOPs that iteration t spent, and its
    summary row."""
    directory, pairs, peak = run.iteration(t) / "control", sft_pairs(run), run.config.sft.control_learning_rate
    start = run.iteration(t - 1) / "control" / "model" if t else run.start_of(0)
    spin, step = spin_stage(run, t), sft_step_flops(run, sft_stage(run, start, pairs, 1, peak).spec, pairs)
    steps = max(1, round(iteration_flops(run, t, spin.spec, spin.pairs) / step))
    if not is_trained(directory):
        stage = sft_stage(run, start, pairs, steps, peak)
        name = f"iteration {t}: SFT control"
        export_model(run, directory, fit_stage(run, stage, stage.make_batch(run), directory, name))
    evaluate_control(run, t, directory, steps * step)
