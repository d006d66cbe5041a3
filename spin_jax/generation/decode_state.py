"""What the decode loop carries from step to step: decode slots, a queue of prefilled prompts, unfinished responses.

A slot is a row of the cache. Its first columns hold a prompt, right-aligned. Its other columns are a ring for the
response; a decode step writes the same column of the ring in all slots.

Shape letters: docs/architecture.md.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from spin_jax.devices import sharding
from spin_jax.models import Execution, ModelConfig, cache_dtype, init_cache


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """What the programs of sampling are compiled for.

    Attributes:
        model: its config.
        max_new_tokens: O, of a response.
        filtered: whether top-p and top-k are applied, which costs some passes over the logits in each step.
        execution: on a mesh of `sharding.decode_mesh`.
    """

    model: ModelConfig
    max_new_tokens: int
    filtered: bool
    execution: Execution

    def prompt_columns(self, width: int) -> int:
        """Columns for prompts of up to `width` tokens; fewer if all layers have a sliding window."""
        return min(width, self.model.furthest or width)

    @property
    def ring(self) -> int:
        """Columns for a response; fewer if all layers have a sliding window."""
        return min(self.max_new_tokens, self.model.furthest or self.max_new_tokens)

    @property
    def by_layer(self) -> bool:
        """Whether params and cache have arrays of their own for each layer."""
        return self.execution.on_one_cpu

    @property
    def shards(self) -> int:
        """Groups of devices that each decode slots of their own."""
        return sharding.num_shards(self.execution.mesh, "rows")

    def cache(self, rows: int, columns: int) -> dict:
        """An empty cache."""
        dtype = cache_dtype(self.execution.dtype, self.execution.platform)
        return init_cache(self.model, rows, columns, dtype, self.execution.mesh, by_layer=self.by_layer)


class Responses(NamedTuple):
    """Sampled responses, one a slot.

    Attributes:
        prompt_index_B: int32, index of the prompt that the slot answers; -1 if empty.
        tokens_BO: int32; a response, then zeros. A stop id, where one was drawn, is its last token.
        logprobs_BO: f32, log p of each token as `sampling.token_logprobs` gives it, then zeros.
        lengths_B: int32, tokens of the response.
        stopped_B: bool, whether its last token is a stop id. A response at the cap, or with a stop string, is not.
    """

    prompt_index_B: jax.Array
    tokens_BO: jax.Array
    logprobs_BO: jax.Array
    lengths_B: jax.Array
    stopped_B: jax.Array


class Prompts(NamedTuple):
    """Prompts for the places of a queue.

    Attributes:
        tokens_EW: int32, left-padded.
        lengths_E: int32; 0: nothing new for this place.
        keys_E2: uint32, from `sampling.response_keys`.
        prompt_index_E: int32, returned with the response.
    """

    tokens_EW: jax.Array
    lengths_E: jax.Array
    keys_E2: jax.Array
    prompt_index_E: jax.Array


class Row(NamedTuple):
    """What a slot and a place of the queue both hold of a prompt, for each of B.

    Attributes:
        cache: from `models.init_cache`: columns for a prompt, and in a slot for the ring.
        hidden_BD: the final hidden state of the last token, from which the next one is drawn.
        keys_B2: uint32.
        prompt_lengths_B: int32, in tokens.
    """

    cache: dict
    hidden_BD: jax.Array
    keys_B2: jax.Array
    prompt_lengths_B: jax.Array


class Queue(NamedTuple):
    """Prefilled prompts. Where pending_E is set, a prompt waits for a slot."""

    row: Row
    prompt_index_E: jax.Array
    pending_E: jax.Array


class Slots(NamedTuple):
    """Responses that are being decoded.

    Attributes:
        row: prompts, with the responses' keys and values in the ring.
        responses: the tokens so far.
        running_B: bool, whether the slot's response goes on.
        state_B: int32, state of the automaton that finds stop strings.
        steps: int32, decode steps so far.
        busy: f32, running slots, summed over these steps.
    """

    row: Row
    responses: Responses
    running_B: jax.Array
    state_B: jax.Array
    steps: jax.Array
    busy: jax.Array


class Report(NamedTuple):
    """What the host reads after a call, on every process. It is small, and never donated.

    Attributes:
        pending_E: bool, places of the queue that are still taken.
        steps, busy: of the slots.
        responses, tokens: int32, number and tokens of the responses that the call returned.
    """

    pending_E: jax.Array
    steps: jax.Array
    busy: jax.Array
    responses: jax.Array
    tokens: jax.Array


def start(spec: DecodeSpec, slots: int, places: int, width: int) -> tuple[Slots, Queue]:
    """Empty slots and an empty queue for prompts of up to `width` tokens."""
    columns = spec.prompt_columns(width)
    queue = Queue(_empty_row(spec, places, columns), jnp.full(places, -1, jnp.int32), jnp.zeros(places, bool))
    row, responses = _empty_row(spec, slots, columns + spec.ring), no_responses(spec, slots)
    running_B, state_B = jnp.zeros(slots, bool), jnp.zeros(slots, jnp.int32)
    return Slots(row, responses, running_B, state_B, steps=jnp.int32(0), busy=jnp.float32(0)), queue


def _empty_row(spec: DecodeSpec, rows: int, columns: int) -> Row:
    hidden_BD = jnp.zeros((rows, spec.model.hidden_size), spec.execution.dtype)
    keys_B2, prompt_lengths_B = jnp.zeros((rows, 2), jnp.uint32), jnp.zeros(rows, jnp.int32)
    return Row(spec.cache(rows, columns), hidden_BD, keys_B2, prompt_lengths_B)


def no_responses(spec: DecodeSpec, rows: int) -> Responses:
    """Rows without a response."""
    shape = (rows, spec.max_new_tokens)
    return Responses(
        prompt_index_B=jnp.full(rows, -1, jnp.int32),
        tokens_BO=jnp.zeros(shape, jnp.int32),
        logprobs_BO=jnp.zeros(shape, jnp.float32),
        lengths_B=jnp.zeros(rows, jnp.int32),
        stopped_B=jnp.zeros(rows, bool),
    )


def row_specs(tree):
    """Return the PartitionSpec of each array in a tree of this module.

    Rows are split, and scalars are not. A cache has an axis of layers in front, and its heads are split, too. A cache
    by layer lies on a single device, where all specs mean the same.
    """

    def of(path: tuple, x: jax.Array) -> PartitionSpec:
        if getattr(path[-1], "key", "positions") != "positions":
            return sharding.spec(*("layers", "rows", "kv_heads", None, None)[: x.ndim])
        return sharding.spec(*("rows",)[: x.ndim])

    return jax.tree_util.tree_map_with_path(of, tree)
