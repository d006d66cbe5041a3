"""What a run has left in its directory, which is all that reports know of it; and how they are written."""

import contextlib
import dataclasses
import itertools
import json
import logging
import os
from collections.abc import Callable, Mapping

from etils import epath

from spin_jax.errors import UserError, as_flag
from spin_jax.reports import REPORTS, timing
from spin_jax.runtime import files, metric_writer

RESULT = "result.json"
ITERATION, CONTROL = "iteration ", "SFT control "  # names of a policy and of its control, before their number
SPENT, PETA = "petaflops", 1e15  # an iteration's model FLOPs, in its result
_RENAMED = {"generated/cut": "generated/truncated"}  # since runs that may still go on

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run, read from its files. No device is needed, and the run may still be at work.

    Attributes:
        workdir: the run's directory, where everything else about it can be read.
        config: fields by their dotted names; `fingerprint` of the data and `start`, that of the model.
        results: what each model was measured by, in the order in which they were made: `model`, its name; `iteration`,
            the number of the iteration that trained it, or None; and its measures.
        metrics: iteration -> the rows of its training steps, each with `step` and what `metrics.jsonl` has.
        directories: a model's name -> the directory of its result, there or not yet, in the order of the results.
        timing: the lines of `timing.jsonl`, see `spin_jax.reports.timing`.
        unread: one line for each file that is damaged, and so left out.
    """

    workdir: epath.Path
    config: dict[str, object]
    results: list[dict]
    metrics: dict[int, list[dict]]
    directories: dict[str, epath.Path] = dataclasses.field(default_factory=dict)
    timing: list[dict] = dataclasses.field(default_factory=list)
    unread: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def load(cls, workdir: epath.PathLike, damaged: bool = False) -> "RunRecord":
        """Read a run's directory; what is not there yet is empty.

        Args:
            damaged: also read a run whose files are damaged, without these.

        Raises:
            UserError: a `metrics.jsonl` is damaged, which nothing makes anew.
        """
        workdir = epath.Path(workdir)
        record = cls(workdir, {}, [], {}, _directories(workdir))
        for name, directory in record.directories.items():
            if (directory / RESULT).exists():
                row = read_result(directory)
                record.results.extend([row] if row else [])
                record.unread.extend([] if row else [f"{directory / RESULT} is damaged"])
            steps = directory / metric_writer.FILE_NAME
            if name.startswith(ITERATION) and steps.exists():
                try:
                    rows = metric_writer.read_metrics(steps)
                except (UserError, OSError) as error:
                    if not damaged:
                        raise
                    record.unread.append(str(error))
                else:
                    record.metrics.update({int(name.removeprefix(ITERATION)): rows} if rows else {})
        record.timing.extend(record.lines(record.workdir / timing.FILE))
        config = record.workdir / "config.json"
        if config.exists():
            try:
                noted = json.loads(config.read_text())
                if not isinstance(noted, dict):
                    raise TypeError("not an object")
                record.config.update(noted)
            except (OSError, ValueError, TypeError) as error:
                record.unread.append(f"{config} is damaged: {error}")
        return record

    def lines(self, path: epath.Path) -> list[dict]:
        """The objects in a file of JSON lines; none where it is not there. Damaged lines are left out, and noted."""
        rows, damaged = [], 0
        try:
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            self.unread.append(f"{path}: {error}")
            return []
        for line in content.splitlines():
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                row = json.loads(line, object_hook=metric_writer.restore)
                if isinstance(row, dict):
                    rows.append(row)
                    continue
            damaged += 1
        if damaged:
            self.unread.append(f"{path}: {damaged} damaged line(s)")
        return rows


def _directories(workdir: epath.Path) -> dict[str, epath.Path]:
    found = {"SFT": workdir}
    for t in itertools.count():
        iteration = workdir / f"iteration_{t}"
        if not iteration.exists():
            break
        found[f"{ITERATION}{t}"] = iteration
        if (iteration / "control").exists():
            found[f"{CONTROL}{t}"] = iteration / "control"
    return found


# A report: a run's record -> {name under the workdir: content}.
Report = Callable[[RunRecord], Mapping[str, str | bytes]]


def write_reports(record: RunRecord) -> None:
    """Write every report that is registered, each file whole or not at all."""
    for report in REPORTS.values():
        for name, content in report(record).items():
            files.write_whole(record.workdir / name, content)


def write_result(directory: epath.Path, row: Mapping[str, object]) -> None:
    """Keeps the summary's row of the model that was measured for `directory`."""
    files.write_whole(directory / RESULT, metric_writer.to_json(row) + "\n")


def spent_flops(workdir: epath.PathLike, t: int) -> float:
    """Model FLOPs that iteration t of a run has spent, as its result says.

    Raises:
        UserError: there is no such result. The message is of the field that names the run.
    """
    directory = files.expand(workdir) / f"iteration_{t}"
    found = (read_result(directory) or {}).get(SPENT)
    if not found:
        flag = as_flag("train.match_flops", os.fspath(workdir))
        raise UserError(f"{flag}: {directory / RESULT} says no {SPENT}: name the workdir of a run that has finished")
    return found * PETA


def read_result(directory: epath.Path) -> dict | None:
    """The row that `write_result` kept; None where there is none, or a damaged one: it can be measured again."""
    path = directory / RESULT
    if not path.exists():
        return None
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        row = json.loads(path.read_text(), object_hook=metric_writer.restore)
        if "model" in row and "iteration" in row:
            return {_RENAMED.get(name, name): value for name, value in row.items()}
    _LOG.warning("%s is damaged: measured again", path)
    return None
