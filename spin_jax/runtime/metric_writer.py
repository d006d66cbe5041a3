"""Write a run's metrics: one JSON line a step, and the same numbers for TensorBoard."""

import json
import math
import numbers
import os
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from spin_jax.errors import UserError
from spin_jax.runtime.files import is_remote, write_whole, writing

FILE_NAME = "metrics.jsonl"
# Rewrite the whole file this often on an object store, which cannot append and takes one write a second of an object.
REMOTE_SECONDS = 30.0


def to_json(values: Mapping[str, Any]) -> str:
    """Write values as one line of valid JSON, so that `restore` loses nothing.

    JSON has no NaN or infinity, and most readers refuse Python's. Write such a value as null, and note it as "nan",
    "inf" or "-inf" under its name in a field `not_finite`. Numpy and JAX scalars become plain numbers.
    """
    plain, not_finite = {}, {}
    for name, value in values.items():
        if isinstance(value, numbers.Integral):
            value = int(value)
        elif value is not None and not isinstance(value, str):
            value = float(value)
            if not math.isfinite(value):
                not_finite[name], value = str(value), None
        plain[name] = value
    return json.dumps(plain | {"not_finite": not_finite} if not_finite else plain)


def restore(row: dict) -> dict:
    """Put the values that `to_json` noted in `not_finite` back, as floats."""
    return row | {name: float(text) for name, text in row.pop("not_finite", {}).items()}


def read_metrics(path: epath.PathLike) -> list[dict]:
    """Read the rows of a metrics.jsonl, oldest first, each with its `step`. Drop a last line that a kill left half
    written.

    Raises:
        UserError: another line is not a row of metrics; the message has its number.
    """
    rows, lines = [], epath.Path(path).read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line, object_hook=restore)
            int(row["step"])
        except (ValueError, KeyError, TypeError, AttributeError):
            if number == len(lines):
                break
            raise UserError(
                f'{path}, line {number}: not a row of metrics; write a JSON object with "step", or delete the line'
            ) from None
        rows.append(row)
    return rows


class MetricsWriter:
    """Append to `directory/metrics.jsonl` and to event files under `directory/tensorboard`.

    Make it in process 0 alone. A local file has each step at once; on an object store (gs://...) the file is rewritten
    every `REMOTE_SECONDS`, and on `flush`.

    Args:
        directory: a local path or gs://...; made if missing.
        resume_step: the last step of an earlier start to keep. Drop later ones, which are made again. None drops all
            that an earlier start wrote.
    """

    def __init__(self, directory: epath.PathLike, resume_step: int | None = None):
        directory = epath.Path(directory)
        self._path = directory / FILE_NAME
        keeps = resume_step is not None and self._path.exists()
        rows = [row for row in read_metrics(self._path) if row["step"] <= resume_step] if keeps else []
        self._lines = [to_json(row) + "\n" for row in rows]
        self._write_all()
        with writing(directory):
            self._file = None if is_remote(directory) else self._path.open("a")
            self._tensorboard = _EventFile(directory / "tensorboard", 0 if resume_step is None else resume_step + 1)

    def write(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Add one step's numbers. None, for a number not measured, is null in the file and absent in TensorBoard.

        Raises:
            UserError: the disk is full.
        """
        line = to_json({"step": step} | dict(values)) + "\n"
        with writing(self._path.parent):
            self._tensorboard.write(step, {name: float(value) for name, value in values.items() if value is not None})
            if self._file:
                self._file.write(line)
                self._file.flush()
        if not self._file:
            self._lines.append(line)
            if time.monotonic() - self._written_at >= REMOTE_SECONDS:
                self.flush()

    def flush(self) -> None:
        """Make sure that every step written so far outlives this process. Call it before saving a checkpoint."""
        if not self._file:
            self._write_all()
        with writing(self._path.parent):
            self._tensorboard.flush()

    def close(self) -> None:
        """Flush and close the files. Do nothing the second time."""
        self.flush()
        with writing(self._path.parent):
            self._tensorboard.close()
            if self._file:
                self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _write_all(self) -> None:
        write_whole(self._path, "".join(self._lines))
        self._written_at = time.monotonic()


class _EventFile:
    """A TensorBoard event file, written by the calling thread.

    tensorboardX's own writer uses another thread. A full disk ends that thread, and the run then waits for it forever.
    """

    def __init__(self, directory: epath.Path, first: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import directory_check

        directory_check(os.fspath(directory))  # makes it if missing
        # Event files are named by the second: without a suffix, a quick restart would overwrite the one before.
        self._file = EventsWriter(os.fspath(directory / "events"), f".{first}")
        # A START tells TensorBoard to hide events of this step and later in older event files.
        self._messages: Any = event_pb2  # made by protoc: types do not see what is in it
        self._write(step=first, file_version="brain.Event:2")
        start = self._messages.SessionLog(status=self._messages.SessionLog.START)
        self._write(step=first, session_log=start)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        tagged = [{"tag": name, "simple_value": value} for name, value in values.items()]
        self._write(wall_time=time.time(), step=step, summary={"value": tagged})

    def _write(self, **event: Any) -> None:
        if self._file:
            self._file.write_event(self._messages.Event(**event))

    def flush(self) -> None:
        if self._file:
            self._file.flush()

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None
