"""The jitted decode loop: slots that are refilled from a queue of prefilled prompts as soon as a response ends.

A slot is a row of the cache. Its first P columns hold a prompt, right-aligned; the other R are a ring that all slots
share the writing of: every decode step fills one column, the next, for each of them, so that nothing is scattered, and
a slot that takes a new prompt forgets what it had there by its positions alone. A response is at most R tokens long and
is gone from the slot before the ring comes round. Rows never see each other, and token j of a response is drawn with a
key of its own: which slot it has, who is beside it and when it began change nothing but the order that sums are
rounded in.

Each device fills its own slots from its own places of the queue: nothing of a cache travels. Five programs, jitted in
`programs.make_sampler`; the host's part is `engine.generate`.

Axes: B slots, Q places of the queue, P prompt columns, W width of the prompts that are prefilled (at most P, but for a
sliding window), R ring, C cap of a response in tokens, L layers, D hidden, V vocab.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from spin_jax.devices.sharding import spec, ways
from spin_jax.generation.sampling import Decoding, next_tokens, token_keys, token_logprobs
from spin_jax.models import (
    EMPTY_POSITION,
    Columns,
    Compute,
    ModelConfig,
    cache_dtype,
    columns_axis,
    forward,
    init_cache,
    rows_axis,
    unembed,
)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """What the programs have compiled in.

    Attributes:
        model: its config.
        max_new_tokens: C.
        truncate: whether top-p and top-k are looked at; they cost some passes over the logits every step.
        compute: its mesh that of `sharding.decode_mesh`.
    """

    model: ModelConfig
    max_new_tokens: int
    truncate: bool
    compute: Compute

    def prompt_columns(self, width: int) -> int:
        """P for prompts of up to `width` tokens: what is further back than a sliding window is not kept."""
        return min(width, self.model.sliding_window or width)

    @property
    def ring(self) -> int:
        """R, likewise."""
        return min(self.max_new_tokens, self.model.sliding_window or self.max_new_tokens)

    @property
    def by_layer(self) -> bool:
        """Whether params and cache have arrays of their own for each layer."""
        return self.compute.on_one_cpu

    def cache(self, rows: int, columns: int) -> dict:
        dtype = cache_dtype(self.compute.dtype, self.compute.platform)
        return init_cache(self.model, rows, columns, dtype, self.compute.mesh, by_layer=self.by_layer)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The programs of this module, jitted by `programs.make_sampler`; those that take slots or a queue donate them.

    Attributes:
        copy: params -> what the others take in their place: once an iteration, not once a decode step.
        abstract_params: the tree of what `copy` gives, as jax.ShapeDtypeStruct with shardings.
        start: (slots, places, width) -> Slots, Queue: nothing in them.
        prefill: (params, queue, prompts) -> Queue.
        decode: (params, slots, queue, decoding, more) -> Slots, Queue, Responses, Report.
        drain: (params, slots, decoding, kept) -> Slots.
        stop_ids, stops_SV: as `sampling.Decoding` has them.
        shrink: (slots, kept) -> Slots, Responses, Report; donates nothing, as no array stays as large as it was.
    """

    copy: Callable
    abstract_params: dict
    start: Callable
    prefill: Callable
    decode: Callable
    drain: Callable
    shrink: Callable
    stop_ids: tuple[int, ...] = ()
    stops_SV: np.ndarray | None = None

    def laid_out(self, params: dict) -> dict:
        """`copy` of the model's params, or they themselves where they are as it would make them."""

        def alike(x: jax.Array, wanted: jax.ShapeDtypeStruct) -> bool:
            if not isinstance(x, jax.Array) or x.dtype != wanted.dtype:
                return False
            return x.sharding.is_equivalent_to(wanted.sharding, x.ndim)

        if jax.tree.structure(params) == jax.tree.structure(self.abstract_params):
            if all(jax.tree.leaves(jax.tree.map(alike, params, self.abstract_params))):
                return params
        return self.copy(params)


class Responses(NamedTuple):
    """Sampled responses.

    Attributes:
        asked_B: int32, whose they are: the number that the prompt came with; -1 is nobody's.
        tokens_BC: int32; a response, then zeros. A stop id, where one was drawn, is its last token.
        logprobs_BC: f32, log p of each token as `sampling.token_logprobs` gives it, then zeros.
        lengths_B: int32, tokens of the response.
        finished_B: bool, whether it ended with a stop id: False where it was cut at the cap or has a stop string.
    """

    asked_B: jax.Array
    tokens_BC: jax.Array
    logprobs_BC: jax.Array
    lengths_B: jax.Array
    finished_B: jax.Array


