"""Turn an out-of-memory error into one line: how much was asked for, how much there is, and which settings help."""

import contextlib
import functools
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import jax

from spin_jax.config import Config
from spin_jax.errors import UserError

GIB = 2**30
_EXHAUSTED = "resource_exhausted|out[ _]of[ _]memory"
# "allocate 16.0 TiB", "allocating 4398046511104 bytes", "allocate request for 2.99GiB", "Used 63.8G of 30.75G hbm"
_ASKED = re.compile(r"(?:allocat\w+|reserve|request for|Used) ([\d.]+) ?(?:bytes|([KMGT]?)i?B?\b)")
_THERE = re.compile(r"(?:There are|hbm\. Used [\d.]+[KMGT]? of) ([\d.]+) ?(?:bytes|([KMGT]?)i?B?\b)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

T = TypeVar("T")


def is_exhausted(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, says that memory ran out. A full disk, which tensorstore calls
    RESOURCE_EXHAUSTED too, does not count."""
    while error:
        if isinstance(error, MemoryError):
            return True
        if isinstance(error, jax.errors.JaxRuntimeError) and re.search(_EXHAUSTED, str(error), re.IGNORECASE):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def told(what: str, tries: Sequence[str]) -> Iterator[None]:
    """Turn an out-of-memory error inside into one line.

    Args:
        what: the stage, as the user knows it.
        tries: settings that help, in the order in which to try them.

    Raises:
        UserError: in place of the error. The error's frames are dropped, because they hold the arrays that fill the
            memory.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_exhausted(error):
            raise
        line = f"{what}: out of memory{_numbers(error)}; try, in this order: {', '.join(tries)}"
        raise UserError(line) from error.with_traceback(None)


def tells(what: str, tries: Callable[[Config], Sequence[str]]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Decorate a function, whose first argument is a config or has one, with `told`."""

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(function)
        def wrapped(first, *arguments, **named):
            with told(what, tries(getattr(first, "config", first))):
                return function(first, *arguments, **named)

        return wrapped

    return decorate


def for_sampling(config: Config) -> list[str]:
    """Settings with which sampling needs less memory; the first two change no response."""
    settings = config.generate
    sizes = {"batch_size": settings.batch_size, "prefill_batch_size": settings.prefill_batch_size}
    tries = [f"--config.generate.{name}={size // 2}" for name, size in sizes.items() if size > 1]
    return [*tries, "more devices", "a smaller --config.generate.max_new_tokens or --config.data.max_prompt_length"]


def for_training(config: Config) -> list[str]:
    """Settings with which training and scoring need less memory; the first three change results by rounding alone."""
    tries = []
    if 2 * config.train.micro_batches <= config.train.batch_size:
        tries.append(f"--config.train.micro_batches={2 * config.train.micro_batches}")
    if config.model.remat != "full":
        tries.append("--config.model.remat=full")
    if not config.model.logits_chunk:
        tries.append("--config.model.logits_chunk=128")
    tries.append("more devices")
    if config.spin.opponent == "live":
        tries.append("--config.spin.opponent=stored")
    if not config.lora.rank:
        tries.append("--config.lora.rank=16 with ten times the learning rate")
    return [*tries, "a smaller --config.data.max_length"]


def for_loading(config: Config | None = None) -> list[str]:
    """What to do where reading data and weights needs too much memory."""
    del config
    return ["a machine with more memory", "fewer rows (--config.data.max_rows)", "a smaller model"]


def _numbers(error: BaseException) -> str:
    """Return what is known of the sizes, as ", 4.00 GiB asked for, 1.92 GiB there"."""
    texts, cause = [], error
    while cause:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    asked, there = (_bytes(pattern, " ".join(texts)) for pattern in (_ASKED, _THERE))
    there = _free() if there is None else there
    known = (("asked for", asked), ("there", there))
    return "".join(f", {size / GIB:,.2f} GiB {what}" for what, size in known if size is not None)


def _bytes(pattern: re.Pattern, text: str) -> float | None:
    found = pattern.search(text)
    return float(found[1]) * _UNITS[found[2] or ""] if found else None


def _free() -> float | None:
    """Bytes free on this process's fullest device; for CPUs, bytes free on the host within this process's limit."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return min(one["bytes_limit"] - one["bytes_in_use"] for one in stats)
    with contextlib.suppress(OSError, KeyError, ValueError, ImportError):
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        free = _kilobytes("/proc/meminfo", "MemAvailable")
        used = _kilobytes("/proc/self/status", "VmSize")
        return free if limit == resource.RLIM_INFINITY else min(free, limit - used)
    return None


def _kilobytes(file: str, name: str) -> float:
    """A line of a file in /proc, in bytes."""
    lines = dict(line.split(":", 1) for line in pathlib.Path(file).read_text().splitlines() if ":" in line)
    return float(lines[name].split()[0]) * 1024
