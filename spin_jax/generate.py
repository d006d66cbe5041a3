"""The generation stage: prompts and opponent params in, responses on disk out, batch by batch."""

import dataclasses
import json
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from spin_jax.metrics import write_whole
from spin_jax.sampling import Decoding, row_keys
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
    """One response to each prompt, in the order of `prompts`.

    Each batch is written to `directory` as soon as it is whole, and batches found there are not drawn again; None keeps
    nothing. The response to a row is a function of (params, seed, iteration, row) alone.

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
    """
    check_batch(mesh, "config.generate.batch_size", settings.batch_size)
    decoding = Decoding(jnp.float32(settings.temperature), jnp.float32(settings.top_p), jnp.int32(settings.top_k))
    sharding = batch_sharding(mesh)
    responses: dict[int, Response] = {}
    sampled = 0  # tokens
    with tqdm(total=len(prompts), desc=name, unit="prompt") as bar:
        for number, (width, batch) in enumerate(
            batches_by_length(prompts, settings.batch_size, settings.prompt_bucket)
        ):
            part = directory / f"part-{number:05d}.jsonl" if directory else None
            if part and part.exists():
                answers = [_from_json(line) for line in part.read_text().splitlines()]
            else:
                tokens_BP, lengths_B, rows_B = _pad(batch, settings.batch_size, width)
                arrays = jax.device_put((tokens_BP, lengths_B, row_keys(seed, iteration, rows_B)), sharding)
                drawn = jax.device_get(sampler(params, *arrays, decoding))
                answers = [
                    Response(prompt.row, drawn.tokens_BR[i, : drawn.lengths_B[i]], bool(drawn.finished_B[i]))
                    for i, prompt in enumerate(batch)
                ]
                if part:
                    write_whole(part, "".join(_to_json(answer) + "\n" for answer in answers))
            responses.update((answer.row, answer) for answer in answers)
            bar.update(len(batch))
            sampled += sum(len(answer.tokens) for answer in answers)
            bar.set_postfix(tokens=f"{sampled / len(responses):.0f} a response")
    return [responses[prompt.row] for prompt in prompts]


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
