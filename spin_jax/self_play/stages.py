"""The stages of an iteration. Each reads what it needs from the run's workdir, writes what it makes, and does nothing
if that exists."""

import itertools
import logging
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from spin_jax.config import at_iteration
from spin_jax.data.packing import Plan, forward_flops, make_packing, plan_scoring
from spin_jax.data.pairs import Pair, choose
from spin_jax.data.sources import Example
from spin_jax.data.tokenize import tokenise
from spin_jax.devices import sharding
from spin_jax.errors import UserError
from spin_jax.evaluation import scoring
from spin_jax.evaluation.rewards import held_out_rewards, nats_per_token
from spin_jax.evaluation.score_files import Parts, delete_parts, read_scores, write_scores
from spin_jax.evaluation.scoring import score, score_steps, scores_key
from spin_jax.generation.engine import generate, warn_if_endless
from spin_jax.generation.programs import make_sampler
from spin_jax.generation.response_files import Prompt, note_settings
from spin_jax.generation.stop_strings import stop_table
from spin_jax.objectives import OBJECTIVES
from spin_jax.reports import summary
from spin_jax.runtime import multihost, out_of_memory
from spin_jax.self_play.pairs import pairs_of, sft_pair, sft_pairs, write_responses
from spin_jax.self_play.run import Run
from spin_jax.self_play.training_stage import (
    TrainingStage,
    export_model,
    first_state,
    fit_sft,
    fit_stage,
    is_trained,
    spin_stage,
)
from spin_jax.training import programs
from spin_jax.training.schedule import num_steps

# How far from l(0) an iteration's first loss may be. A stored opponent's log-probs are the step's own, and nothing but
# the order of the sum over pairs is left. A live one is another part of the program, which a compiler may round
# otherwise: 1% of log 2 is margins of 0.2, too little to matter.
START_TOLERANCE = {"stored": 1e-4, "live": 1e-2}

_LOG = logging.getLogger(__name__)
_PARTS = "evaluation-part"  # what a cut evaluation leaves to the next one


@out_of_memory.tells("SFT", out_of_memory.for_training)
def fine_tune(run: Run) -> None:
    """Supervised fine-tuning of the source model, where the config asks for it: theta_0 in `sft/model`."""
    directory = run.workdir / "sft"
    if not run.config.sft.epochs or is_trained(directory):
        return
    pairs = sft_pairs(run)
    steps = num_steps(len(pairs), run.config.sft.epochs, run.config.train.batch_size, "--config.sft.epochs")
    export_model(run, directory, fit_sft(run, run.source, pairs, steps, run.config.sft.learning_rate, directory, "SFT"))


@out_of_memory.tells("generate", out_of_memory.for_sampling)
def generate_responses(run: Run, t: int) -> None:
    """y' ~ p_t(.|x) for every prompt, train and held-out: `generated/pairs.parquet`, in the authors' layout."""
    directory = run.iteration(t) / "generated"
    if multihost.on_first((directory / "pairs.parquet").exists):
        return
    examples = run.train_examples + run.held_out_examples
    if t == 0 and all(example.generated is not None for example in examples):
        _LOG.info("iteration 0 takes the generated responses that %s holds", run.config.data.train)
        return
    settings, model, codec = run.config.generate, run.identity_of(run.start_of(t)), run.chat.codec
    multihost.on_first(
        lambda: note_settings(directory, {f"model ({part})": content for part, content in model.items()})
    )
    stops_SV = stop_table(codec.tokenizer, settings.stop_strings, run.model.vocab_size, codec.silent)
    responses = generate(
        make_sampler(run.model, settings, run.chat.stop_ids, run.decode, stops_SV),
        run.params(run.start_of(t)),
        [Prompt(e.row, run.asked(e.row), n) for e in examples for n in range(settings.responses)],
        settings,
        seed=run.config.seed,
        iteration=t,
        mesh=run.decode.mesh,
        directory=directory,
        name=f"iteration {t}: generate",
    )
    multihost.on_first(lambda: write_responses(run, directory, examples, responses, model))
    if t == 0:
        multihost.on_first(lambda: warn_if_endless(responses, settings))


