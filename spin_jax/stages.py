"""The stages of an iteration. Each reads what it needs from the run's workdir, writes what it makes, and does nothing
if that exists."""

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from spin_jax import hosts, memory, programs, report, sharding, tracing
from spin_jax.batches import (
    HostBatch,
    Plan,
    batch_order,
    forward_flops,
    num_steps,
    plan_scoring,
    plan_training,
    sft_batch,
    spin_batch,
)
from spin_jax.checkpoint import damaged_of
from spin_jax.config import at_iteration
from spin_jax.data.pairs import Pair, read_model, read_sampled, write_pairs_parquet
from spin_jax.data.sources import Example
from spin_jax.errors import UserError
from spin_jax.losses import LOSSES
from spin_jax.models import for_compute
from spin_jax.responses import Prompt, Response, forget_parts, generate, note_settings, warn_if_endless
from spin_jax.run import Run
from spin_jax.score import (
    Parts,
    delete_parts,
    held_out_rewards,
    nats_per_token,
    read_scores,
    score,
    score_steps,
    scores_key,
    write_scores,
)
from spin_jax.step import TrainState
from spin_jax.stop_strings import stop_table
from spin_jax.tokens import Tokenised, tokenise
from spin_jax.train import fit
from spin_jax.workdir import check_model

# How far from l(0) an iteration's first loss may be. A stored opponent's log-probs are the step's own, and nothing but
# the order of the sum over pairs is left. A live one is another part of the program, which a compiler may round
# otherwise: 1% of log 2 is margins of 0.2, too little to matter.
START_TOLERANCE = {"stored": 1e-4, "live": 1e-2}

_LOG = logging.getLogger(__name__)
_NOTHING = np.zeros(0, np.int32)  # no response
_PARTS = "evaluation-part"  # what a cut evaluation leaves to the next one


@memory.tells("SFT", memory.for_training)
def fine_tune(run: Run) -> None:
    """Supervised fine-tuning of the source model, where the config asks for it: theta_0 in `sft/model`."""
    directory = run.workdir / "sft"
    if not run.config.sft.epochs or _is_trained(directory):
        return
    pairs = _sft_pairs(run)
    steps = num_steps(len(pairs), run.config.sft.epochs, run.config.train.batch_size, "--config.sft.epochs")
    _export(run, directory, _fit_sft(run, run.source, pairs, steps, run.config.sft.learning_rate, directory, "SFT"))


@memory.tells("generate", memory.for_sampling)
def generate_responses(run: Run, t: int) -> None:
    """y' ~ p_t(.|x) for every prompt, train and held-out: `generated/pairs.parquet`, in the authors' layout."""
    directory = run.iteration(t) / "generated"
    if hosts.on_first((directory / "pairs.parquet").exists):
        return
    examples = run.train_examples + run.held_out_examples
    if t == 0 and all(example.generated is not None for example in examples):
        _LOG.info("iteration 0 takes the generated responses that %s holds", run.config.data.train)
        return
    settings, model, codec = run.config.generate, run.identity_of(run.start_of(t)), run.chat.codec
    hosts.on_first(lambda: note_settings(directory, {f"model ({part})": content for part, content in model.items()}))
    stops_SV = stop_table(codec.tokenizer, settings.stop_strings, run.model.vocab_size, codec.silent)
    responses = generate(
        programs.make_sampler(run.model, settings, run.chat.stop_ids, run.decode, stops_SV),
        programs.make_resharding(run.model, run.decode, settings.weight_dtype)(run.params(run.start_of(t))),
        [Prompt(e.row, run.asked(e.row), n) for e in examples for n in range(settings.responses)],
        settings,
        seed=run.config.seed,
        iteration=t,
        mesh=run.decode.mesh,
        directory=directory,
        name=f"iteration {t}: generate",
    )
    hosts.on_first(lambda: _write_responses(run, directory, examples, responses, model))
    if t == 0:
        hosts.on_first(lambda: warn_if_endless(responses, settings))


