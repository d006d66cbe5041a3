"""Keep sampled responses on disk: part files, written as responses end, and a note of the settings that decide them."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from etils import epath

from spin_jax.errors import UserError
from spin_jax.runtime import multihost
from spin_jax.runtime.files import find, reading, write_whole

SETTINGS = "settings.json"  # beside the parts: the settings that decide their responses

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Response:
    """A sampled response.

    Attributes:
        row: the prompt's index.
        number: which of the prompt's responses it is, from 0.
        tokens: int32 ids. The last is a stop id, unless the response is `truncated`.
        truncated: whether it ended at the cap or with a stop string, instead of a stop id.
        logprobs: f32, log p of each token under the model itself, at temperature 1 and without filters.
    """

    row: int
    number: int
    tokens: np.ndarray
    truncated: bool
    logprobs: np.ndarray


# ---- parts on disk


def note_settings(directory: epath.Path, settings: Mapping[str, object]) -> None:
    """Note the settings that decide the responses of a directory, before its parts are written.

    Args:
        settings: by the names that a refusal calls them.

    Raises:
        UserError: there are parts of other settings, or nothing can be written.
    """
    noted, before = directory / SETTINGS, {}
    if noted.exists():
        with reading(noted, f"delete {directory}, whose responses could be of other settings"):
            before = dict(json.loads(noted.read_text()))
    changed = [name for name in settings if settings[name] != before.get(name)]
    if before and changed and _part_files(directory):
        raise UserError(
            f"{directory} holds responses of another {', '.join(changed)}: delete it, or go on as {SETTINGS} in it says"
        )
    write_whole(noted, json.dumps(settings, indent=1) + "\n")


def forget_parts(directory: epath.Path) -> None:
    """Delete the parts and their settings. Call it when all responses are in another file."""
    for file in (*_part_files(directory), directory / SETTINGS):
        file.unlink(missing_ok=True)


class Parts:
    """Writes this process's part files, numbered after those that are there. Without a directory it writes nothing."""

    def __init__(self, directory: epath.Path | None):
        self._directory = directory
        self._next = multihost.on_process_zero(lambda: 1 + max(map(_part_number, _part_files(directory)), default=-1))

    def write(self, responses: Sequence[Response]) -> None:
        """Write a part with these responses, whole or not at all."""
        if self._directory and responses:
            name = f"part-{self._next:05d}.p{jax.process_index():03d}.jsonl"
            write_whole(self._directory / name, "".join(_to_json(one) + "\n" for one in responses))
            self._next += 1


def _part_files(directory: epath.Path | None) -> list[epath.Path]:
    return find(directory, "part-[0-9]*.jsonl") if directory else []


def _part_number(part: epath.Path) -> int:
    return int(part.name.removeprefix("part-").partition(".")[0])


def read_parts(directory: epath.Path | None) -> dict[tuple[int, int], Response]:
    """Read the responses in all parts, as {(row, number): response}. Skip a damaged part: its responses are drawn
    again."""
    found = {}
    for part in _part_files(directory):
        try:
            read = [_from_json(line) for line in part.read_text().splitlines()]
        except (ValueError, KeyError, TypeError):
            _LOG.warning("%s is damaged: its responses are drawn again", part)
            continue
        found |= {(response.row, response.number): response for response in read}
    return found


def _to_json(response: Response) -> str:
    fields = dataclasses.asdict(response)
    return json.dumps(fields | {"tokens": response.tokens.tolist(), "logprobs": response.logprobs.tolist()})


def _from_json(line: str) -> Response:
    fields = json.loads(line)
    if "finished" in fields:  # an older version wrote this field instead
        fields["truncated"] = not fields.pop("finished")
    tokens, logprobs = np.array(fields["tokens"], np.int32), np.array(fields["logprobs"], np.float32)
    return Response(**fields | {"tokens": tokens, "logprobs": logprobs})
