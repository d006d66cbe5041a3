"""Ctrl-C and SIGTERM: one line and exit status 75, whatever the program is doing.

Python runs a signal's handler in the main thread, once that has returned from C++, which may compile for minutes or
wait for another host. So another thread listens, and ends the process if the main thread does not. No file is left half
written, since each is written whole or not at all. While training, `spin_jax.runtime.preemption` handles signals.
"""

import os
import signal
import threading
import time
from collections.abc import Callable

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again
GRACE = 10  # seconds for the main thread to tidy up, once `raise_instead` has been called


def end_at_once() -> None:
    """Let a signal end the process from here on. Call it in the main thread, before slow imports."""
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are its own
    _handle(_leave_it_to_the_thread)
    threading.Thread(target=_listen, args=(heard,), daemon=True).start()


def raise_instead() -> None:
    """Let a signal raise KeyboardInterrupt from here on, so that `finally` blocks run."""
    _handle(signal.default_int_handler)


def end() -> None:
    """End the process without winding up jax, whose threads may crash if they are shut down in the middle of work."""
    os.write(2, b"interrupted; start the same command again to go on\n")
    os._exit(EXIT_STOPPED)


def _handle(handler: Callable) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # shells ignore SIGINT for background jobs: leave it so
            signal.signal(number, handler)


def _leave_it_to_the_thread(number: int, frame: object) -> None:
    del number, frame


def _listen(heard: int) -> None:
    while True:
        number = os.read(heard, 1)[0]
        if raised := signal.getsignal(number) is signal.default_int_handler:
            time.sleep(GRACE)
        if signal.getsignal(number) in (_leave_it_to_the_thread, signal.default_int_handler):
            end()
        elif raised:  # C++ dropped the exception, raised in one of its callbacks: send the signal again
            signal.pthread_kill(threading.main_thread().ident or 0, number)