class Prompts(NamedTuple):
    """Prompts for the places of a queue.

    Attributes:
        tokens_QW: int32, left-padded.
        lengths_Q: int32; 0: nothing new for this place.
        keys_Q2: uint32, from `sampling.response_keys`.
        asked_Q: int32, a number that comes back with the response.
    """

    tokens_QW: jax.Array
    lengths_Q: jax.Array
    keys_Q2: jax.Array
    asked_Q: jax.Array


class Row(NamedTuple):
    """What a queue and a slot both know of a prompt, for each of B.

    Attributes:
        cache: from `models.init_cache`, of P or P + R columns.
        hidden_BD: the final hidden state of the last token, which the next one is drawn from.
        keys_B2: uint32.
        prompts_B: int32, the prompt's tokens.
    """

    cache: dict
    hidden_BD: jax.Array
    keys_B2: jax.Array
    prompts_B: jax.Array


class Queue(NamedTuple):
    """Prefilled prompts that wait for a slot: where pending_Q."""

    row: Row
    asked_Q: jax.Array
    pending_Q: jax.Array


class Slots(NamedTuple):
    """Responses in the making.

    Attributes:
        row: of P + R columns.
        responses: as far as they are.
        running_B: bool.
        state_B: int32, of the automaton that finds stop strings.
        steps: int32, decode steps so far.
        busy: f32, slots that were running in them, summed up.
    """

    row: Row
    responses: Responses
    running_B: jax.Array
    state_B: jax.Array
    steps: jax.Array
    busy: jax.Array


class Report(NamedTuple):
    """What the host wants to know of a call, on every process: small, and not donated.

    Attributes:
        pending_Q: bool, the queue's places that are still taken.
        steps, busy: of the slots.
        responses, tokens: int32, that ended in slots which this call gave away, and their tokens.
    """

    pending_Q: jax.Array
    steps: jax.Array
    busy: jax.Array
    responses: jax.Array
    tokens: jax.Array


def start(decoder: Decoder, slots: int, queue: int, width: int) -> tuple[Slots, Queue]:
    """Empty slots and an empty queue for prompts of up to `width` tokens."""
    columns = decoder.prompt_columns(width)
    waiting = Queue(_empty_row(decoder, queue, columns), jnp.full(queue, -1, jnp.int32), jnp.zeros(queue, bool))
    row, responses = _empty_row(decoder, slots, columns + decoder.ring), _no_responses(decoder, slots)
    running_B, state_B = jnp.zeros(slots, bool), jnp.zeros(slots, jnp.int32)
    return Slots(row, responses, running_B, state_B, steps=jnp.int32(0), busy=jnp.float32(0)), waiting


def _empty_row(decoder: Decoder, rows: int, columns: int) -> Row:
    hidden_BD = jnp.zeros((rows, decoder.model.hidden_size), decoder.compute.dtype)
    keys_B2, prompts_B = jnp.zeros((rows, 2), jnp.uint32), jnp.zeros(rows, jnp.int32)
    return Row(decoder.cache(rows, columns), hidden_BD, keys_B2, prompts_B)


def _no_responses(decoder: Decoder, rows: int) -> Responses:
    shape = (rows, decoder.max_new_tokens)
    return Responses(
        asked_B=jnp.full(rows, -1, jnp.int32),
        tokens_BC=jnp.zeros(shape, jnp.int32),
        logprobs_BC=jnp.zeros(shape, jnp.float32),
        lengths_B=jnp.zeros(rows, jnp.int32),
        finished_B=jnp.zeros(rows, bool),
    )


def specs(tree):
    """Where the arrays lie that a device has rows of: all but scalars; a cache's have an axis of layers in front, and
    its heads are split. (A cache by layer is on one device, where all specs are alike.)"""

    def of(path: tuple, x: jax.Array) -> PartitionSpec:
        if getattr(path[-1], "key", "positions") != "positions":
            return spec(*("layers", "rows", "kv_heads", None, None)[: x.ndim])
        return spec(*("rows",)[: x.ndim])

    return jax.tree_util.tree_map_with_path(of, tree)