@memory.tells("score", memory.for_training)
def score_pairs(run: Run, t: int) -> None:
    """The opponent's log-probs of the pairs of every training step, `scores/steps.npz`, and of the held-out ones,
    `scores/held_out.npz`.

    Nothing is done where they are there, made by the programs that this run trains with. With a live opponent only the
    held-out pairs are scored.
    """
    _held_out_scores(run, t)
    if run.config.spin.opponent == "stored":
        _step_scores(run, t)


@memory.tells("train", memory.for_training)
def train_policy(run: Run, t: int) -> None:
    """theta_{t+1}: minimise equation 4.7 from theta_t on the newest and earlier iterations' pairs; export it to
    `model/`."""
    directory = run.iteration(t)
    if _is_trained(directory):
        return
    stage, logps = _spin_stage(run, t), None
    if not stage.spec.live:
        if not hosts.on_first(_steps_path(run, t).exists):
            raise UserError(f"{_steps_path(run, t)} is missing: run the score stage of iteration {t} first")
        logps = _step_scores(run, t)
    start_loss = float(LOSSES[stage.spec.loss](0.0)), START_TOLERANCE[run.config.spin.opponent]
    make_batch = stage.make_batch(run, logps)
    _export(run, directory, _fit(run, stage, make_batch, directory, f"iteration {t}: train", start_loss))


@memory.tells("evaluate", memory.for_training)
def describe_start(run: Run) -> None:
    """The summary's first row: theta_0, the opponent of iteration 0, which has scored the held-out pairs."""

    def measure() -> dict:
        row = {"model": "SFT", "iteration": None}
        if held_out := _pairs_of(run, 0)[1]:
            row["held_out/nats_per_token"] = nats_per_token(held_out, _held_out_scores(run, 0))
        return row | _exact_measures(run, run.start_of(0))

    _measure_once(run.workdir, measure)


@memory.tells("evaluate", memory.for_training)
def evaluate_policy(run: Run, t: int) -> None:
    """The summary's row of theta_{t+1}: rewards of held-out pairs against the opponent of iteration t, which wrote
    their y'. Without held-out pairs, what the last training step had."""

    def measure() -> dict:
        train, held_out = _pairs_of(run, t)
        row = {"model": f"iteration {t}", "iteration": t}
        row["generated/tokens"] = float(np.mean([len(pair.generated) for pair in train]))
        row["generated/cut"] = float(np.mean([pair.generated_cut for pair in train]))
        if not held_out:
            return row | report.last_step(run.iteration(t)) | _exact_measures(run, run.start_of(t + 1))
        by_policy = _score(run, run.start_of(t + 1), held_out, f"iteration {t}: evaluate", (run.iteration(t), _PARTS))
        row["held_out/nats_per_token"] = nats_per_token(held_out, by_policy)
        row |= held_out_rewards(by_policy, _held_out_scores(run, t), at_iteration(run.config.spin.beta, t))
        return row | _exact_measures(run, run.start_of(t + 1))

    _measure_once(run.iteration(t), measure)


@memory.tells("SFT control", memory.for_training)
def continue_sft(run: Run, t: int) -> None:
    """The baseline: plain SFT of the same start, on the same examples, for the FLOPs that iteration t spent, and its
    summary row."""
    directory = run.iteration(t) / "control"
    start = run.iteration(t - 1) / "control" / "model" if t else run.start_of(0)
    if not _is_trained(directory):
        pairs = _sft_pairs(run)
        steps = max(1, round(_iteration_flops(run, t) / _sft_step_flops(run, pairs)))
        peak = run.config.sft.control_learning_rate
        _export(run, directory, _fit_sft(run, start, pairs, steps, peak, directory, f"iteration {t}: SFT control"))

    def measure() -> dict:
        row = {"model": f"SFT control {t}", "iteration": None}
        if held_out := _pairs_of(run, t)[1]:
            name = f"iteration {t}: evaluate SFT control"
            logps = _score(run, directory / "model", held_out, name, (directory, _PARTS))
            row["held_out/nats_per_token"] = nats_per_token(held_out, logps)
        return row | _exact_measures(run, directory / "model")

    _measure_once(directory, measure)


