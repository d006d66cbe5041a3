"""The generation stage: prompts and opponent params in, responses on disk out, batch by batch.

A batch is drawn by all processes together. Each writes the responses that its own devices drew, as
`part-BATCH.pPROCESS.jsonl`; the first process joins them when all are there.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from spin_jax import hosts, stopping
from spin_jax.batches import put
from spin_jax.metrics import write_whole
from spin_jax.sampling import Decoding, Responses, row_keys
from spin_jax.sharding import batch_sharding, check_batch


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt to answer: its row number in the data set and its token ids."""

    row: int
    tokens: np.ndarray


@dataclasses.dataclass(frozen=True)
class Response:
    """A sampled response: token ids, a stop id last if it is `finished`; else it was cut at the cap."""

    row: int
    tokens: np.ndarray
    finished: bool


def batches_by_length(prompts: Sequence[Prompt], batch_size: int, bucket: int) -> list[tuple[int, list[Prompt]]]:
    """(width, prompts) of each batch: prompts of like length together, padded to a multiple of `bucket` tokens.

    A prompt's width depends on its own length alone, so that the program that answers it, down to its rounding, does
    not depend on the other prompts. Longest first: if something does not fit, it shows at once.
    """
    by_width: dict[int, list[Prompt]] = {}
    for prompt in prompts:
        by_width.setdefault(-(-len(prompt.tokens) // bucket) * bucket, []).append(prompt)
    return [
        (width, by_width[width][i : i + batch_size])
        for width in sorted(by_width, reverse=True)
        for i in range(0, len(by_width[width]), batch_size)
    ]


def generate(
    sampler: Callable,
    params: dict,
    prompts: Sequence[Prompt],
    settings: ConfigDict,
    *,
    seed: int,
    iteration: int,
    mesh: jax.sharding.Mesh,
    directory: epath.Path | None = None,
    name: str = "generate",
) -> list[Response]:
    """One response to each prompt, in the order of `prompts`; the first process has them, the others get none.

    Each batch is written to `directory` as soon as it is drawn, and batches whose rows are all found there are not
    drawn again, however many processes wrote them; None keeps nothing, and is for one process. The response to a row is
    a function of (params, seed, iteration, row) alone.

    Args:
        sampler: from `programs.make_sampler`.
        params: as `programs.make_resharding` lays them out.
        prompts: what to answer.
        settings: `config.generate`.
        seed: of the run.
        iteration: t; other responses are drawn in every iteration.
        mesh: the decode mesh; its data axis splits each batch.
        directory: for `part-*.jsonl`, or None.
        name: for the progress bar.

    Raises:
        UserError: config.generate.batch_size does not split over the devices.
        Stopped: one of several processes was asked to.
    """
    check_batch(mesh, "config.generate.batch_size", settings.batch_size)
    decoding = Decoding(jnp.float32(settings.temperature), jnp.float32(settings.top_p), jnp.int32(settings.top_k))
    sharding = batch_sharding(mesh)
    responses = _read_parts(directory) if directory and hosts.is_first() else {}  # by row
    answered = hosts.on_first(lambda: set(responses))
    written: list[str] = []
    drawn_here = tokens_here = 0
    with tqdm(total=len(prompts), desc=name, unit="prompt", disable=not hosts.is_first()) as bar:
        for number, (width, batch) in enumerate(
            batches_by_length(prompts, settings.batch_size, settings.prompt_bucket)
        ):
            if not answered.issuperset(prompt.row for prompt in batch):
                stopping.between_batches()
                tokens_BP, lengths_B, rows_B = put(_pad(batch, settings.batch_size, width), sharding)
                drawn = sampler(params, tokens_BP, lengths_B, _row_keys(seed, iteration, rows_B), decoding)
                own = _own_responses(jax.device_put(drawn, sharding), batch)
                responses.update((answer.row, answer) for answer in own)
                drawn_here, tokens_here = drawn_here + len(own), tokens_here + sum(len(a.tokens) for a in own)
                if directory:
                    written.append(f"part-{number:05d}.p{jax.process_index():03d}.jsonl")
                    write_whole(directory / written[-1], "".join(_to_json(answer) + "\n" for answer in own))
            bar.update(len(batch))
            bar.set_postfix(tokens=f"{tokens_here / max(drawn_here, 1):.0f} a response")
    others = [name for names in hosts.gather(written)[1:] for name in names]  # by now, all of them are there
    if not hosts.is_first():
        return []
    responses |= _read_parts(directory, others) if others else {}
    return [responses[prompt.row] for prompt in prompts]


# Jitted, because the rows are spread over the devices of all processes.
_row_keys = jax.jit(row_keys, static_argnums=0)


def _own_responses(drawn: Responses, batch: list[Prompt]) -> list[Response]:
    """The responses that this process answers for: of devices that hold the same rows, one of all processes' does."""
    own = []
    for shards in zip(*(array.addressable_shards for array in drawn), strict=True):
        if shards[0].replica_id == 0:
            prompts = batch[shards[0].index[0]]  # fewer than rows where the batch is filled up
            for prompt, tokens_R, length, finished in zip(prompts, *(np.asarray(s.data) for s in shards), strict=False):
                own.append(Response(prompt.row, tokens_R[:length], bool(finished)))
    return own


def _read_parts(directory: epath.Path, names: Sequence[str] | None = None) -> dict[int, Response]:
    """The responses in `names`, or in all parts there are, by row."""
    parts = sorted(directory.glob("part-*.jsonl")) if names is None else [directory / name for name in names]
    answers = (_from_json(line) for part in parts for line in part.read_text().splitlines())
    return {answer.row: answer for answer in answers}


def _pad(batch: list[Prompt], batch_size: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right-padded tokens [batch_size, width], lengths and row numbers; rows beyond the batch have length 0, the
    sampler's filler."""
    tokens_BP = np.zeros((batch_size, width), np.int32)
    lengths_B, rows_B = np.zeros(batch_size, np.int32), np.zeros(batch_size, np.int32)
    for i, prompt in enumerate(batch):
        tokens_BP[i, : len(prompt.tokens)] = prompt.tokens
        lengths_B[i], rows_B[i] = len(prompt.tokens), prompt.row
    return tokens_BP, lengths_B, rows_B


def _to_json(response: Response) -> str:
    return json.dumps({"row": response.row, "tokens": response.tokens.tolist(), "finished": response.finished})


def _from_json(line: str) -> Response:
    fields = json.loads(line)
    return Response(fields["row"], np.array(fields["tokens"], np.int32), fields["finished"])
