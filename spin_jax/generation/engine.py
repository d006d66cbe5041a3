"""Sample responses to prompts on the decode mesh.

`Engine` is the host's side of `decode_loop`. It feeds the queue, reads the responses that have ended, and writes them
to a directory if it is given one. All processes put the same prompts into the same places, and each reads the responses
of its own devices.
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
_FEW_ENDED = 0.1  # warn if a smaller share of the responses has an end


class Prompt(NamedTuple):
    """A response to draw: the prompt's index, which of its responses it is, and the prompt's token ids."""

    row: int
    number: int
    tokens: np.ndarray


@dataclasses.dataclass
class Progress:
    """Progress of a call of `Engine.generate`, over all processes.

    Attributes:
        name: what to call it in the log.
        responses: how many are finished, with those of earlier calls.
        tokens: how many this call has drawn.
        steps: decode steps so far.
        busy, capacity: running slots, and all slots, each summed over the steps.
        before_tail: `occupancy` at the moment when the last prompt got its slot.
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
        """Mean share of running slots in a step."""
        return self.busy / max(self.capacity, 1)

    def add(self, report: Report, slots: int) -> None:
        """Add the report of a program that ran with so many slots."""
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
        settings: `config.generate`, with all sizes chosen.
        execution: on a mesh of `sharding.decode_mesh`, whose data and fsdp axes split the slots.
        stop_ids: the first of these ends a response.
        stops_AV: the table of `stop_strings.stop_table` for `settings.stop_strings`; None without stop strings.

    Raises:
        UserError: a size is not chosen or does not split over the devices, or stop strings have no table.
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
        """Make an engine whose responses end in the chat format's stop ids, or with one of `settings.stop_strings`."""
        codec = chat.codec
        stops_AV = stop_table(codec.tokenizer, settings.stop_strings, model.vocab_size, codec.silent)
        return cls(model, settings, execution, chat.stop_ids, stops_AV)

    @functools.cached_property
    def programs(self) -> DecodePrograms:
        """The jitted programs, shared by all engines with the same `DecodeSpec`."""
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
        """Sample `settings.responses` responses to each prompt. Return them on every process, in the prompts' order.

        A response depends on (params, seed, iteration, its prompt's index, its number). It does not depend on the other
        prompts, the mesh or the batch size, except through the order in which sums are rounded.

        Args:
            params: of the model: numpy or jax arrays of any dtype, on any devices. `lay_out` is applied to them, and
                does nothing to params that it has returned.
            prompts: token ids by the prompt's index; a sequence counts from 0.
            seed, iteration: with the prompt's index and number, they seed the draws.
            directory: write responses there as they end, and do not draw again those that are there already, however
                many processes wrote them. None keeps responses in memory alone.
            progress: updated during the call, for a caller that wants to look.

        Raises:
            UserError: a prompt is empty, or has an id beyond the vocabulary.
            Stopped: one of several processes was asked to stop. The same call with the same directory goes on.
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
        """Return params as the programs read them: in the compute dtype, on the decode mesh. Do not copy such ones."""

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
        """Return {program: its arguments as jax.ShapeDtypeStruct}, for compiling ahead of time: with all slots, and
        prompts of up to `longest` tokens."""
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
        """Places of the queue: `prefill_batch_size`, rounded up to a multiple of the shards, but no more than slots."""
        shards = self.programs.spec.shards
        return min(slots, -(-self.settings.prefill_batch_size // shards) * shards)

    def _draw(
        self, params: dict, wanted: Sequence[Prompt], seed: int, iteration: int, progress: Progress
    ) -> Iterator[list[Response]]:
        """Yield this process's responses to `wanted`, as they end.

        Take the longest prompts first. Then a lack of memory shows at once, and prompts that are prefilled or decoded
        together have similar lengths.
        """
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
            if ended:  # read them while the devices compute
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
    """Warn if hardly any response has an end."""
    ended = sum(not one.truncated or len(one.tokens) < max_new_tokens for one in responses)  # or at a stop string
    if ended < _FEW_ENDED * len(responses):
        _LOG.warning(
            "%d of %d responses ended: --config.generate.max_new_tokens=%d is too low for this model, it does not "
            "write the stop id that human responses end in, or it was never trained to end",
            *(ended, len(responses), max_new_tokens),
        )


# ---- sizes, each of which is a compiled program


def slot_counts(prompts: int, batch_size: int, smallest: int, shards: int) -> list[int]:
    """Return how many slots a call begins with, and then how many it goes on with as its prompts run out.

    Begin with `batch_size`, halved as long as all the prompts still fit. Then halve further, as long as each shard
    keeps at least `smallest` slots.
    """
    size = batch_size // shards
    while size % 2 == 0 and size // 2 * shards >= prompts:
        size //= 2
    sizes = [size]
    while sizes[-1] % 2 == 0 and sizes[-1] // 2 >= smallest:
        sizes.append(sizes[-1] // 2)
    return [size * shards for size in sizes]


def prefill_width(length: int, bucket: int) -> int:
    """Return the width to which a prompt is padded: `bucket`, doubled until the prompt fits."""
    return bucket << max(0, (-(-length // bucket) - 1).bit_length())


# ---- host arrays


def no_prompts(places: int, width: int) -> Prompts:
    """Return `Prompts` without any prompt, for the host to fill in."""
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
    """Read the ended responses of this process's devices. Rows that several devices hold are read from one of them."""
    own = []
    for shards in zip(*(array.addressable_shards for array in ended), strict=True):
        if shards[0].replica_id == 0:
            rows = (np.asarray(shard.data) for shard in shards)
            for index, tokens_O, logprobs_O, length, stopped in zip(*rows, strict=True):
                if index >= 0:
                    row, number, _ = wanted[index]
                    own.append(Response(row, number, tokens_O[:length], not stopped, logprobs_O[:length]))
    return own
