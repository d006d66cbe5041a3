"""Algorithm 1 of SPIN (arXiv 2401.01335): generate, score, train, hand over."""

import functools
import time
from collections.abc import Sequence

from etils import epath
from ml_collections import ConfigDict

from spin_jax.config import STAGES, Config, freeze
from spin_jax.reports import timing
from spin_jax.reports.record import RunRecord, write_reports
from spin_jax.reports.summary import read_summary, summary_table
from spin_jax.runtime import compilation_cache, multihost, out_of_memory, progress
from spin_jax.runtime.lease import held
from spin_jax.self_play import outlook
from spin_jax.self_play.flops import check_matched
from spin_jax.self_play.run import Run, open_run
from spin_jax.self_play.stages import evaluate, generate, score, sft, sft_control, train
from spin_jax.self_play.workdir import make


@out_of_memory.tells("start", out_of_memory.for_loading)
def self_play(
    config: ConfigDict | Config, workdir: epath.PathLike, only: Sequence[str] = STAGES, *, profile: bool = False
) -> list[dict]:
    """Run all iterations, or go on with what is not finished; returns the summary's rows, one a model. A workdir is one
    run's at a time.

    Args:
        config: see `spin_jax.config.base_config`.
        workdir: local or gs://; `spin_jax.self_play.run` says what lies where.
        only: the stages to run. Each reads its inputs from the workdir; a run of some of the three ends with the first
            iteration that it found unfinished.
        profile: trace a few steps of the first training stage that has some to make, see `spin_jax.runtime.profiling`.

    Raises:
        UserError: a mistake in config, data, model or mesh, a full disk or memory, or a workdir in use; one line.
        preemption.Stopped: asked to stop; the same command goes on from there.
    """
    config, started = freeze(config), time.time()
    directory = multihost.on_each_process(lambda: make(workdir))
    compilation_cache.keep(directory)
    with held(directory, f"--workdir={directory}"):
        run = open_run(config, directory, trains=bool({"score", "train"} & set(only)), profile=profile)
        multihost.on_process_zero(lambda: check_matched(run))
        outlook.tell(run)
        multihost.on_process_zero(lambda: timing.note(directory, {"started": started, **outlook.hardware()}))
        with progress.expected(outlook.loops(run, only), functools.partial(timing.note, directory)):
            sft.fine_tune(run)
            for t in range(config.iterations):
                if not _iterate(run, t, only):
                    break
        return multihost.on_process_zero(lambda: RunRecord.load(directory).results)


def _iterate(run: Run, t: int, only: Sequence[str]) -> bool:
    """Iteration t; returns whether to go on with the next one."""
    model = run.iteration(t) / "model" / "config.json"
    was_finished = multihost.on_process_zero(model.exists)
    if "generate" in only:
        generate.generate_responses(run, t)  # y'_i ~ p_t(.|x_i) for every prompt
    if "score" in only:
        score.score_pairs(run, t)  # log p_t of y_i and y'_i
    if "train" in only:
        train.train_policy(run, t)  # theta_{t+1} = argmin of equation 4.7, from theta_t; it is the next opponent
    if not multihost.on_process_zero(model.exists):
        return False
    evaluate.evaluate_start(run)
    evaluate.evaluate_policy(run, t)
    if run.config.sft.control:
        sft_control.continue_sft(run, t)
    multihost.on_process_zero(lambda: _report(run.workdir, t + 1 == run.config.iterations))
    return was_finished or set(only) == set(STAGES)


def _report(workdir: epath.Path, is_last: bool) -> None:
    """Reports on all models that there are, those of iterations beyond `config.iterations` too."""
    record = RunRecord.load(workdir)
    if is_last or record.results != read_summary(workdir):
        write_reports(record)
        print(f"\n{summary_table(record.results)}\n", flush=True)
