"""What a run is about to do: its first lines, and the loops that it will make, from which its time is estimated."""

import logging
import platform
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from spin_jax import models, sizing
from spin_jax.config import STAGES
from spin_jax.evaluation.interface import chosen
from spin_jax.runtime import multihost
from spin_jax.runtime.files import find
from spin_jax.runtime.progress import Expected
from spin_jax.self_play.pairs import is_given, is_sampled, iterations_mixed
from spin_jax.self_play.run import Run
from spin_jax.training.programs import is_mixed, is_scored
from spin_jax.training.schedule import num_steps

_LOG = logging.getLogger(__name__)


def tell(run: Run) -> None:
    """Log in a few lines what the run computes with, on what, how much of it, and where it begins."""
    position = multihost.on_process_zero(lambda: _position(run))
    for line in (_devices(run), _computation(run), _model(run), _steps(run), position):
        _LOG.info("%s", line)


def hardware() -> dict[str, object]:
    """What the run computes with, for its `timing.jsonl`."""
    versions = {"jax": jax.__version__, "python": platform.python_version()}
    return {"devices": sizing.describe(jax.devices()), "processes": jax.process_count(), **versions}


def loops(run: Run, only: Sequence[str] = STAGES) -> list[Expected]:
    """The loops of a whole run, in order and by the names that the stages give them. A run of some of the stages ends
    with the first iteration that is not finished."""
    config, held_out, found = run.config, bool(run.held_out_examples), []
    evaluated, sampled = (held_out and evaluator in chosen(config) for evaluator in ("rewards", "samples"))
    if config.sft.epochs:
        found.append(Expected("SFT", "SFT"))
    whole = set(only) == set(STAGES)
    begun = 0 if whole else multihost.on_process_zero(lambda: _unfinished(run))
    for t in range(config.iterations) if whole else [begun]:
        loops = [("generate", "generate", 1)] if "generate" in only else []
        if "score" in only:
            loops += [("score held-out pairs", "held-out", 1)] * held_out
            if is_scored(config.spin):
                loops += [("score under theta_0", "score", steps_of(run, t))] * is_mixed(config.spin, t)
                loops += [("score", "score", steps_of(run, t))]
        if "train" in only:
            loops += [("train", "train", steps_of(run, t))] + [("sample SFT", "sample", 1)] * (sampled and t == 0)
            loops += [("evaluate", "held-out", 1)] * evaluated + [("sample", "sample", 1)] * sampled
            if config.sft.control:  # for as much compute as the iteration
                loops += [("SFT control", "control", steps_of(run, t))]
                loops += [("evaluate SFT control", "held-out", 1)] * evaluated
                loops += [("sample SFT control", "sample", 1)] * sampled
        found += [Expected(f"iteration {t}: {name}", kind, size) for name, kind, size in loops]
    return found


def steps_of(run: Run, t: int) -> int:
    """Steps that iteration t trains for."""
    train = run.config.train
    responses = sum(run.config.generate.responses if is_sampled(run, s) else 1 for s in iterations_mixed(run, t))
    return num_steps(responses * len(run.train_examples), train.epochs, train.batch_size)


# ---- lines


def _devices(run: Run) -> str:
    line = f"devices: {run.execution.mesh.size}, processes: {jax.process_count()}"
    for what, mesh in (("training", run.execution.mesh), ("sampling", run.decode.mesh)):
        if split := ", ".join(f"{axis} {num_shards}" for axis, num_shards in mesh.shape.items() if num_shards > 1):
            line += f"; {what} over {split}"
    return line


def _computation(run: Run) -> str:
    settings, execution = run.config.model, run.execution
    kind = execution.mesh.devices.flat[0].device_kind
    dtype = np.dtype(execution.dtype).name
    line = f"computes in {dtype}"
    if settings.compute_dtype == "auto":
        has = "has instructions for it" if dtype == "bfloat16" else "has no instructions for bfloat16"
        line += f" (auto: a {kind} {has})"
    line += f"; attention {execution.kernel or 'plain'}"
    if settings.attention == "auto":
        none = f"no kernel for a {kind}, {dtype} and a head_dim of {run.model.head_dim}"
        line += f" (auto: {f'the kernel for a {kind}' if execution.kernel else none})"
    return line


def _model(run: Run) -> str:
    params, lora = models.num_params(run.model), run.config.lora
    trained = "all of them trained"
    if lora.rank:
        trained = f"{models.num_adapter_params(run.model, lora):,} in updates of rank {lora.rank} trained"
    rows = f"{len(run.train_examples):,} rows to train on, {len(run.held_out_examples):,} held out"
    return f"{run.source}: {params:,} parameters, {trained}; {rows}"


def _steps(run: Run) -> str:
    config = run.config
    steps = ", ".join(f"{steps_of(run, t):,}" for t in range(config.iterations)) + " steps"
    if config.train.match_flops:
        steps = f"as many steps as spend the FLOPs of {config.train.match_flops},"
    line = f"iterations: {config.iterations}, of {steps} of {config.train.batch_size} pairs"
    if config.sft.epochs:
        first = num_steps(len(run.train_examples), config.sft.epochs, config.train.batch_size, "--config.sft.epochs")
        line = f"{line}; before them SFT, of {first:,} steps"
    return line


# ---- where it begins


def _position(run: Run) -> str:
    t, sft = _unfinished(run), run.workdir / "sft"
    if t == run.config.iterations:
        return f"goes on in {run.workdir}: all iterations are trained"
    tuned = not run.config.sft.epochs or _has_model(sft)
    directory = run.iteration(t) if tuned else sft
    stage = _stage(run, t) if tuned else "train"
    where = f"iteration {t}, {stage}" if tuned else "SFT"
    steps = [int(path.name) for path in find(directory / "checkpoints", "[0-9]*") if path.name.isdigit()]
    if stage == "train" and steps:
        where += f", from step {max(steps)}"
    begun = t or directory.exists() or (run.config.sft.epochs and tuned)
    return f"goes on in {run.workdir}: {where}" if begun else f"starts anew in {run.workdir}"


def _stage(run: Run, t: int) -> str:
    """The first stage of an iteration that has not made its result."""
    directory = run.iteration(t)
    if not (directory / "generated" / "pairs.parquet").exists() and not is_given(run, t):
        return "generate"
    return "score" if is_scored(run.config.spin) and not (directory / "scores" / "steps.npz").exists() else "train"


def _unfinished(run: Run) -> int:
    """The first iteration that has not made its model."""
    return next((t for t in range(run.config.iterations) if not _has_model(run.iteration(t))), run.config.iterations)


def _has_model(directory: epath.Path) -> bool:
    return (directory / "model" / "config.json").exists()
