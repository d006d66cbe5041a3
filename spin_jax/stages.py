"""The stages of an iteration. Each reads what it needs from the run's workdir, writes what it makes, and does nothing
if that exists."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from spin_jax import hosts, memory, programs, report, sharding, tracing
from spin_jax.batches import (
    HostBatch,
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
from spin_jax.models import for_compute
from spin_jax.responses import Prompt, Response, delete_parts, generate, note_settings
from spin_jax.run import Run
from spin_jax.score import held_out_rewards, nats_per_token, read_scores, score, with_scores, write_scores
from spin_jax.step import (
    Objective,
    learning_rate_schedule,
    make_optimizer,
    on_adapters,
    sft_objective,
    spin_objective,
)
from spin_jax.stop_strings import stop_table
from spin_jax.tokens import Tokenised, tokenise
from spin_jax.train import fit
from spin_jax.workdir import check_model

_LOG = logging.getLogger(__name__)
_NOTHING = np.zeros(0, np.int32)  # no response


@memory.tells("SFT", memory.for_training)
def fine_tune(run: Run) -> None:
    """Supervised fine-tuning of the source model, where the config asks for it: theta_0 in `sft/model`."""
    directory = run.workdir / "sft"
    if not run.config.sft.epochs or _is_trained(directory):
        return
    pairs = _sft_pairs(run)
    steps = num_steps(len(pairs), run.config.sft.epochs, run.config.train.batch_size)
    params = _fit_sft(run, run.source, pairs, steps, run.config.sft.learning_rate, directory, "SFT")
    _export(run, directory, params)


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
    settings, model = run.config.generate, run.identity_of(t)
    hosts.on_first(lambda: note_settings(directory, {f"model ({part})": content for part, content in model.items()}))
    stops_SV = stop_table(run.chat.tokenizer, settings.stop_strings, run.model.vocab_size)
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


@memory.tells("score", memory.for_training)
def score_pairs(run: Run, t: int) -> None:
    """The opponent's log-probs of every pair that iteration t trains or is measured on: `scores/opponent.npz`.

    With a live opponent only the held-out pairs are scored here.
    """
    path = run.iteration(t) / "scores" / "opponent.npz"
    if hosts.on_first(path.exists):
        return
    pairs = _scored_ahead(run, t)
    logps = _score(run, run.start_of(t), pairs, f"iteration {t}: score")
    hosts.on_first(lambda: write_scores(path, pairs, logps))


@memory.tells("train", memory.for_training)
def train_policy(run: Run, t: int) -> None:
    """theta_{t+1}: minimise equation 4.7 from theta_t on the newest and earlier iterations' pairs; export it to
    `model/`."""
    directory = run.iteration(t)
    if _is_trained(directory):
        return
    config, stored = run.config, run.config.spin.opponent == "stored"
    pairs = _mixed_pairs(run, t)
    scored = _with_opponent_scores(run, t)  # also with a live opponent: evaluation needs them, and refuses too late
    if stored:
        pairs = scored[: len(pairs)]
    steps = num_steps(len(pairs), config.train.epochs, config.train.batch_size)
    beta = at_iteration(config.spin.beta, t)
    policy = _fit(
        run,
        spin_objective(run.model, run.compute, config.spin.loss, beta),
        run.start_of(t),
        live=not stored,
        steps=steps,
        optimizer=config.train.optimizer,
        peak=at_iteration(config.train.learning_rate, t),
        make_batch=_batch_maker(run, pairs, spin_batch, config.seed + t, steps),
        seed=config.seed + t,
        directory=directory,
        name=f"iteration {t}: train",
    )
    _export(run, directory, policy)


@memory.tells("evaluate", memory.for_training)
def describe_start(run: Run) -> None:
    """The summary's first row: theta_0, the opponent of iteration 0, which has scored the held-out pairs."""

    def measure() -> dict:
        row = {"model": "SFT", "iteration": None}
        if held_out := _pairs_of(run, 0)[1]:
            row["held_out/nats_per_token"] = nats_per_token(_with_opponent_scores(run, 0)[-len(held_out) :])
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
        by_opponent = _with_opponent_scores(run, t)[-len(held_out) :]
        policy_logps = _score(run, run.start_of(t + 1), held_out, f"iteration {t}: evaluate")
        by_policy = with_scores(held_out, policy_logps)
        row["held_out/nats_per_token"] = nats_per_token(by_policy)
        row |= held_out_rewards(by_policy, by_opponent, at_iteration(run.config.spin.beta, t))
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
            logps = _score(run, directory / "model", held_out, f"iteration {t}: evaluate SFT control")
            row["held_out/nats_per_token"] = nats_per_token(with_scores(held_out, logps))
        return row | _exact_measures(run, directory / "model")

    _measure_once(directory, measure)


def _measure_once(directory: epath.Path, measure: Callable[[], dict]) -> None:
    """`result.json` in a directory: a row of the summary, measured where there is none that can be read."""
    if not hosts.on_first(lambda: report.read_result(directory)):
        row = measure()
        hosts.on_first(lambda: report.write_result(directory, row))


# ---- training


def _fit_sft(
    run: Run, start: epath.Path, pairs: Sequence[Pair], steps: int, peak: float, directory: epath.Path, name: str
) -> dict:
    return _fit(
        run,
        sft_objective(run.model, run.compute),
        start,
        live=False,
        steps=steps,
        optimizer=run.config.sft.optimizer,
        peak=peak,
        make_batch=_batch_maker(run, pairs, sft_batch, run.config.seed, steps),
        seed=run.config.seed,
        directory=directory,
        name=name,
    )


