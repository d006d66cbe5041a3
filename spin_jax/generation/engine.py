"""Sampling on the decode mesh: prompts and params in, responses out.

`Engine` is the host's part of `decode_loop`: it feeds the queue, reads what has ended, and keeps it on disk where it is
given a directory. All processes give the same prompts to the same places, and each reads the responses of its devices.
"""

import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding

from spin_jax.config import GenerateConfig
from spin_jax.data.chat_format import ChatFormat
from spin_jax.data.pairs import TokenIds, token_ids
from spin_jax.devices.sharding import batch_sharding, check_batch, located
from spin_jax.devices.transfer import place, to_devices
from spin_jax.errors import UserError
from spin_jax.generation.decode_state import DecodeSpec, Prompts, Report, Responses, row_specs
from spin_jax.generation.programs import DecodePrograms, decode_programs
from spin_jax.generation.response_files import Parts, Response, read_parts
from spin_jax.generation.sampling import MAX_RESPONSES, MAX_ROWS, SamplingParams, response_keys
from spin_jax.generation.stop_strings import stop_table
from spin_jax.models import Execution, ModelConfig, param_shardings
from spin_jax.runtime import multihost, preemption
from spin_jax.runtime.progress import Loop

_LOG = logging.getLogger(__name__)
_FEW_ENDED = 0.1  # of the responses


class Prompt(NamedTuple):
    """A response to draw: the prompt's index, which of its responses it is, and the prompt's token ids."""

    row: int
    number: int
    tokens: np.ndarray