def prefill(decoder: Decoder, params: dict, queue: Queue, prompts: Prompts) -> Queue:
    """The queue with new prompts in the places that are given one."""
    batch, width = prompts.tokens_QW.shape
    positions_QW = jnp.arange(width, dtype=jnp.int32)[None] - (width - prompts.lengths_Q)[:, None]
    positions_QW = jnp.where(positions_QW < 0, EMPTY_POSITION, positions_QW)
    cache = decoder.cache(batch, width)
    hidden_QWD, cache = forward(decoder.model, params, prompts.tokens_QW, positions_QW, cache, compute=decoder.compute)
    new_Q = prompts.lengths_Q > 0

    def replaced(path: tuple, old: jax.Array, new: jax.Array) -> jax.Array:
        name = path[0].key
        rows, axis = rows_axis(name, old), columns_axis(name, old)
        kept = min(width, old.shape[axis])
        new = jax.lax.slice_in_dim(new, width - kept, width, axis=axis)
        new = jnp.concatenate([jax.lax.slice_in_dim(old, 0, old.shape[axis] - kept, axis=axis), new], axis)
        if name == "positions":  # what an earlier, longer prompt left in the columns before
            new = jnp.where((jnp.arange(new.shape[1]) < new.shape[1] - kept)[None], EMPTY_POSITION, new)
        return jnp.where(jnp.expand_dims(new_Q, [i for i in range(old.ndim) if i != rows]), new, old)

    def chosen(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(new_Q.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    row = queue.row
    row = Row(
        jax.tree_util.tree_map_with_path(replaced, row.cache, cache),
        *map(chosen, (hidden_QWD[:, -1], prompts.keys_Q2, prompts.lengths_Q), row[1:]),
    )
    return Queue(row, chosen(prompts.asked_Q, queue.asked_Q), queue.pending_Q | new_Q)


def decode(
    decoder: Decoder, params: dict, slots: Slots, queue: Queue, decoding: Decoding, more: jax.Array
) -> tuple[Slots, Queue, Responses, Report]:
    """Decode steps until a device's places of the queue are empty; or, with `more` false, those of all.

    Returns:
        Slots and queue, and the responses that ended in a slot which a prompt then took: [Q], at the prompt's place.
    """
    places, shards = queue.pending_Q.shape[0], _shards(decoder)

    def unfinished(carry: tuple) -> jax.Array:
        left_S = jnp.any(carry[1].pending_Q.reshape(shards, places // shards), axis=1)
        return jnp.where(more, jnp.all(left_S), jnp.any(left_S))

    def step(carry: tuple) -> tuple:
        slots, queue, ended = _on_each_device(decoder, _admit, *carry)
        return _step(decoder, params, slots, decoding), queue, ended

    slots, queue, ended = jax.lax.while_loop(unfinished, step, (slots, queue, _no_responses(decoder, places)))
    return slots, queue, ended, _report(slots, queue.pending_Q, ended)


def drain(decoder: Decoder, params: dict, slots: Slots, decoding: Decoding, kept: jax.Array) -> Slots:
    """Decode steps until no device has more than `kept` running slots."""
    shards = _shards(decoder)

    def unfinished(slots: Slots) -> jax.Array:
        return jnp.any(jnp.sum(slots.running_B.reshape(shards, -1), axis=1) > kept)

    return jax.lax.while_loop(unfinished, lambda slots: _step(decoder, params, slots, decoding), slots)


def shrink(decoder: Decoder, slots: Slots, kept: int) -> tuple[Slots, Responses, Report]:
    """The `kept` slots of each device that hold all its running responses, and the responses of the other slots."""
    slots, ended = _on_each_device(decoder, functools.partial(_split, kept), slots)
    return slots, ended, _report(slots, jnp.zeros(0, bool), ended)


def _shards(decoder: Decoder) -> int:
    return ways(decoder.compute.mesh, "rows")


def _report(slots: Slots, pending_Q: jax.Array, ended: Responses) -> Report:
    return Report(pending_Q, slots.steps, slots.busy, jnp.sum(ended.asked_B >= 0), jnp.sum(ended.lengths_B))


def _step(decoder: Decoder, params: dict, slots: Slots, decoding: Decoding) -> Slots:
    """Draw a token in every slot, and run it through the model."""
    row, done, running_B = slots.row, slots.responses, slots.running_B
    model, compute, cap = decoder.model, decoder.compute, decoder.max_new_tokens
    logits_BV = unembed(model, params, row.hidden_BD, compute)
    too_short_B1 = (done.lengths_B < decoding.min_new_tokens)[:, None]
    allowed_BV = logits_BV.at[:, decoding.stop_ids].add(jnp.where(too_short_B1, -jnp.inf, 0.0), mode="drop")
    tokens_B = next_tokens(allowed_BV, token_keys(row.keys_B2, done.lengths_B), decoding, decoder.truncate)
    here_BC = running_B[:, None] & (jnp.arange(cap)[None] == done.lengths_B[:, None])
    finished_B = running_B & jnp.isin(tokens_B, decoding.stop_ids)
    done = done._replace(
        tokens_BC=jnp.where(here_BC, tokens_B[:, None], done.tokens_BC),
        logprobs_BC=jnp.where(here_BC, token_logprobs(logits_BV, tokens_B)[:, None], done.logprobs_BC),
        lengths_B=done.lengths_B + running_B,
        finished_B=done.finished_B | finished_B,
    )
    still_B, state_B = running_B & ~finished_B & (done.lengths_B < cap), slots.state_B
    if decoding.stops_SV is not None:
        state_B = decoding.stops_SV[state_B, tokens_B]
        still_B &= state_B < decoding.stops_SV.shape[0] - 1
    positions_B1 = jnp.where(still_B, row.prompts_B + done.lengths_B - 1, EMPTY_POSITION)[:, None]
    columns = _columns(decoder, row, still_B, slots.steps)
    hidden_B1D, cache = forward(model, params, tokens_B[:, None], positions_B1, row.cache, columns, compute=compute)
    row = row._replace(cache=cache, hidden_BD=hidden_B1D[:, 0])
    return Slots(row, done, still_B, state_B, slots.steps + 1, slots.busy + jnp.sum(running_B))


def _columns(decoder: Decoder, row: Row, running_B: jax.Array, steps: jax.Array) -> Columns:
    """The ring's next column is written; columns in front of the longest prompt of a running slot are not read."""
    prompt_columns = row.cache["positions"].shape[1] - decoder.ring
    starts = [0]
    # Halves, as a branch each is compiled; below 32 columns there is nothing to save. By layer nothing is either: what
    # is read from a column on is copied first.
    while not decoder.by_layer and (remaining := (prompt_columns - starts[-1]) // 2) >= 32:
        starts.append(prompt_columns - remaining)
    empty = prompt_columns - jnp.max(jnp.where(running_B, row.prompts_B, 0))
    start = jnp.sum(empty >= jnp.array(starts[1:], jnp.int32)) if len(starts) > 1 else 0
    return Columns(prompt_columns + steps % decoder.ring, tuple(starts), start)


# ---- sizes, each of which is a compiled program


def slot_counts(batch_size: int, smallest: int, shards: int) -> list[int]:
    """How many slots there are programs for, ascending: `batch_size`, and its halves while each of the shards keeps at
    least `smallest`."""
    sizes = [batch_size // shards]
    while sizes[0] % 2 == 0 and sizes[0] // 2 >= smallest:
        sizes.insert(0, sizes[0] // 2)
    return [size * shards for size in sizes]


def queue_places(wanted: int, slots: int, shards: int) -> int:
    """Q: what is wanted, as a multiple of the shards, but no more than there are slots."""
    return min(slots, -(-wanted // shards) * shards)


def prefill_width(length: int, bucket: int) -> int:
    """W of a prompt: `bucket`, or the first of its doubles that is long enough."""
    return bucket << max(0, (-(-length // bucket) - 1).bit_length())


def no_prompts(places: int, width: int) -> Prompts:
    """Nothing new for any place; for the host to fill in."""
    return Prompts(
        np.zeros((places, width), np.int32),
        np.zeros(places, np.int32),
        np.zeros((places, 2), np.uint32),
        np.full(places, -1, np.int32),
    )


# ---- on each device


def _on_each_device(decoder: Decoder, function: Callable, *trees):
    """Call a function of (slots, ...) with each device's own rows; its results lie as its arguments do."""
    mesh = decoder.compute.mesh
    if mesh.size == 1:
        return function(*trees)
    result = specs(jax.eval_shape(function, *trees))
    # Unchecked: that devices which hold the same rows come to the same is not seen.
    by_device = jax.shard_map(function, mesh=mesh, in_specs=specs(trees), out_specs=result, check_vma=False)
    return by_device(*trees)


def _admit(slots: Slots, queue: Queue, ended: Responses) -> tuple[Slots, Queue, Responses]:
    """Give pending prompts to the slots that do not run, and their responses to `ended`."""

    def waiting(carry: tuple) -> jax.Array:
        slots, queue, _ = carry
        return jnp.any(queue.pending_Q) & ~jnp.all(slots.running_B)

    def one(carry: tuple) -> tuple:
        slots, queue, ended = carry
        slot, place = jnp.argmin(slots.running_B), jnp.argmax(queue.pending_Q)
        ended = jax.tree.map(lambda to, of: to.at[place].set(of[slot]), ended, slots.responses)
        new = Responses(queue.asked_Q[place], *(jnp.zeros(x.shape[1:], x.dtype) for x in slots.responses[1:]))
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
        return slots, queue._replace(pending_Q=queue.pending_Q.at[place].set(False)), ended

    return jax.lax.while_loop(waiting, one, (slots, queue, ended))


def _moved(slot: jax.Array, place: jax.Array, path: tuple, to: jax.Array, of: jax.Array) -> jax.Array:
    """A slot's array of a cache with a place's in its first columns, and nothing in the others that anybody sees."""
    name = path[0].key
    if name == "positions":
        return to.at[slot].set(jnp.full(to.shape[1], EMPTY_POSITION).at[: of.shape[1]].set(of[place]))
    rows = rows_axis(name, to)
    taken = jax.lax.dynamic_slice_in_dim(of, place, 1, axis=rows)
    return jax.lax.dynamic_update_slice_in_dim(to, taken, slot, axis=rows)


def _split(kept: int, slots: Slots) -> tuple[Slots, Responses]:
    """The first `kept` slots, the running ones in front, and the responses of the others."""
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