def _measure_once(directory: epath.Path, measure: Callable[[], dict]) -> None:
    """`result.json` in a directory: a row of the summary, measured where there is none that can be read."""
    if not hosts.on_first(lambda: report.read_result(directory)):
        row = measure()
        hosts.on_first(lambda: report.write_result(directory, row))
        hosts.on_first(lambda: delete_parts(directory, _PARTS))


# ---- training


class _Stage(NamedTuple):
    """A training stage, ready to begin: its programs, where it starts, and which pairs each step takes."""

    spec: programs.TrainingSpec
    start: epath.Path  # of the model that it trains
    seed: int  # of the data's order and of fresh low-rank updates
    pairs: list[Pair]
    plan: Plan

    def make_batch(self, run: Run, opponent_logps: np.ndarray | None = None) -> Callable[[int], HostBatch]:
        """step -> batch, a function of (seed, step) and the pairs; for SPIN with the opponent's log-probs, where
        they are given: [steps, pairs of a batch, 2]."""
        plan = self.plan
        if not self.spec.loss:
            return lambda step: sft_batch(run.model, self.pairs, plan.batches[step], plan.shapes[step])

        def batch(step: int) -> HostBatch:
            logps = None if opponent_logps is None else opponent_logps[step]
            return spin_batch(run.model, self.pairs, plan.batches[step], plan.shapes[step], logps)

        return batch


def _stage(run: Run, spec: programs.TrainingSpec, start: epath.Path, seed: int, pairs: list[Pair]) -> _Stage:
    settings = run.config.train
    packing = programs.make_packing(settings, run.compute.mesh, settings.micro_batches)
    plan = plan_training(pairs, batch_order(len(pairs), settings.batch_size, seed, spec.steps), packing)
    return _Stage(spec, start, seed, pairs, plan)


def _spin_stage(run: Run, t: int) -> _Stage:
    """Iteration t's: its own pairs, then those of `config.spin.previous_iterations` before it."""
    train, pairs = run.config.train, _mixed_pairs(run, t)
    steps = num_steps(len(pairs), train.epochs, train.batch_size)
    spec = programs.spin_spec(run.config, run.model, run.compute, t, steps)
    return _stage(run, spec, run.start_of(t), run.config.seed + t, pairs)


def _fit_sft(
    run: Run, start: epath.Path, pairs: list[Pair], steps: int, peak: float, directory: epath.Path, name: str
) -> dict:
    spec = programs.sft_spec(run.config, run.model, run.compute, peak, steps)
    stage = _stage(run, spec, start, run.config.seed, pairs)
    return _fit(run, stage, stage.make_batch(run), directory, name)


def _begin(run: Run, stage: _Stage) -> tuple[TrainState, dict | None]:
    """(state at step 0, frozen params that the step takes beside it): all params of the start with a fresh optimizer,
    or with `config.lora` fresh low-rank updates of them."""
    params, frozen, spec = run.take_params(stage.start), None, stage.spec
    if spec.rank:
        # One copy in the compute dtype is under the updates and the opponent; the f32 one is read again to be merged.
        frozen = programs.make_resharding(run.model, run.compute)(params)
        params = programs.make_adapters(run.model, spec.rank, run.compute.mesh)(jax.random.key(stage.seed))
    elif spec.live:
        frozen = jax.tree.map(jnp.copy, for_compute(params, run.compute.dtype))
    return programs.make_training(spec).init(params), frozen


def _fit(
    run: Run,
    stage: _Stage,
    make_batch: Callable[[int], HostBatch],
    directory: epath.Path,
    name: str,
    start_loss: tuple[float, float] | None = None,
) -> dict:
    """The params of the stage's start, trained; low-rank updates are merged into them."""
    spec, mesh, training = stage.spec, run.compute.mesh, programs.make_training(stage.spec)
    _LOG.info("%s", stage.plan)
    state, frozen = _begin(run, stage)
    step, (profile, run.profile) = training.step, (run.profile, False)
    with tracing.traced(step, directory / "profile") if profile else contextlib.nullcontext(step) as step:
        state = fit(
            step,
            state,
            frozen,
            steps=spec.steps,
            make_batch=make_batch,
            sharding=sharding.batch_sharding(mesh),
            passes=spec.passes,
            schedule=training.schedule,
            directory=directory,
            checkpoint_every=run.config.train.checkpoint_every,
            name=name,
            start_loss=start_loss,
        )
    if spec.rank:
        del frozen
        merging = programs.make_merging(run.model, spec.alpha / spec.rank, mesh)
        return merging(run.take_params(stage.start), state.params)
    return state.params


