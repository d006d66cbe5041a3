"""Preemption: SIGTERM or Ctrl-C sets a flag, and all processes stop after the same step.

jax has `multihost_utils.reached_preemption_sync_point` for this. It is not used, because it hears SIGTERM alone, and
because Orbax calls it as well: it counts calls, and would mix up Orbax's with ours.
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
    """Do a command's work and return its exit status: `EXIT_STOPPED`, after one line on stderr, if a signal stopped it.

    SIGTERM, which a preempted machine gets, acts as Ctrl-C. It stops a single process at once, except while it trains.
    Several processes stop together, at the next `between_batches` or training step.

    Args:
        work: returns the status otherwise; None is 0.
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
    """Let a signal only set the flag while inside; a second Ctrl-C interrupts at once. A nested call does nothing."""
    global _asked
    if signal.getsignal(signal.SIGTERM) is _note:
        yield
        return
    previous = {}
    _asked = False
    with contextlib.suppress(ValueError):  # only the main thread may set handlers, and a notebook can run in another
        previous = {number: signal.signal(number, _note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if _asked and not multihost.are_several():  # nothing inside has seen the flag: interrupt what follows
        signal.raise_signal(signal.SIGINT)


def _note(number: int, frame) -> None:
    global _asked
    del frame
    if _asked and number == signal.SIGINT:
        raise KeyboardInterrupt
    _asked = True
    os.write(2, b"\nstopping after this step, with everything saved\n")  # a handler must not touch Python's buffers


def asked() -> bool:
    """Whether this process was asked to stop. Other processes may not have been."""
    return _asked


def between_batches() -> None:
    """Stop all processes here if any of them was asked to. Do nothing in a single process, which a signal interrupts
    anywhere.

    Raises:
        Stopped: on all processes.
    """
    if multihost.are_several() and multihost.any_process(_asked):
        raise Stopped("stopped between two batches; start the same command again to go on")
