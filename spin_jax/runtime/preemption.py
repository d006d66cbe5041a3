"""A clean stop: SIGTERM and Ctrl-C as a wish, granted between two steps and by all processes at once.

jax has a way of its own for this (`multihost_utils.reached_preemption_sync_point`), which knows SIGTERM only and counts
the caller's steps. Orbax calls it too, with its own count, and the two would be mixed up; hence a flag.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

from spin_jax.runtime import interrupts, multihost
from spin_jax.runtime.interrupts import EXIT_STOPPED

_asked = False


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, as a preempted machine gets, or Ctrl-C) and has saved its state."""


def exit_status(work: Callable[[], int | None]) -> int:
    """Does a command's work and returns its status, 0 if it has none; `EXIT_STOPPED` when a signal stopped it, which
    one line says.

    A preempted machine gets SIGTERM. It is as Ctrl-C, which stops one process wherever it is, unless it is training; of
    several processes none stops alone.
    """
    interrupts.raise_instead()
    try:
        with deferred() if multihost.are_several() else contextlib.nullcontext():
            return work() or 0
    except KeyboardInterrupt:
        interrupts.end()
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
    return EXIT_STOPPED


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Keep a signal as a wish while inside; a second Ctrl-C interrupts at once. Nested in another, do nothing."""
    global _asked
    if signal.getsignal(signal.SIGTERM) is _note:
        yield
        return
    previous = {}
    _asked = False
    with contextlib.suppress(ValueError):  # not the main thread (a notebook's executor): signals stay where they are
        previous = {number: signal.signal(number, _note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if _asked and not multihost.are_several():  # too late for what was inside
        signal.raise_signal(signal.SIGINT)


def _note(number: int, frame) -> None:
    global _asked
    del frame
    if _asked and number == signal.SIGINT:
        raise KeyboardInterrupt
    _asked = True
    os.write(2, b"\nstopping after this step, with everything saved\n")  # a handler must not touch Python's buffers


def asked() -> bool:
    """Whether this process was asked to stop; the others may not know."""
    return _asked


def between_batches() -> None:
    """Where several processes can stop together: they all do if one was asked. One process alone is interrupted
    wherever it is.

    Raises:
        Stopped: on all processes.
    """
    if multihost.are_several() and multihost.any_process(_asked):
        raise Stopped("stopped between two batches; start the same command again to go on")