def _export(run: Run, directory: epath.Path, params: dict) -> None:
    run.export(directory / "model", params)
    _is_trained(directory)


def _is_trained(directory: epath.Path) -> bool:
    """Whether a training stage has exported its model. Once it is whole, nobody needs the checkpoints that led to it,
    three times its size each: they go."""

    def is_whole() -> bool:
        whole = (directory / "model" / "config.json").exists()
        if whole:
            checkpoints = directory / "checkpoints"
            checkpoints.rmtree(missing_ok=True)
            damaged_of(checkpoints).rmtree(missing_ok=True)
        return whole

    return hosts.on_first(is_whole)


# ---- pairs


def _write_responses(
    run: Run,
    directory: epath.Path,
    examples: Sequence[Example],
    responses: Sequence[Response],
    model: dict[str, str],
) -> None:
    """`pairs.parquet`, which takes the place of the parts: a row a response, those to one prompt together. `model`
    identifies who wrote them."""
    texts = [run.chat.codec.decode(response.tokens) for response in responses]
    asked = [example for example in examples for _ in range(run.config.generate.responses)]
    answered = [
        dataclasses.replace(example, generated=text, truncated=not response.finished)
        for example, text, response in zip(asked, texts, responses, strict=True)
    ]
    columns = {
        "generated_tokens": [response.tokens.tolist() for response in responses],
        "generated_logprobs": [response.logprobs.tolist() for response in responses],
        "held_out": [run.is_held_out(response.row) for response in responses],
    }
    write_pairs_parquet(directory / "pairs.parquet", answered, columns, model)
    forget_parts(directory)


def _pairs_of(run: Run, t: int) -> tuple[list[Pair], list[Pair]]:
    """(train, held-out) pairs whose y' are the responses of iteration t."""
    if t not in run.pairs:
        path = run.iteration(t) / "generated" / "pairs.parquet"
        if hosts.on_first(path.exists):
            complaint = f"{path} was written by another model than that in {run.start_of(t)}"
            check_model(
                read_model(path), run.identity_of(run.start_of(t)), complaint, f"delete {path.parent}, and go on"
            )
            sampled = read_sampled(path)
        elif t == 0 and run.train_examples[0].generated is not None:
            sampled = {e.row: [(e.generated, not e.truncated)] for e in run.train_examples + run.held_out_examples}
        else:
            raise UserError(f"{path} is missing: run the generate stage of iteration {t} first")
        examples = run.train_examples + run.held_out_examples
        if absent := [example.row for example in examples if example.row not in sampled]:
            raise UserError(f"{path} has no response to row {absent[0]}: the data changed; give another --workdir")
        asked = [(example, response) for example in examples for response in sampled[example.row]]
        pairs = hosts.shared(lambda one: run.pair(one[0], *one[1], t), asked)
        trained = sum(len(sampled[example.row]) for example in run.train_examples)
        run.pairs[t] = pairs[:trained], pairs[trained:]
    return run.pairs[t]


def _mixed_pairs(run: Run, t: int) -> list[Pair]:
    """The pairs that iteration t trains on: its own, then those of `config.spin.previous_iterations` before it."""
    oldest = max(0, t - run.config.spin.previous_iterations)
    return [pair for s in range(t, oldest - 1, -1) for pair in _pairs_of(run, s)[0]]


def _sft_pairs(run: Run) -> list[Pair]:
    """The examples to train on as pairs without a generated response."""
    return [_sft_pair(run, example) for example in run.train_examples]


def _sft_pair(run: Run, example: Example, tokens: Tokenised | None = None) -> Pair:
    return run.pair(example, _NOTHING, False, -1, tokens)


# ---- measures