@out_of_memory.tells("score", out_of_memory.for_training)
def score_pairs(run: Run, t: int) -> None:
    """The opponent's log-probs of the pairs of every training step, `scores/steps.npz`, and of the held-out ones,
    `scores/held_out.npz`.

    Nothing is done where they are there, made by the programs that this run trains with, nor once the iteration has
    trained. With a live opponent only the held-out pairs are scored.
    """
    if is_trained(run.iteration(t)):
        return
    _held_out_scores(run, t)
    if run.config.spin.opponent == "stored" and OBJECTIVES[run.config.spin.loss].reference:
        _step_scores(run, t, spin_stage(run, t))


@out_of_memory.tells("train", out_of_memory.for_training)
def train_policy(run: Run, t: int) -> None:
    """theta_{t+1}: minimise equation 4.7 from theta_t on the newest and earlier iterations' pairs; export it to
    `model/`."""
    directory = run.iteration(t)
    if is_trained(directory):
        return
    stage, logps = spin_stage(run, t), None
    if stage.spec.is_scored:
        if not multihost.on_first(_steps_path(run, t).exists):
            raise UserError(f"{_steps_path(run, t)} is missing: run the score stage of iteration {t} first")
        logps = _step_scores(run, t, stage)
    at_start = stage.spec.objective.at_start(stage.spec.settings)
    start_loss = None if at_start is None else (at_start, START_TOLERANCE[run.config.spin.opponent])
    make_batch = stage.make_batch(run, logps)
    export_model(run, directory, fit_stage(run, stage, make_batch, directory, f"iteration {t}: train", start_loss))


@out_of_memory.tells("evaluate", out_of_memory.for_training)
def describe_start(run: Run) -> None:
    """The summary's first row: theta_0, the opponent of iteration 0, which has scored the held-out pairs."""

    def measure() -> dict:
        row = {"model": "SFT", "iteration": None}
        if held_out := pairs_of(run, 0)[1]:
            row["held_out/nats_per_token"] = nats_per_token(held_out, _held_out_scores(run, 0))
        return row | _exact_measures(run, run.start_of(0))

    _measure_once(run.workdir, measure)


@out_of_memory.tells("evaluate", out_of_memory.for_training)
def evaluate_policy(run: Run, t: int) -> None:
    """The summary's row of theta_{t+1}: rewards of held-out pairs against the opponent of iteration t, which wrote
    their y'. Without held-out pairs, what the last training step had."""

    def measure() -> dict:
        train, held_out = pairs_of(run, t)
        row = {"model": f"iteration {t}", "iteration": t}
        row["generated/tokens"] = float(np.mean([len(pair.responses[1]) for pair in train]))
        row["generated/cut"] = float(np.mean([pair.truncated[1] for pair in train]))
        if not held_out:
            return row | summary.last_step(run.iteration(t)) | _exact_measures(run, run.start_of(t + 1))
        by_policy = _score(run, run.start_of(t + 1), held_out, f"iteration {t}: evaluate", (run.iteration(t), _PARTS))
        row["held_out/nats_per_token"] = nats_per_token(held_out, by_policy)
        row |= held_out_rewards(by_policy, _held_out_scores(run, t), at_iteration(run.config.spin.beta, t))
        return row | _exact_measures(run, run.start_of(t + 1))

    _measure_once(run.iteration(t), measure)


@out_of_memory.tells("SFT control", out_of_memory.for_training)
def continue_sft(run: Run, t: int) -> None:
    """The baseline: plain SFT of the same start, on the same examples, for the FLOPs that iteration t spent, and its
    summary row."""
    directory = run.iteration(t) / "control"
    start = run.iteration(t - 1) / "control" / "model" if t else run.start_of(0)
    if not is_trained(directory):
        pairs = sft_pairs(run)
        steps = max(1, round(_iteration_flops(run, t) / _sft_step_flops(run, pairs)))
        peak = run.config.sft.control_learning_rate
        export_model(run, directory, fit_sft(run, start, pairs, steps, peak, directory, f"iteration {t}: SFT control"))

    def measure() -> dict:
        row = {"model": f"SFT control {t}", "iteration": None}
        if held_out := pairs_of(run, t)[1]:
            name = f"iteration {t}: evaluate SFT control"
            logps = _score(run, directory / "model", held_out, name, (directory, _PARTS))
            row["held_out/nats_per_token"] = nats_per_token(held_out, logps)
        return row | _exact_measures(run, directory / "model")

    _measure_once(directory, measure)


