"""Log-probs of responses: of any prompts and responses (`Scorer`), and of the pairs of every training step.

A margin is beta times a difference of nearly equal log-probs. In bfloat16 each log-prob has a rounding error of half a
nat or more. The errors of policy and opponent cancel only if the same program computes both, on the same rows. So the
training step's own program scores each step's own batch (docs/algorithm.md has the measurements).
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jaxlib.version
import numpy as np

from spin_jax.config import TrainConfig
from spin_jax.data.batch import Batch, HostBatch
from spin_jax.data.packing import Plan, make_packing, of_pairs, pack_batch, plan_scoring
from spin_jax.data.pairs import Pair, TokenIds, token_ids
from spin_jax.devices.compiler_options import jit
from spin_jax.devices.sharding import batch_sharding
from spin_jax.devices.transfer import everywhere, place, to_devices, to_host
from spin_jax.errors import UserError
from spin_jax.evaluation.score_files import Parts
from spin_jax.models import Execution, ModelConfig, param_shardings
from spin_jax.objectives.logprobs import pair_logprobs, target_scores
from spin_jax.runtime import preemption
from spin_jax.runtime.progress import Loop

# Raise it when a change of the code sums in another order: scores of the older arithmetic are then made again.
VERSION = 2


# Sizes of scoring outside of a run, which scores in the rows that it trains on.
PROMPTS = 8  # a device scores at a time; with few-shot examples these are some thousand tokens, enough to be busy
LOGITS_CHUNK = 256  # positions whose logits are held at a time: little memory, and still a large matmul


@functools.cache
def response_program(model: ModelConfig, execution: Execution) -> Callable:
    """Jitted (params, batch) -> log-probs of responses [B, P, Y]. Training differentiates the same function."""
    return jit(execution.mesh, lambda params, batch: pair_logprobs(model, params, batch, execution))


@functools.cache
def token_program(model: ModelConfig, execution: Execution) -> Callable:
    """Jitted (params, batch) -> (log-probs of the responses' tokens, whether each is the most likely one), [B, R]."""

    def program(params: dict, batch: Batch) -> tuple[jax.Array, jax.Array]:
        scores = target_scores(model, params, batch.rows, execution)
        return scores.logps, scores.correct

    return jit(execution.mesh, program)


class TokenScores(NamedTuple):
    """Scores of a response's tokens, f32 [tokens] each.

    Attributes:
        logps: log p(y_j | x, y_<j), in nats.
        correct: 1 where y_j is the most likely token, which greedy decoding would take; else 0.
    """

    logps: np.ndarray
    correct: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    """Computes log-probs of responses. Each call takes params: numpy or jax arrays, on any devices.

    A prompt is computed once for all its responses, and several prompts share a packed row.

    Attributes:
        model: its config.
        settings: `config.train`, of which the length of rows is read, and the size of a micro-batch: that many prompts
            are scored at a time.
        execution: on any mesh, whose data and fsdp axes split rows.
    """

    model: ModelConfig
    settings: TrainConfig
    execution: Execution

    def logprobs(
        self, params: dict, prompts: Sequence[TokenIds], responses: Sequence[Sequence[TokenIds]]
    ) -> np.ndarray:
        """Return log p(y|x) of each response y to each prompt x, in nats, on every process.

        Args:
            prompts: token ids of each prompt.
            responses: for each prompt, the token ids of any number of responses, each with its stop id if it has one.

        Returns:
            f32 [prompts, K], K the largest number of responses to a prompt; NaN where a prompt has fewer.

        Raises:
            UserError: a text is empty, or has an id beyond the vocabulary; or a log-prob is not finite.
        """
        pairs = self._pairs(prompts, responses)
        logps = np.full((len(pairs), max((len(pair.responses) for pair in pairs), default=0)), np.nan, np.float32)
        answered = [pair for pair in pairs if pair.responses]
        for pair, of_pair in zip(answered, self.score(params, answered), strict=True):
            logps[pair.row, : len(pair.responses)] = of_pair[: len(pair.responses)]
        return logps

    def token_logprobs(
        self, params: dict, prompts: Sequence[TokenIds], responses: Sequence[Sequence[TokenIds]]
    ) -> list[list[np.ndarray]]:
        """Return log p(y_j | x, y_<j) in nats, f32 [tokens], for each response to each prompt."""
        return [[one.logps for one in of_prompt] for of_prompt in self.token_scores(params, prompts, responses)]

    def token_scores(
        self,
        params: dict,
        prompts: Sequence[TokenIds],
        responses: Sequence[Sequence[TokenIds]],
        name: str = "score",
    ) -> list[list[TokenScores]]:
        """Like `token_logprobs`, but also say which tokens greedy decoding would take; `name` is that of `score`."""
        pairs = self._pairs(prompts, responses)
        answered, found = [pair for pair in pairs if pair.responses], [[] for _ in pairs]
        if not answered:
            return found
        plan, run = self.plan(answered), self._with_params(token_program, params)
        scored = (run(self._make_batch(answered, plan, number).arrays) for number in range(len(plan.batches)))
        with Loop(name, len(answered), "prompt") as loop:
            for rows, arrays in zip(plan.batches, _one_ahead(scored), strict=True):
                for row, *of_row in zip(rows, *map(to_host, arrays), strict=True):
                    start = 0  # responses lie in the order in which they were packed
                    for pair in (answered[i] for i in row):
                        for y in pair.responses:
                            found[pair.row].append(TokenScores(*(x_R[start : start + len(y)] for x_R in of_row)))
                            start += len(y)
                loop.advance(sum(map(len, rows)))
        return found

    def score(self, params: dict, pairs: Sequence[Pair], name: str = "score", parts: Parts | None = None) -> np.ndarray:
        """log p(y|x) of the responses of each pair, in nats, f32 [pairs, Y], on every process; 0 where a pair has fewer
        than Y.

        Args:
            name: of the loop, where its progress is shown.
            parts: keeps what is scored, and has what an earlier call kept.

        Raises:
            UserError: a log-prob is not finite; the message names the rows.
        """
        if not pairs:
            return np.zeros((0, 0), np.float32)
        plan, run = self.plan(pairs), self._with_params(response_program, params)
        done = score_batches(run, functools.partial(self._make_batch, pairs, plan), plan, name, parts)
        logps = np.zeros((len(pairs), plan.shapes[0].responses), np.float32)
        logps[list(itertools.chain(*itertools.chain(*plan.batches)))] = np.concatenate(done)
        return logps

    def plan(self, pairs: Sequence[Pair]) -> Plan:
        """Which pairs share a row, and which rows a batch."""
        at_a_time = self.settings.batch_size // max(1, self.settings.micro_batches)
        return plan_scoring(pairs, at_a_time, make_packing(self.settings, self.execution.mesh))

    def key(self, pairs: Sequence[Pair], model: Mapping[str, str]) -> str:
        """`scores_key` of what `score` gives under the params of a model."""
        return scores_key(pairs, self.plan(pairs), self.execution, model=model)

    def _pairs(self, prompts: Sequence[TokenIds], responses: Sequence[Sequence[TokenIds]]) -> list[Pair]:
        if len(prompts) != len(responses):
            raise UserError(f"{len(prompts)} prompts, {len(responses)} lists of responses: give a list for each prompt")
        checked, pairs = functools.partial(token_ids, vocab_size=self.model.vocab_size), []
        for i, (prompt, answers) in enumerate(zip(prompts, responses, strict=True)):
            ids = tuple(checked(y, what=f"response {k} to prompt {i}") for k, y in enumerate(answers))
            pairs.append(Pair(i, 0, checked(prompt, what=f"prompt {i}"), ids, (False,) * len(ids)))
        return pairs

    def _make_batch(self, pairs: Sequence[Pair], plan: Plan, number: int) -> HostBatch:
        return pack_batch(self.model, pairs, plan.batches[number], plan.shapes[number])

    def _with_params(self, make_program: Callable, params: dict) -> Callable[[Batch], jax.Array]:
        mesh, program = self.execution.mesh, make_program(self.model, self.execution)
        placed = place(params, param_shardings(mesh, self.model))
        return lambda batch: program(placed, to_devices(batch, batch_sharding(mesh)))


def _one_ahead(results: Iterator) -> Iterator:
    """Yield each result after the next one was asked for, so that the devices compute while the host reads."""
    pending = next(results)
    for result in results:
        preemption.between_batches()
        yield pending
        pending = result
    yield pending


@dataclasses.dataclass
class StepProgram:
    """A training step's own program, called to score: its log-probs equal those of a training call, bit for bit.

    Attributes:
        step: the jitted `train_step.make_step`, which donates the state.
        state: a `TrainState` with the params to score with. Scoring does not change it.
        opponent: the step's second argument.
    """

    step: Callable
    state: Any
    opponent: dict | None

    def __call__(self, batch: Batch) -> jax.Array:
        mesh = self.state.step.sharding.mesh
        arrays, scoring = to_devices(batch, batch_sharding(mesh)), everywhere(True, mesh)
        self.state, _, logps = self.step(self.state, self.opponent, arrays, scoring)
        return logps


def score_batches(
    run: Callable[[Batch], jax.Array],
    make_batch: Callable[[int], HostBatch],
    plan: Plan,
    name: str,
    parts: Parts | None = None,
) -> list[np.ndarray]:
    """Return log-probs of the pairs of each batch of a plan, [pairs of the batch, Y], row after row. Read a batch while
    the devices compute the next one.

    Args:
        run: host arrays -> log-probs [B, P, Y] on the devices, such as a `StepProgram`.
        make_batch: number of a batch -> the batch.
        name, parts: as in `Scorer.score`.

    Raises:
        UserError: a log-prob is not finite; the message names the rows.
    """
    done, pending = parts.read() if parts else [], None
    total = sum(len(row) for rows in plan.batches for row in rows)
    with Loop(name, total, "pair", sum(map(len, done))) as loop:
        for number in itertools.chain(range(len(done), len(plan.batches)), [None]):
            preemption.between_batches()
            if number is not None:
                batch = make_batch(number)
                logps = run(batch.arrays)
            if pending:
                packed, of_rows, scored = pending
                done.append(of_pairs(to_host(scored), packed))
                check_finite(done[-1], of_rows)
                if parts:
                    parts.keep(done)
                loop.advance(len(done[-1]))
            pending = None if number is None else (plan.batches[number], batch.rows, logps)
    return done


def check_finite(logps: np.ndarray, rows: np.ndarray) -> None:
    """Refuse scores [pairs, Y] that are not finite. `rows` are the row numbers of the pairs in the data set."""
    wrong = ~np.isfinite(logps).all(axis=1)
    if wrong.any():
        numbers = ", ".join(map(str, sorted(set(rows[wrong].tolist()))[:20]))
        raise UserError(
            f"the log-probs of {wrong.sum()} pair(s) are not finite (rows {numbers}): activations overflow there. Set "
            "--config.model.compute_dtype=float32, or leave these rows out of the data"
        )


def scores_key(
    pairs: Sequence[Pair],
    plan: Plan,
    execution: Execution,
    micro_batches: int = 1,
    model: Mapping[str, str] | None = None,
) -> str:
    """Hash all that decides the bits of scores: token ids, batches, programs, devices, and the model as
    `checkpoints.fingerprint` identifies it. Do not use stored scores with another key: this run would make others."""
    digest = hashlib.sha256(json.dumps([VERSION, model]).encode())
    for pair in pairs:
        for tokens in (pair.prompt, *pair.responses):
            digest.update(len(tokens).to_bytes(4, "little") + tokens.tobytes())
    devices = execution.mesh.devices
    how = [execution.remat, execution.logits_chunk, execution.kernel, execution.line]
    program = [str(np.dtype(execution.dtype)), *how, micro_batches]
    machine = [devices.shape, devices.flat[0].device_kind, jax.__version__, jaxlib.version.__version__]
    digest.update(json.dumps([program, machine, plan.batches, plan.shapes]).encode())
    return digest.hexdigest()
