"""Ctrl-C and SIGTERM: one line and exit status 75, whatever the program is doing.

Python runs a signal's handler when its main thread is back from C++, which may compile for minutes or wait for another
host. So a thread listens, and ends the process where the main thread does not. Nothing is lost: every file is written
whole or not at all. Training has a handler of its own (`spin_jax.runtime.preemption`), which is left alone.
"""

import os
import signal
import threading
import time
from collections.abc import Callable

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again
GRACE = 10  # seconds that the main thread has to tidy up, once there is something to tidy up


def end_at_once() -> None:
    """From here on a signal ends the process; call it in the main thread, before what takes time to import."""
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are its own
    _handle(_leave_it_to_the_thread)
    threading.Thread(target=_listen, args=(heard,), daemon=True).start()


def raise_instead() -> None:
    """From here on a signal raises KeyboardInterrupt, so that what was begun is tidied up."""
    _handle(signal.default_int_handler)


def end() -> None:
    """End the process now: to wind up jax and its threads in the middle of something is to ask for a crash."""
    os.write(2, b"interrupted; start the same command again to go on\n")
    os._exit(EXIT_STOPPED)


def _handle(handler: Callable) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as it is in the background
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
        elif raised:  # in a callback of C++, which dropped it
            signal.pthread_kill(threading.main_thread().ident or 0, number)