def _measure_once(directory: epath.Path, measure: Callable[[], dict]) -> None:
    """`result.json` in a directory: a row of the summary, measured where there is none that can be read."""
    if not multihost.on_first(lambda: summary.read_result(directory)):
        row = measure()
        multihost.on_first(lambda: summary.write_result(directory, row))
        multihost.on_first(lambda: delete_parts(directory, _PARTS))


# ---- measures


def _score(
    run: Run, model: epath.Path, pairs: Sequence[Pair], name: str, kept: tuple[epath.Path, str] | None = None
) -> np.ndarray:
    """Log-probs of pairs, [pairs, Y], under the model in a directory. `kept`: where, and by what name, a pass that is
    cut leaves what it has scored to the next."""
    if not pairs:
        return np.zeros((0, 2), np.float32)
    plan, parts = _scoring_plan(run, pairs), None
    if kept:
        key = scores_key(pairs, plan, run.compute, model=run.identity_of(model))
        parts = Parts(kept[0], key, run.config.train.checkpoint_every, kept[1])
    return score(
        scoring.make_scorer(run.model, run.compute),
        run.params(model),
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


def _held_out_scores(run: Run, t: int) -> np.ndarray:
    """log p_t of the held-out pairs of iteration t, [pairs, Y]: stored, or computed and stored."""
    pairs = pairs_of(run, t)[1]
    if not pairs:
        return np.zeros((0, 2), np.float32)
    directory, start = run.iteration(t) / "scores", run.start_of(t)
    path, kept = directory / "held_out.npz", (directory, "held_out-part")
    key = scores_key(pairs, _scoring_plan(run, pairs), run.compute, model=run.identity_of(start))
    logps = multihost.on_first(lambda: read_scores(path, key))
    if logps is None:
        logps = _score(run, start, pairs, f"iteration {t}: score held-out pairs", kept)
        multihost.on_first(lambda: write_scores(path, key, logps, pairs))
        multihost.on_first(lambda: delete_parts(*kept))
    return logps


def _steps_path(run: Run, t: int) -> epath.Path:
    return run.iteration(t) / "scores" / "steps.npz"


def _step_scores(run: Run, t: int, stage: TrainingStage) -> np.ndarray:
    """log p_t of the pairs of each training step of iteration t, [steps, pairs of a batch, Y]: stored, or computed and
    stored. Those of another mesh or version of jax are made anew: they would not cancel."""
    path, model = _steps_path(run, t), run.identity_of(stage.start)
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
            run.keep_params(stage.start, state.params)  # which training starts from
    return logps


def _exact_measures(run: Run, model: epath.Path) -> dict[str, float]:
    """What can be computed exactly where the data distribution is known: nothing, unless the task is the toy one."""
    if run.config.data.train != "toy:":
        return {}
    from spin_jax.tasks import toy

    settings = run.config.toy
    _, unseen = toy.make_examples(run.config.seed, settings.train_rows, settings.eval_prompts)

    def logprobs(examples: Sequence[Example]) -> np.ndarray:
        pairs = multihost.shared(lambda example: sft_pair(run, example, tokenise(run.chat, example)), examples)
        return _score(run, model, pairs, "exact measures")[:, 0]

    return toy.exact_measures(logprobs, unseen)


def _iteration_flops(run: Run, t: int) -> float:
    """Model FLOPs that iteration t spends on its training rows: sampling, scoring, training."""
    stage = spin_stage(run, t)
    sampling = sum(forward_flops(run.model, choose(pair, ["generated"])) for pair in pairs_of(run, t)[0])
    passes = stage.spec.passes + stage.spec.is_scored
    return sampling + passes * stage.spec.steps * _forward_flops(run, stage.pairs)


def _sft_step_flops(run: Run, pairs: Sequence[Pair]) -> float:
    spec = programs.sft_spec(run.config, run.model, run.compute, peak=0.0, steps=1)
    return spec.passes * _forward_flops(run, pairs)


def _forward_flops(run: Run, pairs: Sequence[Pair]) -> float:
    """Of a forward pass over a batch of such pairs, on average."""
    return sum(forward_flops(run.model, pair) for pair in pairs) * run.config.train.batch_size / len(pairs)
