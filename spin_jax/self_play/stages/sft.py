"""Supervised fine-tuning before iteration 0."""

from spin_jax.runtime import out_of_memory
from spin_jax.self_play.pairs import sft_pairs
from spin_jax.self_play.run import Run
from spin_jax.self_play.training_stage import export_model, fit_stage, is_trained, sft_stage
from spin_jax.training.schedule import num_steps


@out_of_memory.tells("SFT", out_of_memory.for_training)
def fine_tune(run: Run) -> None:
    """Supervised fine-tuning of the source model, where the config asks for it: theta_0 in `sft/model`."""
    directory = run.workdir / "sft"
    if not run.config.sft.epochs or is_trained(directory):
        return
    pairs = sft_pairs(run)
    steps = num_steps(len(pairs), run.config.sft.epochs, run.config.train.batch_size, "--config.sft.epochs")
    stage = sft_stage(run, run.source, pairs, steps, run.config.sft.learning_rate)
    export_model(run, directory, fit_stage(run, stage, stage.make_batch(run), directory, "SFT"))
