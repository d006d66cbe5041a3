"""Shared fixtures: where the real model and data are, if this machine has them."""

import importlib
import os
import pathlib
import signal
import tempfile
import threading

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight virtual CPU devices, so that sharded programs run for real in the default tests.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
# Compiling is most of what the tests do: without LLVM's passes programs for CPUs compile in half of the time, here and
# in all processes that tests start.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # they compile in no time, and are many
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Compiled programs are kept while tests run, for all of xdist's processes and those that tests start: the first
    # process makes the directory, and the others find it here.
    _COMPILED = tempfile.TemporaryDirectory(prefix="spin_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name

if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in the background without it

import jax  # noqa: E402  (after the flags above)
import pytest  # noqa: E402

from spin_jax.registry import Registry  # noqa: E402

# Files that take minutes, the longest first; `--dist loadfile` would begin with those of the most tests.
LONGEST = (
    "processes scoring benchmarks self_play harness decode_loop lm_eval evaluators kills main generate notebooks "
    "sharding low_rank logprobs"
).split()

jax.config.update("jax_numpy_rank_promotion", "raise")  # a silent [B] + [B, 1] is a wrong loss


def pytest_configure(config):
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Two processes that share the files end together, if what is left in the end is short."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_module():
    """Linux lets a process have 65,530 memory maps. Each compiled program takes some: all tests together take too many,
    and the process then ends in the middle of compiling."""
    yield
    jax.clear_caches()


def _directory(variable: str, what: str) -> pathlib.Path:
    value = os.environ.get(variable, "")
    if not value:
        pytest.skip(f"set {variable} to {what} to run this test")
    path = pathlib.Path(value).resolve()
    if not path.is_dir():
        pytest.fail(f"{variable}={value} is not a directory")
    return path


@pytest.fixture(scope="session")
def assets() -> pathlib.Path:
    """A directory with `data/` (real instruction sets) and `models/stories260k-hf`."""
    return _directory("SPIN_JAX_ASSETS", "a directory with data/ and models/")


@pytest.fixture
def own_registries(monkeypatch):
    """What a test registers is forgotten after it."""
    for package in ("objectives", "evaluation", "data.layouts", "kernels", "reports"):
        for registry in vars(importlib.import_module(f"spin_jax.{package}")).values():
            if isinstance(registry, Registry):
                monkeypatch.setattr(registry, "data", dict(registry.data))


@pytest.fixture
def all_passes():
    """Compile as a user does: for what computes for minutes, and for sums whose last digits depend on the passes."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")


@pytest.fixture(autouse=True)
def all_passes_for_a_real_model(request):
    if "smollm2" in request.fixturenames:
        request.getfixturevalue("all_passes")


@pytest.fixture(scope="session")
def smollm2() -> pathlib.Path:
    """A Hugging Face directory of SmolLM2-135M-Instruct."""
    return _directory("SPIN_JAX_SMOLLM2", "a Hugging Face directory of SmolLM2-135M-Instruct")
