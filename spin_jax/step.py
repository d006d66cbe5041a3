"""One optimizer step, as pure functions on pytrees: the SPIN and SFT objectives, the optimizer, the update."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from spin_jax.logprobs import Rows, response_logprobs
from spin_jax.losses import LOSSES, rewards
from spin_jax.models import Compute, ModelConfig, attach


class Batch(NamedTuple):
    """Pairs in packed rows, at most P in each. For supervised fine-tuning their generated responses are empty.

    A loss, its metrics and its gradient are sums over the batch's pairs, each with its weight: they are the same
    however the pairs share rows, and however the rows are cut into micro-batches.

    Attributes:
        rows: the first two responses of a row are the real and the generated one of its first pair, and so on.
        weights_BP: f32, what a pair counts; 0 where a row has fewer pairs. For SPIN 1 / pairs of the whole batch; for
            supervised fine-tuning 1 / response tokens of the whole batch.
        opponent_logps_BP2: f32, stored log p_t of real and generated responses, in nats; not read with a live opponent,
            nor for supervised fine-tuning.
    """

    rows: Rows
    weights_BP: jax.Array
    opponent_logps_BP2: jax.Array


class TrainState(NamedTuple):
    """What a step changes and a checkpoint holds.

    Attributes:
        step: int32, updates made.
        params: the policy's, f32 masters; or low-rank updates of frozen ones.
        opt_state: optax's.
        healthy: bool; False once a loss or gradient was not finite. From then on no step changes anything, so that the
            last good state survives until the host has read the metrics, which it does a step late.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    healthy: jax.Array


# (params, opponent or None, batch) -> (loss, (metrics, log-probs of the batch's responses [B, P, 2]))
Objective = Callable[[dict, dict | None, NamedTuple], tuple[jax.Array, tuple[dict[str, jax.Array], jax.Array]]]


def pair_logprobs(config: ModelConfig, params: dict, batch: Batch, compute: Compute) -> jax.Array:
    """log p(y|x) of both responses of each pair, in nats, f32 [B, P, 2]; the prompt is read once for both."""
    rows, pairs = batch.weights_BP.shape
    return response_logprobs(config, params, batch.rows, 2 * pairs, compute).reshape(rows, pairs, 2)


def spin_objective(config: ModelConfig, compute: Compute, loss: str, beta: float) -> Objective:
    """L_SPIN of equation 4.7 with the opponent's log-probs from the batch, or live where opponent params are given."""

    def objective(params: dict, opponent: dict | None, batch: Batch) -> tuple[jax.Array, tuple]:
        logps_BP2 = pair_logprobs(config, params, batch, compute)
        if opponent is None:
            opponent_BP2 = batch.opponent_logps_BP2
        else:
            opponent_BP2 = jax.lax.stop_gradient(pair_logprobs(config, opponent, batch, compute))

        def mean(x_BP: jax.Array) -> jax.Array:
            return jnp.sum(batch.weights_BP * x_BP)

        with jax.named_scope("loss"):
            rewards_BP2 = rewards(logps_BP2, opponent_BP2, beta)
            margins_BP = rewards_BP2[..., 0] - rewards_BP2[..., 1]
            metrics = {
                "loss": mean(LOSSES[loss](margins_BP)),
                "rewards/real": mean(rewards_BP2[..., 0]),
                "rewards/generated": mean(rewards_BP2[..., 1]),
                "rewards/margin": mean(margins_BP),
                # Strict, as in the released code: 0 where policy and opponent are the same.
                "rewards/accuracy": mean(margins_BP > 0),
                "logps/real": mean(logps_BP2[..., 0]),
                "logps/generated": mean(logps_BP2[..., 1]),
            }
        return metrics["loss"], (metrics, logps_BP2)

    return objective


def sft_objective(config: ModelConfig, compute: Compute) -> Objective:
    """Mean over response tokens of -log p(y_j | x, y_<j): plain supervised fine-tuning."""

    def objective(params: dict, opponent: None, batch: Batch) -> tuple[jax.Array, tuple]:
        del opponent
        logps_BP2 = pair_logprobs(config, params, batch, compute)
        with jax.named_scope("loss"):
            loss = -jnp.sum(logps_BP2[..., 0] * batch.weights_BP)
        return loss, ({"loss": loss}, logps_BP2)

    return objective


def on_adapters(objective: Objective, scale: float, live: bool) -> Objective:
    """`objective` as a function of low-rank updates of frozen params, which are the step's `opponent` then: the policy
    is opponent + scale a b, and one copy of the opponent serves both. `live`: the objective asks for the opponent."""

    def adapted(adapters: dict, opponent: dict, batch: NamedTuple) -> tuple[jax.Array, tuple]:
        return objective(attach(opponent, adapters, scale), opponent if live else None, batch)

    return adapted