def _fit(
    run: Run,
    objective: Objective,
    start: epath.Path,
    *,
    live: bool,
    steps: int,
    optimizer: str,
    peak: float,
    make_batch: Callable[[int], HostBatch],
    seed: int,
    directory: epath.Path,
    name: str,
) -> dict:
    """The params of `start` trained with a fresh optimizer and schedule: all of them, or with `config.lora` fresh
    low-rank updates of them, drawn with `seed` and merged. `live`: the objective asks for the opponent's params."""
    settings, rank, mesh = run.config.train, run.config.lora.rank, run.compute.mesh
    params, opponent = run.take_params(start), None
    if rank:
        # One copy in the compute dtype is under the updates and the opponent; the f32 one is read again to be merged.
        opponent = programs.make_resharding(run.model, run.compute)(params)
        params = programs.make_adapters(run.model, rank, mesh)(jax.random.key(seed))
        objective = on_adapters(objective, run.config.lora.alpha / rank, live)
    elif live:
        opponent = jax.tree.map(jnp.copy, for_compute(params, run.compute.dtype))
    schedule = learning_rate_schedule(peak, steps, settings.warmup_ratio)
    transform = make_optimizer(optimizer, schedule, settings.clip_norm, settings.weight_decay)
    init, step = programs.make_training(objective, transform, settings.micro_batches, params, mesh)
    profile, run.profile = run.profile, False
    with tracing.traced(step, directory / "profile") if profile else contextlib.nullcontext(step) as step:
        state = fit(
            step,
            init(params),
            opponent,
            steps=steps,
            make_batch=make_batch,
            sharding=sharding.batch_sharding(mesh),
            passes=programs.training_passes(run.config) + live,
            schedule=schedule,
            directory=directory,
            checkpoint_every=settings.checkpoint_every,
            name=name,
        )
    if rank:
        del opponent
        merging = programs.make_merging(run.model, run.config.lora.alpha / rank, mesh)
        return merging(run.take_params(start), state.params)
    return state.params


def _batch_maker(
    run: Run, pairs: Sequence[Pair], lay_out: Callable, seed: int, steps: int
) -> Callable[[int], HostBatch]:
    """step -> batch, a function of (seed, step) and the pairs."""
    settings = run.config.train
    packing = programs.make_packing(settings, run.compute.mesh, settings.micro_batches)
    plan = plan_training(pairs, batch_order(len(pairs), settings.batch_size, seed, steps), packing)
    _LOG.info("%s", plan)
    return lambda step: lay_out(run.model, pairs, plan.batches[step], plan.shapes[step])


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
    texts = run.chat.tokenizer.batch_decode([response.tokens for response in responses], skip_special_tokens=True)
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
    delete_parts(directory)


def _pairs_of(run: Run, t: int) -> tuple[list[Pair], list[Pair]]:
    """(train, held-out) pairs whose y' are the responses of iteration t."""
    if t not in run.pairs:
        path = run.iteration(t) / "generated" / "pairs.parquet"
        if hosts.on_first(path.exists):
            complaint = f"{path} was written by another model than that in {run.start_of(t)}"
            check_model(read_model(path), run.identity_of(t), complaint, f"delete {path.parent}, and go on")
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


def _scored_ahead(run: Run, t: int) -> list[Pair]:
    """The pairs whose opponent log-probs are stored: held-out ones, and before them those trained on unless the
    opponent is live."""
    return (_mixed_pairs(run, t) if run.config.spin.opponent == "stored" else []) + _pairs_of(run, t)[1]


def _with_opponent_scores(run: Run, t: int) -> list[Pair]:
    path, pairs = run.iteration(t) / "scores" / "opponent.npz", _scored_ahead(run, t)
    if not hosts.on_first(path.exists):
        raise UserError(f"{path} is missing: run the score stage of iteration {t} first")
    return with_scores(pairs, read_scores(path, pairs))


def _sft_pairs(run: Run) -> list[Pair]:
    """The examples to train on as pairs without a generated response."""
    return [_sft_pair(run, example) for example in run.train_examples]


def _sft_pair(run: Run, example: Example, tokens: Tokenised | None = None) -> Pair:
    return run.pair(example, _NOTHING, False, -1, tokens)


# ---- measures


def _score(run: Run, model: epath.Path, pairs: Sequence[Pair], name: str) -> np.ndarray:
    if not pairs:
        return np.zeros((0, 2), np.float32)
    settings = run.config.train
    plan = plan_scoring(
        pairs, settings.batch_size // settings.micro_batches, programs.make_packing(run.config.train, run.compute.mesh)
    )
    return score(
        programs.make_scorer(run.model, run.compute),
        run.params(model),
        run.model,
        pairs,
        plan,
        sharding=sharding.batch_sharding(run.compute.mesh),
        name=name,
    )


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
    config = run.config
    newest, mixed = _pairs_of(run, t)[0], _mixed_pairs(run, t)
    sampling = sum(forward_flops(run.model, dataclasses.replace(pair, real=_NOTHING)) for pair in newest)
    one_pass = sum(forward_flops(run.model, pair) for pair in mixed)
    steps = num_steps(len(mixed), config.train.epochs, config.train.batch_size)
    passes = programs.training_passes(config) * steps * config.train.batch_size / len(mixed)
    opponent = 1 if config.spin.opponent == "stored" else steps * config.train.batch_size / len(mixed)
    return sampling + (passes + opponent) * one_pass


def _sft_step_flops(run: Run, pairs: Sequence[Pair]) -> float:
    one_pass = sum(forward_flops(run.model, pair) for pair in pairs)
    return programs.training_passes(run.config) * one_pass * run.config.train.batch_size / len(pairs)
