"""A profile of a few training steps: a trace of the devices and of the host, for Perfetto, TensorBoard and xprof."""

import contextlib
import logging
import pathlib
import tempfile
from collections.abc import Callable, Iterator

import jax
from etils import epath

from spin_jax.runtime import multihost
from spin_jax.runtime.files import write_whole, writing

FIRST, LAST = 3, 5  # steps since the start: after compilation, with batches arriving at their usual pace

_LOG = logging.getLogger(__name__)


class Profiler:
    """Trace a few steps of the first training loop, if `wanted`."""

    def __init__(self, wanted: bool):
        self._wanted = wanted

    @contextlib.contextmanager
    def traced(self, step_fn: Callable, directory: epath.Path) -> Iterator[Callable]:
        """Wrap a training step so that its third to fifth call are traced, into `directory`/plugins/profile/TIME, where
        TensorBoard looks. A loop that ends within them leaves a shorter trace.

        Process 0 traces its own devices; those of other processes do the same work. Wait for the devices before the
        trace begins and ends, so that it holds whole steps.
        """
        wanted, self._wanted = self._wanted, False
        if not wanted or not multihost.is_first():
            yield step_fn
            return
        calls = 0

        def step(state, *args):
            nonlocal calls
            calls += 1
            if calls == FIRST:
                jax.block_until_ready(state)
                tracing.enter_context(_trace(directory))
            with jax.profiler.StepTraceAnnotation("train", step_num=calls):
                made = step_fn(state, *args)
            if calls == LAST:
                jax.block_until_ready(made)
                tracing.close()
            return made

        with contextlib.ExitStack() as tracing:
            yield step
        if calls < FIRST:
            _LOG.warning("no profile: it takes steps %d to %d after a start, and there were %d", FIRST, LAST, calls)


@contextlib.contextmanager
def _trace(directory: epath.Path) -> Iterator[None]:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # tracing every Python call would slow the host down
    with writing(directory), tempfile.TemporaryDirectory() as local:  # the profiler cannot write to an object store
        with jax.profiler.trace(local, create_perfetto_trace=True, profiler_options=options):
            yield
        for file in pathlib.Path(local).rglob("*.*"):
            write_whole(directory / file.relative_to(local), file.read_bytes())
    _LOG.info("profile: %s", directory)