def _score(
    run: Run, model: epath.Path, pairs: Sequence[Pair], name: str, kept: tuple[epath.Path, str] | None = None
) -> np.ndarray:
    """Log-probs of pairs, [pairs, 2], under the model in a directory. `kept`: where, and by what name, a pass that is
    cut leaves what it has scored to the next."""
    if not pairs:
        return np.zeros((0, 2), np.float32)
    plan, parts = _scoring_plan(run, pairs), None
    if kept:
        key = scores_key(pairs, plan, run.compute, model=run.identity_of(model))
        parts = Parts(kept[0], key, run.config.train.checkpoint_every, kept[1])
    return score(
        programs.make_scorer(run.model, run.compute),
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
    packing = programs.make_packing(settings, run.compute.mesh)
    return plan_scoring(pairs, settings.batch_size // settings.micro_batches, packing)


def _held_out_scores(run: Run, t: int) -> np.ndarray:
    """log p_t of the held-out pairs of iteration t, [pairs, 2]: stored, or computed and stored."""
    pairs = _pairs_of(run, t)[1]
    if not pairs:
        return np.zeros((0, 2), np.float32)
    directory, start = run.iteration(t) / "scores", run.start_of(t)
    path, kept = directory / "held_out.npz", (directory, "held_out-part")
    key = scores_key(pairs, _scoring_plan(run, pairs), run.compute, model=run.identity_of(start))
    logps = hosts.on_first(lambda: read_scores(path, key))
    if logps is None:
        logps = _score(run, start, pairs, f"iteration {t}: score held-out pairs", kept)
        hosts.on_first(lambda: write_scores(path, key, logps, pairs))
        hosts.on_first(lambda: delete_parts(*kept))
    return logps


def _steps_path(run: Run, t: int) -> epath.Path:
    return run.iteration(t) / "scores" / "steps.npz"


def _step_scores(run: Run, t: int) -> np.ndarray:
    """log p_t of the pairs of each training step of iteration t, [steps, pairs of a batch, 2]: stored, or computed and
    stored. Those of another mesh or version of jax are made anew: they would not cancel."""
    path, stage = _steps_path(run, t), _spin_stage(run, t)
    model = run.identity_of(stage.start)
    key = scores_key(stage.pairs, stage.plan, run.compute, stage.spec.micro_batches, model)
    logps = hosts.on_first(lambda: read_scores(path, key))
    if logps is None:
        state, frozen = _begin(run, stage)
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
        hosts.on_first(lambda: write_scores(path, key, logps, scored))
        if not stage.spec.rank:
            run.keep_params(stage.start, state.params)  # which training starts from
    return logps


def _exact_measures(run: Run, model: epath.Path) -> dict[str, float]:
    """What can be computed exactly where the data distribution is known: nothing, unless the task is the toy one."""
    if run.config.data.train != "toy:":
        return {}
    from spin_jax import toy

    settings = run.config.toy
    _, unseen = toy.make_examples(run.config.seed, settings.train_rows, settings.eval_prompts)

    def logprobs(examples: Sequence[Example]) -> np.ndarray:
        pairs = hosts.shared(lambda example: _sft_pair(run, example, tokenise(run.chat, example)), examples)
        return _score(run, model, pairs, "exact measures")[:, 0]

    return toy.exact_measures(logprobs, unseen)


def _iteration_flops(run: Run, t: int) -> float:
    """Model FLOPs that iteration t spends on its training rows: sampling, scoring, training."""
    stage = _spin_stage(run, t)
    sampling = sum(forward_flops(run.model, dataclasses.replace(pair, real=_NOTHING)) for pair in _pairs_of(run, t)[0])
    passes = stage.spec.passes + (0 if stage.spec.live else 1)
    return sampling + passes * stage.spec.steps * _forward_flops(run, stage.pairs)


def _sft_step_flops(run: Run, pairs: Sequence[Pair]) -> float:
    spec = programs.sft_spec(run.config, run.model, run.compute, peak=0.0, steps=1)
    return spec.passes * _forward_flops(run, pairs)


def _forward_flops(run: Run, pairs: Sequence[Pair]) -> float:
    """Of a forward pass over a batch of such pairs, on average."""
    return sum(forward_flops(run.model, pair) for pair in pairs) * run.config.train.batch_size / len(pairs)