def warmup_steps(steps: int, warmup_ratio: float) -> int:
    """Steps of linear warm-up: ceil(warmup_ratio * steps), as in Hugging Face's Trainer."""
    return math.ceil(warmup_ratio * steps)


def learning_rate_schedule(peak: float, steps: int, warmup_ratio: float) -> optax.Schedule:
    """Linear from 0 to `peak` over the first ceil(warmup_ratio * steps) steps, then linear to 0 at `steps` (Hugging
    Face's "linear")."""
    warmup = warmup_steps(steps, warmup_ratio)
    decay = optax.linear_schedule(peak, 0.0, steps - warmup)
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def make_optimizer(
    name: str, schedule: optax.Schedule, clip_norm: float, weight_decay: float
) -> optax.GradientTransformation:
    """The paper's RMSProp as torch computes it (decay 0.99, eps 1e-8 outside the root), or AdamW; both after clipping
    the global norm."""
    if name == "rmsprop":
        scale = optax.chain(
            optax.scale_by_rms(decay=0.99, eps=1e-8, eps_in_sqrt=False), optax.scale_by_learning_rate(schedule)
        )
    else:
        scale = optax.adamw(schedule, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip_norm), scale)


def init_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh optimizer for `params`, which the state takes over. Sharded as the params are when called under jit."""
    return TrainState(jnp.int32(0), params, optimizer.init(params), jnp.bool_(True))


def state_shardings(optimizer: optax.GradientTransformation, params: dict) -> TrainState:
    """Where a state for sharded `params` lives: optimizer moments beside their params, scalars everywhere."""
    param_shardings = jax.tree.map(lambda x: x.sharding, params)
    everywhere = NamedSharding(jax.tree.leaves(param_shardings)[0].mesh, PartitionSpec())
    opt_state = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        param_shardings,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, param_shardings, opt_state, everywhere)


def make_step(objective: Objective, optimizer: optax.GradientTransformation, micro_batches: int) -> Callable:
    """step(state, opponent, batch, scoring=False) -> (state, metrics, log-probs [B, P, 2]), to be jitted; pure.

    The batch's leading axis is cut into `micro_batches` equal parts, whose gradients are added up in f32: the loss, its
    gradient and every metric are sums over the whole batch. Adds `grad_norm` (before clipping) and `healthy` to the
    objective's metrics.

    With `scoring`, a bool scalar, the state stays as it is and no gradient is computed. The log-probs are those that a
    training call finds, bit for bit, since the same instructions of the same program compute them: what the opponent is
    scored with, see docs/algorithm.md. Metrics mean nothing then.
    """

    def gradient(params: dict, opponent: dict | None, batch: NamedTuple, scoring: jax.Array):
        """(gradient, metrics, log-probs); the gradient is 0, and not computed, with `scoring`."""
        loss, backward, (metrics, logps) = jax.vjp(lambda p: objective(p, opponent, batch), params, has_aux=True)
        # The backward pass is the first branch, which the compile check counts.
        (grads,) = jax.lax.cond(
            scoring, lambda: (jax.tree.map(jnp.zeros_like, params),), lambda: backward(jnp.ones_like(loss))
        )
        return grads, metrics, logps

    def summed(params: dict, opponent: dict | None, batch: NamedTuple, scoring: jax.Array):
        if micro_batches == 1:
            return gradient(params, opponent, batch, scoring)

        def accumulate(total, part):
            grads, metrics, logps = gradient(params, opponent, part, scoring)
            return jax.tree.map(jnp.add, total, (grads, metrics)), logps

        # Part i takes rows i, i + micro_batches, ...: each device keeps the rows that it holds.
        parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, micro_batches, *x.shape[1:]), 0, 1), batch)
        shapes = jax.eval_shape(gradient, params, opponent, jax.tree.map(lambda x: x[0], parts), scoring)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[:2])
        (grads, metrics), logps = jax.lax.scan(accumulate, zeros, parts)
        return grads, metrics, jnp.swapaxes(logps, 0, 1).reshape(-1, *logps.shape[2:])

    def step(state: TrainState, opponent: dict | None, batch: NamedTuple, scoring: jax.Array | bool = False):
        grads, metrics, logps = summed(state.params, opponent, batch, scoring)
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(grads)
            healthy = state.healthy & jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            updated = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state, healthy)
            unchanged = state._replace(healthy=jnp.where(scoring, state.healthy, healthy))
            kept = jax.tree.map(lambda new, old: jnp.where(healthy & ~scoring, new, old), updated, unchanged)
        return kept, metrics | {"grad_norm": grad_norm, "healthy": healthy}, logps

    return step
