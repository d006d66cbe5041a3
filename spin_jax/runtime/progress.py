"""Progress of a long loop and of the whole run: a bar in a terminal or notebook, elsewhere a line now and then. What
each loop of a run took can be noted."""

import contextlib
import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from tqdm import tqdm

from spin_jax.runtime import multihost

# A line is written when both have passed since the last one, and at the end: some dozens in a run of minutes, twenty a
# loop in one of days.
SECONDS = 10.0
SHARE = 0.05

_LOG = logging.getLogger(__name__)


def is_live() -> bool:
    """Whether stderr shows a bar as it moves: a terminal, or a notebook."""
    return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel")


class Loop:
    """A loop of `total` units, of which an earlier start has made `done`. Only the first process shows it.

    Attributes:
        done: units so far.
        elapsed: seconds since the loop began.
    """

    def __init__(self, name: str, total: int, unit: str, done: int = 0):
        self.name, self.total, self.done = name, total, done
        self._unit, self._is_shown = unit, multihost.is_first()
        self._share = 1 - done / max(total, 1)  # that this process makes
        self._begun_with = done
        live = self._is_shown and is_live()
        self._bar = tqdm(total=total, initial=done, desc=name, unit=unit) if live else None
        self._began = self._written = time.perf_counter()
        self._written_done = done
        self._facts: dict[str, str] = {}
        self._first: tuple[float, int] | None = None  # when the first units were done, which waited for the compiler

    def __enter__(self) -> "Loop":
        _run.begin(self.name)
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and self.done > self._written_done:
            self._write()
        if self._is_shown and self.done > self._begun_with:
            _run.note(self._spent())
        if kind is None and self.done >= self.total:
            _run.end(self.name, self._share)

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._began

    def advance(self, units: int = 1, **facts: str) -> None:
        """Count more units as done, and show `facts` beside them."""
        self.done += units
        self._facts = facts
        now = time.perf_counter()
        if self._first is None and units:
            self._first = (now, self.done)
        if self._bar is not None:
            of_run = _run.seconds_left(self.name, self._share, self._seconds_left())
            self._bar.update(units)
            self._bar.set_postfix(facts | ({} if of_run is None else {"run_left": _duration(of_run)}))
        elif now - self._written >= SECONDS and self.done - self._written_done >= SHARE * self.total:
            self._write()

    def _seconds_a_unit(self) -> float | None:
        """Measured after the first units, which waited for the compiler; None before there are others."""
        if self._first is None or self.done == self._first[1]:
            return None
        return (time.perf_counter() - self._first[0]) / (self.done - self._first[1])

    def _spent(self) -> dict[str, object]:
        """What this process made of the loop. Useful seconds are those of its units at the rate after the first ones,
        which waited for the compiler; of a loop that came in one piece that rate is not known."""
        units, elapsed = self.done - self._begun_with, self.elapsed
        useful = min(elapsed, units * (self._seconds_a_unit() or 0.0))
        return {
            "loop": self.name,
            "unit": self._unit,
            "units": units,
            "seconds": elapsed,
            "useful_seconds": useful,
        }

    def _seconds_left(self) -> float | None:
        seconds = self._seconds_a_unit()
        return 0.0 if self.done >= self.total else None if seconds is None else seconds * (self.total - self.done)

    def _write(self) -> None:
        self._written, self._written_done = time.perf_counter(), self.done
        if not self._is_shown:
            return
        parts = [f"{self.name}: {self.done:,} of {self.total:,} {self._unit}s"]
        parts += [f"{name.replace('_', ' ')} {value}" for name, value in self._facts.items()]
        if seconds := self._seconds_a_unit():
            rate = f"{seconds:.2f} s a {self._unit}" if seconds > 1 else f"{1 / seconds:.1f} {self._unit}s a second"
            parts.append(rate)
        left = self._seconds_left()
        if self.done >= self.total:
            parts.append(f"took {_duration(self.elapsed)}")
        elif left is not None:
            parts.append(f"{_duration(left)} left")
        if (of_run := _run.seconds_left(self.name, self._share, left)) is not None:
            parts.append(f"{_duration(of_run)} of the run left")
        _LOG.info("%s", ", ".join(parts))


def _duration(seconds: float) -> str:
    """As "2 d 3 h", "1 h 20 min", "5 min 30 s" or "12 s"."""
    whole = round(seconds)
    for large, small, names in ((86400, 3600, ("d", "h")), (3600, 60, ("h", "min")), (60, 1, ("min", "s"))):
        if whole >= large:
            return f"{whole // large} {names[0]} {whole % large // small} {names[1]}"
    return f"{whole} s"


# ---- the whole run


@dataclasses.dataclass(frozen=True)
class Expected:
    """A loop that a run will make. Loops of one kind take time in proportion to their size."""

    name: str
    kind: str
    size: float = 1.0


class _Run:
    """The loops to come, and how long those of each kind have taken in this process."""

    def __init__(self, loops: Sequence[Expected] = (), note: Callable[[Mapping[str, object]], None] = lambda _: None):
        self.note = note
        self._loops = list(loops)  # the one that goes on and those after it
        self._seconds: dict[str, float] = {}  # by kind, for a size of 1, with what came before the loop
        self._ended = time.perf_counter()

    def begin(self, name: str) -> None:
        """Drop the loops before this one: they are done."""
        names = [loop.name for loop in self._loops]
        if name in names:
            self._loops = self._loops[names.index(name) :]

    def end(self, name: str, share: float) -> None:
        """Note that a loop is done, and which share of it this process made."""
        if self._goes_on(name):
            loop = self._loops.pop(0)
            if share:
                self._seconds[loop.kind] = self._for_size_1(loop, share, 0.0)
            self._ended = time.perf_counter()

    def seconds_left(self, name: str, share: float, of_loop: float | None) -> float | None:
        """Seconds left of the run, given those left of the loop `name`. None while that is not known: until a loop of
        each kind that is to come has been made once."""
        if of_loop is None or not self._goes_on(name):
            return None
        now, *later = self._loops
        seconds = {now.kind: self._for_size_1(now, share, of_loop)} | self._seconds
        if any(loop.kind not in seconds for loop in later):
            return None
        return of_loop + sum(seconds[loop.kind] * loop.size for loop in later)

    def _goes_on(self, name: str) -> bool:
        return bool(self._loops) and self._loops[0].name == name

    def _for_size_1(self, loop: Expected, share: float, left: float) -> float:
        """Seconds that a loop of this kind and of size 1 takes, from the end of the loop before. A share below half
        counts as half, since much of its time is the compiler's."""
        return (time.perf_counter() - self._ended + left) / (max(share, 0.5) * loop.size)


_run = _Run()


@contextlib.contextmanager
def expected(
    loops: Sequence[Expected], note: Callable[[Mapping[str, object]], None] = lambda _: None
) -> Iterator[None]:
    """Announce the loops that a run makes inside, in order, so that each can say how long the whole will take. After
    each loop the first process calls `note` with what it took: `loop`, its name; `unit` and `units`; `seconds`, and how
    many of them were `useful_seconds`."""
    global _run
    _run = _Run(loops, note)
    try:
        yield
    finally:
        _run = _Run()