@dataclasses.dataclass
class Progress:
    """How far a call of `Engine.generate` is, all processes together.

    Attributes:
        name: shown beside it.
        responses: that are there, with those that an earlier call left.
        tokens: of those that this call drew.
        steps: decode steps.
        busy, capacity: running slots, and all slots, each summed over the steps.
        before_tail: `occupancy` when the last prompt had got its slot.
    """

    name: str = "generate"
    responses: int = 0
    tokens: int = 0
    steps: int = 0
    busy: float = 0.0
    capacity: int = 0
    before_tail: float = 0.0

    @property
    def occupancy(self) -> float:
        """Share of the slots that were running in a step, on average."""
        return self.busy / max(self.capacity, 1)

    def add(self, report: Report, slots: int) -> None:
        """Count what a call of a program with so many slots reports."""
        steps = int(report.steps)
        self.capacity += (steps - self.steps) * slots
        self.steps, self.busy = steps, float(report.busy)
        self.responses += int(report.responses)
        self.tokens += int(report.tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
    """Samples responses of a model. Params are an argument: one engine serves all iterations.

    Attributes:
        model: its config.
        settings: `config.generate`, with no size left open.
        execution: on the mesh that it samples on, see `sharding.decode_mesh`; its data and fsdp axes split slots.
        stop_ids: a response ends with the first of these.
        stops_AV: finds `settings.stop_strings`, from `stop_strings.stop_table`.

    Raises:
        UserError: a size is left open or does not split over the devices, or nothing finds the stop strings.
    """

    model: ModelConfig
    settings: GenerateConfig
    execution: Execution
    stop_ids: tuple[int, ...] = ()
    stops_AV: np.ndarray | None = None

    def __post_init__(self):
        chosen = self.settings
        if not chosen.batch_size or not chosen.prefill_batch_size:
            raise UserError("batch_size and prefill_batch_size must be at least 1: `sizing.choose` finds what fits")
        if chosen.stop_strings and self.stops_AV is None:
            raise UserError("stop_strings need a table of the tokenizer's: make the engine with Engine.for_chat")
        check_batch(self.execution.mesh, "--config.generate.batch_size", chosen.batch_size)

    @classmethod
    def for_chat(cls, model: ModelConfig, settings: GenerateConfig, execution: Execution, chat: ChatFormat) -> "Engine":
        """One whose responses end as the chat format's do, or with one of `settings.stop_strings`."""
        codec = chat.codec
        stops_AV = stop_table(codec.tokenizer, settings.stop_strings, model.vocab_size, codec.silent)
        return cls(model, settings, execution, chat.stop_ids, stops_AV)

    @functools.cached_property
    def programs(self) -> DecodePrograms:
        """The jitted programs, the same for all engines of one `DecodeSpec`."""
        filtered = self.settings.top_p < 1 or self.settings.top_k > 0
        return decode_programs(DecodeSpec(self.model, self.settings.max_new_tokens, filtered, self.execution))

    def generate(
        self,
        params: dict,
        prompts: Sequence[TokenIds] | Mapping[int, TokenIds],
        *,
        seed: int = 0,
        iteration: int = 0,
        directory: epath.Path | None = None,
        progress: Progress | None = None,
    ) -> list[Response]:
        """`settings.responses` responses to each prompt, in the order of the prompts, on every process.

        A response is a function of (params, seed, iteration, the prompt's index, its number) alone, but for the order
        in which sums are rounded: not of the other prompts, the mesh or the batch size.

        Args:
            params: of the model: numpy or jax arrays of any dtype, wherever they lie. They are laid out for sampling
                once, unless they come from `lay_out`.
            prompts: token ids of each, by its index; a sequence counts from 0.
            seed, iteration: other ones give other responses.
            directory: responses are written there as they end, and those that are there already are not drawn again,
                however many processes wrote them. None: they are kept in memory alone.
            progress: kept up to date, for a caller that wants to look.

        Raises:
            UserError: a prompt has no tokens, or tokens that the model has not.
            Stopped: one of several processes was asked to; the same call with its directory goes on.
        """
        progress, wanted = progress or Progress(), self._numbered(prompts)
        done = list(read_parts(directory).values()) if multihost.is_first() else []
        known = multihost.on_process_zero(lambda: {(one.row, one.number) for one in done})
        missing = [prompt for prompt in wanted if prompt[:2] not in known]
        progress.responses, parts = len(wanted) - len(missing), Parts(directory)
        with Loop(progress.name, len(wanted), "response", progress.responses) as loop:
            for ended in self._draw(params, missing, seed, iteration, progress):
                done += ended
                parts.write(ended)
                rate, busy = progress.tokens / max(loop.elapsed, 1e-3), f"{progress.occupancy:.0%}"
                loop.advance(progress.responses - loop.done, tokens_per_second=f"{rate:.3g}", slots_busy=busy)
        if missing:
            _LOG.info(
                "%s: %d tokens in %d steps, slots %.1f%% busy, %.1f%% until prompts ran out",
                *(progress.name, progress.tokens, progress.steps),
                *(100 * progress.occupancy, 100 * progress.before_tail),
            )
        found = {(one.row, one.number): one for one in multihost.gather_lists(done)}
        return [found[prompt[:2]] for prompt in wanted]

    def lay_out(self, params: dict) -> dict:
        """Params as the programs read them: in the compute dtype, on the decode mesh. The same ones, where they are."""

        def lies(x: jax.Array, wanted: jax.ShapeDtypeStruct) -> bool:
            at = getattr(x, "sharding", None)  # numpy arrays have none
            return at is not None and x.dtype == wanted.dtype and at.is_equivalent_to(wanted.sharding, x.ndim)

        programs, mesh = self.programs, self.execution.mesh
        if jax.tree.structure(params) == jax.tree.structure(programs.params):
            if all(jax.tree.leaves(jax.tree.map(lies, params, programs.params))):
                return params
        devices = set(mesh.devices.flat)
        if not all(isinstance(x, jax.Array) and x.sharding.device_set == devices for x in jax.tree.leaves(params)):
            params = place(params, param_shardings(mesh, self.model))
        return programs.lay_out(params)

    def abstract_calls(self, longest: int) -> dict[str, tuple]:
        """Program -> its arguments as jax.ShapeDtypeStruct, with all slots in use and prompts of up to `longest`
        tokens: for compiling ahead of time."""
        programs, mesh, size = self.programs, self.execution.mesh, self.settings.batch_size
        places, width = self._places(size), prefill_width(longest, self.settings.prompt_bucket)
        rows = programs.start.eval_shape(size, places, width)
        slots, queue = located(rows, jax.tree.map(functools.partial(NamedSharding, mesh), row_specs(rows)))
        prompts = located(no_prompts(places, width), batch_sharding(mesh))
        sampling, more = jax.eval_shape(lambda: self._sampling), jax.ShapeDtypeStruct((), jnp.bool_)
        return {
            "prefill": (programs.params, queue, prompts),
            "decode": (programs.params, slots, queue, sampling, more),
            "drain": (programs.params, slots, sampling, jax.ShapeDtypeStruct((), jnp.int32)),
        }

    @functools.cached_property
    def _sampling(self) -> SamplingParams:
        return SamplingParams.of(self.settings, self.stop_ids, self.stops_AV)

    def _numbered(self, prompts: Sequence[TokenIds] | Mapping[int, TokenIds]) -> list[Prompt]:
        rows = prompts if isinstance(prompts, Mapping) else dict(enumerate(prompts))
        numbers = range(self.settings.responses)
        if any(row >= MAX_ROWS for row in rows) or len(numbers) > MAX_RESPONSES:
            raise UserError(f"there are at most {MAX_ROWS:,} rows and {MAX_RESPONSES} responses to each to draw")
        checked = {row: token_ids(ids, self.model.vocab_size, f"prompt {row}") for row, ids in rows.items()}
        return [Prompt(row, number, ids) for row, ids in checked.items() for number in numbers]

    def _places(self, slots: int) -> int:
        """Places of the queue: what is wanted, as a multiple of the shards, but no more than there are slots."""
        shards = self.programs.spec.shards
        return min(slots, -(-self.settings.prefill_batch_size // shards) * shards)

    def _draw(
        self, params: dict, wanted: Sequence[Prompt], seed: int, iteration: int, progress: Progress
    ) -> Iterator[list[Response]]:
        """This process's responses to `wanted`, as they end; longest prompts first: if something does not fit, it shows
        at once, and prompts that are prefilled or decoded together are of like length."""
        if not wanted:
            return
        wanted = sorted(wanted, key=lambda prompt: -len(prompt.tokens))
        keys = response_keys(seed, iteration, *np.array([prompt[:2] for prompt in wanted], np.int32).T)
        params, programs, shards = self.lay_out(params), self.programs, self.programs.spec.shards
        size, *fewer = slot_counts(len(wanted), self.settings.batch_size, self.settings.tail_batch_size, shards)
        places, widths = self._places(size), [prefill_width(len(p.tokens), self.settings.prompt_bucket) for p in wanted]
        slots, queue = programs.start(size, places, widths[0])
        given, free, ended = 0, np.arange(places), None
        while given < len(wanted) or len(free) < places:
            try:
                preemption.between_batches()
            except preemption.Stopped:
                if ended:
                    yield _own_responses(ended, wanted)
                raise
            taken = np.arange(given, min(given + len(free), len(wanted)))
            given += len(taken)
            if len(taken):
                prompts = no_prompts(places, widths[taken[0]])
                _write(prompts, free[: len(taken)], taken, wanted, keys)
                queue = programs.prefill(
                    params, queue, Prompts(*to_devices(prompts, batch_sharding(self.execution.mesh)))
                )
            slots, queue, now_ended, report = programs.decode(params, slots, queue, self._sampling, given < len(wanted))
            if ended:  # while the devices are at work
                yield _own_responses(ended, wanted)
            ended, free = now_ended, np.flatnonzero(~np.asarray(report.pending_E))
            progress.add(report, size)
        progress.before_tail = progress.occupancy
        if ended:
            yield _own_responses(ended, wanted)
        for smaller in (*fewer, 0):
            preemption.between_batches()
            slots = programs.drain(params, slots, self._sampling, smaller // shards)
            slots, ended, report = programs.shrink(slots, smaller // shards)
            progress.add(report, size)
            size = smaller
            yield _own_responses(ended, wanted)


def warn_if_endless(responses: Sequence[Response], max_new_tokens: int) -> None:
    """Warn if hardly any response ended."""
    ended = sum(not one.truncated or len(one.tokens) < max_new_tokens for one in responses)  # or at a stop string
    if ended < _FEW_ENDED * len(responses):
        _LOG.warning(
            "%d of %d responses ended: --config.generate.max_new_tokens=%d is too low for this model, it does not "
            "write the stop id that human responses end in, or it was never trained to end",
            *(ended, len(responses), max_new_tokens),
        )


# ---- sizes, each of which is a compiled program


def slot_counts(prompts: int, batch_size: int, smallest: int, shards: int) -> list[int]:
    """How many slots a call begins with, and how many it goes on with as its prompts run out: `batch_size`, or as many
    of its halves as the prompts fill, and then halves while each of the shards keeps at least `smallest`."""
    size = batch_size // shards
    while size % 2 == 0 and size // 2 * shards >= prompts:
        size //= 2
    sizes = [size]
    while sizes[-1] % 2 == 0 and sizes[-1] // 2 >= smallest:
        sizes.append(sizes[-1] // 2)
    return [size * shards for size in sizes]


def prefill_width(length: int, bucket: int) -> int:
    """W of a prompt: `bucket`, or the first of its doubles that is long enough."""
    return bucket << max(0, (-(-length // bucket) - 1).bit_length())


# ---- host arrays


def no_prompts(places: int, width: int) -> Prompts:
    """Nothing new for any place; for the host to fill in."""
    tokens, lengths = np.zeros((places, width), np.int32), np.zeros(places, np.int32)
    arrays: list[Any] = [tokens, lengths, np.zeros((places, 2), np.uint32), np.full(places, -1, np.int32)]
    return Prompts(*arrays)


def _write(prompts: Prompts, free: np.ndarray, taken: np.ndarray, wanted: Sequence[Prompt], keys: np.ndarray) -> None:
    """Write the prompts `taken` of `wanted` to the `free` places of a queue, left-padded."""
    for q, index in zip(free, taken, strict=True):
        tokens = wanted[index].tokens
        prompts.tokens_EW[q, -len(tokens) :] = tokens
        prompts.lengths_E[q] = len(tokens)
    prompts.keys_E2[free], prompts.prompt_index_E[free] = keys[taken], taken


def _own_responses(ended: Responses, wanted: Sequence[Prompt]) -> list[Response]:
    """The responses that this process reads: where several devices hold the same rows, one process of all does."""
    own = []
    for shards in zip(*(array.addressable_shards for array in ended), strict=True):
        if shards[0].replica_id == 0:
            rows = (np.asarray(shard.data) for shard in shards)
            for index, tokens_O, logprobs_O, length, stopped in zip(*rows, strict=True):
                if index >= 0:
                    row, number, _ = wanted[index]
                    own.append(Response(row, number, tokens_O[:length], not stopped, logprobs_O[:length]))
    return own
