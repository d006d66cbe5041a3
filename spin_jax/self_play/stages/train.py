"""The train stage: theta_{t+1} from theta_t."""

from spin_jax.errors import UserError
from spin_jax.runtime import multihost, out_of_memory
from spin_jax.self_play.run import Run
from spin_jax.self_play.stages.score import step_scores, steps_path
from spin_jax.self_play.training_stage import export_model, fit_stage, is_trained, spin_stage
from spin_jax.training.programs import is_mixed, is_scored

# How far from l(0) an iteration's first loss may be. The log-probs of a stored opponent come from the step's own
# program, so that only the order of the sum over pairs may differ. Those of a live opponent come from another part of
# the program, which the compiler may round otherwise. Margins m of rounding alone raise the logistic loss by m^2 / 8,
# so 1e-2 allows for margins of 0.28: too little to matter.
START_TOLERANCE = {"stored": 1e-4, "live": 1e-2}


@out_of_memory.tells("train", out_of_memory.for_training)
def train_policy(run: Run, t: int) -> None:
    """Train theta_{t+1}: minimise equation 4.7 from theta_t on the newest and earlier iterations' pairs. Export it to
    `model/`."""
    directory = run.iteration(t)
    if is_trained(directory):
        return
    stage, logps = spin_stage(run, t), None
    if is_scored(run.config.spin):
        if not multihost.on_process_zero(steps_path(run, t).exists):
            raise UserError(f"{steps_path(run, t)} is missing: run the score stage of iteration {t} first")
        logps = step_scores(run, t, stage)
    # The policy starts as its opponent. That is its reference too, unless the reference is a mixture.
    at_start = None if is_mixed(run.config.spin, t) else stage.spec.objective.at_start(stage.spec.settings)
    start_loss = None if at_start is None else (at_start, START_TOLERANCE[run.config.spin.opponent])
    make_batch = stage.make_batch(run, logps)
    export_model(run, directory, fit_stage(run, stage, make_batch, directory, f"iteration {t}: train", start_loss))
