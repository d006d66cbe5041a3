"""The generation stage: prompts and opponent params in, responses on disk out, as they end.

The host's part of `decode_loop`. All processes give the same prompts to the same places; each writes the responses
that its own devices made, as `part-NUMBER.pPROCESS.jsonl`, and the first process joins them when all are there.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from etils import epath

from spin_jax.config import GenerateConfig
from spin_jax.devices.sharding import batch_sharding, check_batch, ways
from spin_jax.devices.transfer import put
from spin_jax.errors import UserError
from spin_jax.generation.decode_loop import (
    Prompts,
    Report,
    Responses,
    Sampler,
    no_prompts,
    prefill_width,
    queue_places,
    slot_counts,
)
from spin_jax.generation.response_files import Parts, Prompt, Response, read_parts
from spin_jax.generation.sampling import MAX_RESPONSES, MAX_ROWS, Decoding, response_keys
from spin_jax.runtime import multihost, preemption
from spin_jax.runtime.progress import Loop

_LOG = logging.getLogger(__name__)
_FEW_ENDED = 0.1  # of the responses


@dataclasses.dataclass
class Progress:
    """How far a call of `generate` is, all processes together.

    Attributes:
        responses: that are there, with those that an earlier call left.
        tokens: of those that this call drew.
        steps: decode steps.
        busy, capacity: slots that were running in them, and slots that there were, each summed up over the steps.
        before_tail: `occupancy` when the last prompt had got its slot.
    """

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
        """Take in what a program with so many slots reports."""
        steps = int(report.steps)
        self.capacity += (steps - self.steps) * slots
        self.steps, self.busy = steps, float(report.busy)
        self.responses += int(report.responses)
        self.tokens += int(report.tokens)


def generate(
    sampler: Sampler,
    params: dict,
    prompts: Sequence[Prompt],
    settings: GenerateConfig,
    *,
    seed: int,
    iteration: int,
    mesh: jax.sharding.Mesh,
    directory: epath.Path | None = None,
    name: str = "generate",
    progress: Progress | None = None,
) -> list[Response]:
    """The response to each prompt, in the order of `prompts`; the first process has them, the others get none.

    Responses are written to `directory` as they end, and those that are found there are not drawn again, however many
    processes wrote them; None keeps nothing, and is for one process. A response is a function of (params, seed,
    iteration, row, number) alone, but for the order in which sums are rounded.

    Args:
        sampler: from `programs.make_sampler`.
        params: of the model, in any dtype and layout.
        prompts: what to answer.
        settings: `config.generate`.
        seed: of the run.
        iteration: t; other responses are drawn in every iteration.
        mesh: the decode mesh; its data axis splits slots and queue.
        directory: for `part-*.jsonl`, or None.
        name: of the loop, where its progress is shown.
        progress: kept up to date, for who wants to look.

    Raises:
        UserError: config.generate.batch_size does not split over the devices; or there are too many rows to number.
        Stopped: one of several processes was asked to.
    """
    check_batch(mesh, "--config.generate.batch_size", settings.batch_size)
    if any(prompt.row >= MAX_ROWS or prompt.number >= MAX_RESPONSES for prompt in prompts):
        raise UserError(f"there are at most {MAX_ROWS:,} rows and {MAX_RESPONSES} responses to each to draw")
    responses = read_parts(directory) if directory and multihost.is_first() else {}
    answered, parts = multihost.on_first(lambda: set(responses)), Parts(directory)
    progress = progress or Progress()
    asked = [prompt for prompt in prompts if (prompt.row, prompt.number) not in answered]
    progress.responses = len(prompts) - len(asked)
    with Loop(name, len(prompts), "response", progress.responses) as loop:
        for ended in _draw(sampler, params, asked, settings, seed, iteration, mesh, progress):
            responses.update(((answer.row, answer.number), answer) for answer in ended)
            parts.write(ended)
            rate = f"{progress.tokens / max(loop.elapsed, 1e-3):.3g}"
            loop.advance(progress.responses - loop.done, tokens_per_second=rate, slots_busy=f"{progress.occupancy:.0%}")
    if asked:
        _LOG.info(
            "%s: %d tokens in %d steps, slots %.1f%% busy, %.1f%% until prompts ran out",
            *(name, progress.tokens, progress.steps, 100 * progress.occupancy, 100 * progress.before_tail),
        )
    others = [name for names in multihost.gather(parts.written)[1:] for name in names]  # by now, all of them are there
    if not multihost.is_first():
        return []
    responses |= read_parts(directory, others) if others else {}
    return [responses[prompt.row, prompt.number] for prompt in prompts]


def warn_if_endless(responses: Sequence[Response], settings: GenerateConfig) -> None:
    """Say so if hardly a response ended, as human ones do; `settings` are `config.generate`."""
    cap = settings.max_new_tokens
    ended = sum(response.finished or len(response.tokens) < cap for response in responses)  # or at a stop string
    if ended < _FEW_ENDED * len(responses):
        _LOG.warning(
            "%d of %d responses ended: --config.generate.max_new_tokens=%d is too low for this model, it does not "
            "write the stop id that human responses end in, or it was never trained to end",
            *(ended, len(responses), cap),
        )


def _draw(
    sampler: Sampler,
    params: dict,
    asked: Sequence[Prompt],
    settings: GenerateConfig,
    seed: int,
    iteration: int,
    mesh: jax.sharding.Mesh,
    progress: Progress,
) -> Iterator[list[Response]]:
    """The responses to `asked` that this process answers for, as they end; longest prompts first: if something does not
    fit, it shows at once, and prompts that are prefilled or decoded together are of like length."""
    if not asked:
        return
    params = sampler.laid_out(params)
    asked = sorted(asked, key=lambda prompt: -len(prompt.tokens))
    widths = [prefill_width(len(prompt.tokens), settings.prompt_bucket) for prompt in asked]
    decoding, shards, sharding = (
        Decoding.of(settings, sampler.stop_ids, sampler.stops_SV),
        ways(mesh, "rows"),
        batch_sharding(mesh),
    )
    sizes = slot_counts(settings.batch_size, settings.tail_batch_size, shards)
    size = min(size for size in sizes if size >= min(len(asked), settings.batch_size))
    places = queue_places(settings.prefill_batch_size, size, shards)
    slots, queue = sampler.start(size, places, widths[0])
    keys = response_keys(seed, iteration, *np.array([(prompt.row, prompt.number) for prompt in asked], np.int32).T)
    given, free, ended = 0, np.arange(places), None
    while given < len(asked) or len(free) < places:
        try:
            preemption.between_batches()
        except preemption.Stopped:
            if ended:
                yield _own_responses(ended, asked)
            raise
        taken = np.arange(given, min(given + len(free), len(asked)))
        given += len(taken)
        if len(taken):
            prompts = _prompts(asked, keys, taken, free[: len(taken)], places, widths[taken[0]])
            queue = sampler.prefill(params, queue, Prompts(*put(prompts, sharding)))
        slots, queue, now_ended, report = sampler.decode(params, slots, queue, decoding, given < len(asked))
        if ended:  # while the devices are at work
            yield _own_responses(ended, asked)
        ended, free = now_ended, np.flatnonzero(~np.asarray(report.pending_Q))
        progress.add(report, size)
    progress.before_tail = progress.occupancy
    yield _own_responses(ended, asked)
    for smaller in (*reversed(sizes[: sizes.index(size)]), 0):
        preemption.between_batches()
        slots, ended, report = sampler.shrink(
            sampler.drain(params, slots, decoding, smaller // shards), smaller // shards
        )
        progress.add(report, size)
        size = smaller
        yield _own_responses(ended, asked)


def _prompts(
    asked: Sequence[Prompt], keys: np.ndarray, taken: np.ndarray, free: np.ndarray, places: int, width: int
) -> Prompts:
    """The prompts `taken` of `asked` for the `free` ones of a queue's places, left-padded to `width`."""
    prompts = no_prompts(places, width)
    for place, number in zip(free, taken, strict=True):
        tokens = asked[number].tokens
        prompts.tokens_QW[place, width - len(tokens) :] = tokens
        prompts.lengths_Q[place] = len(tokens)
    prompts.keys_Q2[free], prompts.asked_Q[free] = keys[taken], taken
    return prompts


def _own_responses(ended: Responses, asked: Sequence[Prompt]) -> list[Response]:
    """The responses that this process answers for: of devices that hold the same rows, one of all processes' does."""
    own = []
    for shards in zip(*(array.addressable_shards for array in ended), strict=True):
        if shards[0].replica_id == 0:
            for asked_number, tokens_C, *rest in zip(*(np.asarray(shard.data) for shard in shards), strict=True):
                if asked_number >= 0:
                    prompt, (logprobs_C, length, finished) = asked[asked_number], rest
                    drawn = tokens_C[:length], bool(finished), logprobs_C[:length]
                    own.append(Response(prompt.row, prompt.number, *drawn))
    return own
