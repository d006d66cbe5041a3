"""The jitted decode loop: a slot whose response ends takes the next prompt of a queue while the others go on.

Each decode step writes the ring's next column, the same one for all slots, so that no write is a scatter. When a slot
takes a new prompt, its positions are overwritten, and what it held before becomes invisible. No response is longer than
the ring, so none is overwritten while it is decoded.

Rows never see each other, and each token is drawn with a key of its own. So a response depends on its slot, neighbours
and time only through the order in which sums are rounded.

`programs.decode_programs` jits these functions; `engine.Engine` calls them.
"""

import functools

import jax
import jax.numpy as jnp

from spin_jax.generation.decode_state import DecodeSpec, Prompts, Queue, Report, Responses, Row, Slots, no_responses
from spin_jax.generation.refill import admit, on_each_device, split
from spin_jax.generation.sampling import SamplingParams, next_tokens, token_keys, token_logprobs
from spin_jax.models import EMPTY_POSITION, Columns, columns_axis, forward, rows_axis, unembed


def prefill(spec: DecodeSpec, params: dict, queue: Queue, prompts: Prompts) -> Queue:
    """Run new prompts through the model, and put them into the queue at the places that are given one."""
    batch, width = prompts.tokens_EW.shape
    positions_EW = jnp.arange(width, dtype=jnp.int32)[None] - (width - prompts.lengths_E)[:, None]
    positions_EW = jnp.where(positions_EW < 0, EMPTY_POSITION, positions_EW)
    cache = spec.cache(batch, width)
    hidden_EWD, cache = forward(spec.model, params, prompts.tokens_EW, positions_EW, cache, execution=spec.execution)
    new_E = prompts.lengths_E > 0

    def replaced(path: tuple, old: jax.Array, new: jax.Array) -> jax.Array:
        name = path[0].key
        rows, axis = rows_axis(name, old), columns_axis(name, old)
        kept = min(width, old.shape[axis])
        new = jax.lax.slice_in_dim(new, width - kept, width, axis=axis)
        new = jnp.concatenate([jax.lax.slice_in_dim(old, 0, old.shape[axis] - kept, axis=axis), new], axis)
        if name == "positions":  # hide what an earlier, longer prompt left in the columns before
            new = jnp.where((jnp.arange(new.shape[1]) < new.shape[1] - kept)[None], EMPTY_POSITION, new)
        return jnp.where(jnp.expand_dims(new_E, [i for i in range(old.ndim) if i != rows]), new, old)

    def chosen(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(new_E.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    row = queue.row
    row = Row(
        jax.tree_util.tree_map_with_path(replaced, row.cache, cache),
        *map(chosen, (hidden_EWD[:, -1], prompts.keys_E2, prompts.lengths_E), row[1:]),
    )
    return Queue(row, chosen(prompts.prompt_index_E, queue.prompt_index_E), queue.pending_E | new_E)


def decode(
    spec: DecodeSpec, params: dict, slots: Slots, queue: Queue, sampling: SamplingParams, more: jax.Array
) -> tuple[Slots, Queue, Responses, Report]:
    """Decode until the queue is empty on some device; if the host has no `more` prompts, until it is on all devices.

    Returns:
        slots, queue, responses and a report. The responses, [E], are those that ended in a slot which a prompt then
        took; each is at the place that the prompt had in the queue.
    """
    places = queue.pending_E.shape[0]

    def goes_on(carry: tuple) -> jax.Array:
        left_B = jnp.any(carry[1].pending_E.reshape(spec.shards, places // spec.shards), axis=1)
        return jnp.where(more, jnp.all(left_B), jnp.any(left_B))

    def step(carry: tuple) -> tuple:
        slots, queue, ended = on_each_device(spec, admit, *carry)
        return _step(spec, params, slots, sampling), queue, ended

    slots, queue, ended = jax.lax.while_loop(goes_on, step, (slots, queue, no_responses(spec, places)))
    return slots, queue, ended, _report(slots, queue.pending_E, ended)


def drain(spec: DecodeSpec, params: dict, slots: Slots, sampling: SamplingParams, kept: jax.Array) -> Slots:
    """Decode until no device has more than `kept` running slots."""

    def goes_on(slots: Slots) -> jax.Array:
        return jnp.any(jnp.sum(slots.running_B.reshape(spec.shards, -1), axis=1) > kept)

    return jax.lax.while_loop(goes_on, lambda slots: _step(spec, params, slots, sampling), slots)


def shrink(spec: DecodeSpec, slots: Slots, kept: int) -> tuple[Slots, Responses, Report]:
    """Reduce each device's slots to `kept`, which hold all its running responses; also return the others' responses."""
    slots, ended = on_each_device(spec, functools.partial(split, kept), slots)
    return slots, ended, _report(slots, jnp.zeros(0, bool), ended)


def _report(slots: Slots, pending_E: jax.Array, ended: Responses) -> Report:
    responses = jnp.sum(ended.prompt_index_B >= 0)
    return Report(pending_E, slots.steps, slots.busy, responses, jnp.sum(ended.lengths_B))


def _step(spec: DecodeSpec, params: dict, slots: Slots, sampling: SamplingParams) -> Slots:
    """Draw a token for every slot, and run it through the model."""
    row, done, running_B = slots.row, slots.responses, slots.running_B
    model, execution, cap = spec.model, spec.execution, spec.max_new_tokens
    logits_BV = unembed(model, params, row.hidden_BD, execution)
    too_short_B1 = (done.lengths_B < sampling.min_new_tokens)[:, None]
    allowed_BV = logits_BV.at[:, sampling.stop_ids].add(jnp.where(too_short_B1, -jnp.inf, 0.0), mode="drop")
    tokens_B = next_tokens(allowed_BV, token_keys(row.keys_B2, done.lengths_B), sampling, spec.filtered)
    here_BO = running_B[:, None] & (jnp.arange(cap)[None] == done.lengths_B[:, None])
    stopped_B = running_B & jnp.isin(tokens_B, sampling.stop_ids)
    done = done._replace(
        tokens_BO=jnp.where(here_BO, tokens_B[:, None], done.tokens_BO),
        logprobs_BO=jnp.where(here_BO, token_logprobs(logits_BV, tokens_B)[:, None], done.logprobs_BO),
        lengths_B=done.lengths_B + running_B,
        stopped_B=done.stopped_B | stopped_B,
    )
    still_B, state_B = running_B & ~stopped_B & (done.lengths_B < cap), slots.state_B
    if sampling.stops_AV is not None:
        state_B = sampling.stops_AV[state_B, tokens_B]
        still_B &= state_B < sampling.stops_AV.shape[0] - 1
    positions_B1 = jnp.where(still_B, row.prompt_lengths_B + done.lengths_B - 1, EMPTY_POSITION)[:, None]
    columns = _columns(spec, row, still_B, slots.steps)
    hidden_B1D, cache = forward(model, params, tokens_B[:, None], positions_B1, row.cache, columns, execution=execution)
    row = row._replace(cache=cache, hidden_BD=hidden_B1D[:, 0])
    return Slots(row, done, still_B, state_B, slots.steps + 1, slots.busy + jnp.sum(running_B))


def _columns(spec: DecodeSpec, row: Row, running_B: jax.Array, steps: jax.Array) -> Columns:
    """Choose the columns of a step: write the ring's next one, read none before the longest running slot's prompt."""
    prompt_columns = row.cache["positions"].shape[1] - spec.ring
    starts = [0]
    # Halve the columns that are left, since each start is a compiled branch. Below 32 columns there is nothing to save.
    # In a cache by layer there is nothing to save either: a part of an array is copied before it is read.
    while not spec.by_layer and (remaining := (prompt_columns - starts[-1]) // 2) >= 32:
        starts.append(prompt_columns - remaining)
    empty = prompt_columns - jnp.max(jnp.where(running_B, row.prompt_lengths_B, 0))
    start = jnp.sum(empty >= jnp.array(starts[1:], jnp.int32)) if len(starts) > 1 else 0
    return Columns(prompt_columns + steps % spec.ring, tuple(starts), start)
