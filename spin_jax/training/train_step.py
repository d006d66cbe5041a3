"""One optimizer step, as pure functions on pytrees."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from spin_jax.data.batch import Batch
from spin_jax.models import Dropout, attach
from spin_jax.objectives.interface import BatchLoss


class TrainState(NamedTuple):
    """What a step updates and a checkpoint holds.

    Attributes:
        step: int32, updates made.
        params: the policy's f32 params, or low-rank updates of frozen params.
        opt_state: optax's.
        healthy: bool; False once a loss or gradient was not finite. From then on no step changes the state: the host
            reads metrics a step late, and must find the last good state.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    healthy: jax.Array


def on_adapters(loss: BatchLoss, scale: float, live: bool) -> BatchLoss:
    """Make `loss` a function of low-rank updates: the policy is opponent + scale a b.

    The step's `opponent` is then the frozen params. One copy serves as the policy's frozen weights and, if `live`, as
    the opponent that the loss asks for, which has no dropout.
    """

    def adapted(
        adapters: dict, opponent: dict | None, batch: Batch, dropout: Dropout | None = None
    ) -> tuple[jax.Array, tuple]:
        assert opponent is not None, "low-rank updates are of frozen params, which the step is given"
        return loss(attach(opponent, adapters, scale, dropout), opponent if live else None, batch)

    return adapted


def init_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state at step 0 for `params`. Under jit it is sharded as they are."""
    return TrainState(jnp.int32(0), params, optimizer.init(params), jnp.bool_(True))


def state_shardings(optimizer: optax.GradientTransformation, params: dict) -> TrainState:
    """Return the shardings of a state: optimizer moments are sharded as their params, and scalars are everywhere."""
    param_shardings = jax.tree.map(lambda x: x.sharding, params)
    everywhere: Any = NamedSharding(jax.tree.leaves(param_shardings)[0].mesh, PartitionSpec())
    opt_state = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        param_shardings,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, param_shardings, opt_state, everywhere)


def make_step(
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    micro_batches: int,
    dropout: tuple[float, int] | None = None,
) -> Callable:
    """Make step(state, opponent, batch, scoring=False) -> (state, metrics, log-probs [B, P, Y]). It is pure; jit it.

    Cut the batch's leading axis into `micro_batches` equal parts, and add up their gradients in f32: loss, gradient and
    metrics are sums over the whole batch. Add `grad_norm` (before clipping) and `healthy` to the loss's metrics.

    With `scoring`, a bool scalar, leave the state as it is, and compute no gradient. The log-probs equal those of a
    training call, bit for bit, because the same instructions of the same program compute them. So this step scores the
    opponent (docs/algorithm.md). Metrics mean nothing then.

    Args:
        loss_fn: a `BatchLoss`; with dropout, one of `on_adapters`.
        dropout: (rate, seed) of dropout of the inputs of low-rank updates, which depends on (seed, step, micro-batch).
            There is none with `scoring`. While all b are 0, it makes no difference.
    """

    def dropout_at(step: jax.Array, scoring: jax.Array | bool) -> Dropout | None:
        if dropout is None:
            return None
        rate, seed = dropout
        return Dropout(jax.random.fold_in(jax.random.key(seed), step), jnp.where(scoring, 0.0, rate))

    def gradient(params: dict, opponent: dict | None, batch: Batch, scoring: jax.Array | bool, dropped: Dropout | None):
        """(gradient, metrics, log-probs); the gradient is 0, and not computed, with `scoring`."""
        loss_of = loss_fn if dropped is None else functools.partial(loss_fn, dropout=dropped)
        loss, backward, (metrics, logps) = jax.vjp(lambda p: loss_of(p, opponent, batch), params, has_aux=True)
        # XLA puts the false branch first, and the compile check counts the first branch: let that be the backward pass.
        (grads,) = jax.lax.cond(
            scoring, lambda: (jax.tree.map(jnp.zeros_like, params),), lambda: backward(jnp.ones_like(loss))
        )
        return grads, metrics, logps

    def summed(params: dict, opponent: dict | None, batch: Batch, scoring: jax.Array | bool, dropped: Dropout | None):
        if micro_batches == 1:
            return gradient(params, opponent, batch, scoring, dropped)

        def accumulate(total, part):
            grads, metrics, logps = gradient(params, opponent, part[0], scoring, part[1])
            return jax.tree.map(jnp.add, total, (grads, metrics)), logps

        # Part i takes rows i, i + micro_batches, ...: each device keeps the rows that it holds.
        parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, micro_batches, *x.shape[1:]), 0, 1), batch)
        parts = (parts, dropped and dropped.split(micro_batches))
        part, of_part = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(gradient, params, opponent, part, scoring, of_part)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[:2])
        (grads, metrics), logps = jax.lax.scan(accumulate, zeros, parts)
        return grads, metrics, jnp.swapaxes(logps, 0, 1).reshape(-1, *logps.shape[2:])

    def step(state: TrainState, opponent: dict | None, batch: Batch, scoring: jax.Array | bool = False):
        dropped = dropout_at(state.step, scoring)
        grads, metrics, logps = summed(state.params, opponent, batch, scoring, dropped)
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(grads)
            healthy = state.healthy & jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            step, params = state.step + 1, cast(dict, optax.apply_updates(state.params, updates))
            updated = TrainState(step, params, opt_state, healthy)
            unchanged = state._replace(healthy=jnp.where(scoring, state.healthy, healthy))
            kept = jax.tree.map(lambda new, old: jnp.where(healthy & ~scoring, new, old), updated, unchanged)
        return kept, metrics | {"grad_norm": grad_norm, "healthy": healthy}, logps

    return step
