"""How long a run takes: `timing.jsonl`, a line for each start of the command and one for each loop that it has made."""

import logging
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from etils import epath

from spin_jax.errors import UserError
from spin_jax.runtime import files, metric_writer

FILE = "timing.jsonl"

_LOG = logging.getLogger(__name__)


def note(workdir: epath.Path, row: Mapping[str, object]) -> None:
    """Add a line, with the time `at` which it was written. A run goes on where it cannot be."""
    path = workdir / FILE
    try:
        with files.writing(path):
            before = path.read_text() if path.exists() else ""  # an object store cannot append
        files.write_whole(path, before + metric_writer.to_json({"at": time.time(), **row}) + "\n")
    except UserError as error:
        _LOG.warning("%s", error)


class Spent(NamedTuple):
    """Where the time of a run has gone.

    Attributes:
        wall: seconds from each start of the command to the end of the last loop that it made, together.
        useful: seconds of the loops' units, without what their first ones waited for the compiler.
        loops: (kind of loop, iteration or None) -> seconds, in the order in which they came first.
        starts: how often the command was started and made something.
    """

    wall: float
    useful: float
    loops: dict[tuple[str, int | None], float]
    starts: int


def spent(rows: Sequence[Mapping]) -> Spent | None:
    """From the lines of a run; None where there is no loop yet. What a process has done since its last whole loop when
    it was killed is not known, and counts for nothing."""
    loops: dict[tuple[str, int | None], float] = defaultdict(float)
    walls, useful, started = {}, 0.0, None
    for row in rows:
        started = row.get("started", started)
        if "loop" in row and started is not None:
            name = re.fullmatch(r"(?:iteration (\d+): )?(.*)", str(row["loop"]), re.DOTALL)
            assert name  # whatever it is
            loops[name[2], None if name[1] is None else int(name[1])] += row.get("seconds", 0.0)
            walls[started] = row.get("at", started) - started
            useful += row.get("useful_seconds", 0.0)
    return Spent(sum(walls.values()), useful, dict(loops), len(walls)) if loops else None
