"""Move prompts from the queue to slots: each device from its own places to its own slots, so no cache is exchanged."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from spin_jax.generation.decode_state import DecodeSpec, Queue, Responses, Row, Slots, row_specs
from spin_jax.models import EMPTY_POSITION, rows_axis


def on_each_device(spec: DecodeSpec, function: Callable, *trees):
    """Call a function of (slots, ...) on each device with that device's rows. Results are split like arguments."""
    mesh = spec.execution.mesh
    if mesh.size == 1:
        return function(*trees)
    result = row_specs(jax.eval_shape(function, *trees))
    # check_vma=False: jax cannot see that devices which hold the same rows compute the same results.
    by_device = jax.shard_map(function, mesh=mesh, in_specs=row_specs(trees), out_specs=result, check_vma=False)
    return by_device(*trees)


def admit(slots: Slots, queue: Queue, ended: Responses) -> tuple[Slots, Queue, Responses]:
    """Move pending prompts to slots that do not run, and the responses that were in these slots to `ended`."""

    def waiting(carry: tuple) -> jax.Array:
        slots, queue, _ = carry
        return jnp.any(queue.pending_E) & ~jnp.all(slots.running_B)

    def one(carry: tuple) -> tuple:
        slots, queue, ended = carry
        slot, place = jnp.argmin(slots.running_B), jnp.argmax(queue.pending_E)
        ended = jax.tree.map(lambda to, of: to.at[place].set(of[slot]), ended, slots.responses)
        new = Responses(queue.prompt_index_E[place], *(jnp.zeros(x.shape[1:], x.dtype) for x in slots.responses[1:]))
        responses = jax.tree.map(lambda to, of: to.at[slot].set(of), slots.responses, new)
        moved = functools.partial(_moved, slot, place)
        cache = jax.tree_util.tree_map_with_path(moved, slots.row.cache, queue.row.cache)
        rest = (to.at[slot].set(of[place]) for to, of in zip(slots.row[1:], queue.row[1:], strict=True))
        slots = slots._replace(
            row=Row(cache, *rest),
            responses=responses,
            running_B=slots.running_B.at[slot].set(True),
            state_B=slots.state_B.at[slot].set(0),
        )
        return slots, queue._replace(pending_E=queue.pending_E.at[place].set(False)), ended

    return jax.lax.while_loop(waiting, one, (slots, queue, ended))


def _moved(slot: jax.Array, place: jax.Array, path: tuple, to: jax.Array, of: jax.Array) -> jax.Array:
    """Copy the columns of a place of the queue to the first columns of a slot, and hide the slot's other columns.

    Args:
        path, to, of: name of an array of the cache; that array of the slots; that array of the queue.
    """
    name = path[0].key
    if name == "positions":
        return to.at[slot].set(jnp.full(to.shape[1], EMPTY_POSITION).at[: of.shape[1]].set(of[place]))
    rows = rows_axis(name, to)
    taken = jax.lax.dynamic_slice_in_dim(of, place, 1, axis=rows)
    return jax.lax.dynamic_update_slice_in_dim(to, taken, slot, axis=rows)


def split(kept: int, slots: Slots) -> tuple[Slots, Responses]:
    """Sort running slots to the front. Return the first `kept` slots, and the responses of the others."""
    order_B = jnp.argsort(~slots.running_B)
    first, others = order_B[:kept], order_B[kept:]
    cache = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.take(x, first, axis=rows_axis(path[0].key, x)), slots.row.cache
    )
    row = Row(cache, *(x[first] for x in slots.row[1:]))
    left = slots._replace(
        row=row,
        responses=jax.tree.map(lambda x: x[first], slots.responses),
        running_B=slots.running_B[first],
        state_B=slots.state_B[first],
    )
    return left, jax.tree.map(lambda x: x[others], slots.responses)
