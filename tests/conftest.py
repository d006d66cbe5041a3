"""Shared fixtures: where the real model and data are, if this machine has them."""

import os
import pathlib
import signal
import threading

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight virtual CPU devices, so that sharded programs run for real in the default tests.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in the background without it

import jax  # noqa: E402  (after the flags above)
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")  # a silent [B] + [B, 1] is a wrong loss


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


@pytest.fixture(scope="session")
def smollm2() -> pathlib.Path:
    """A Hugging Face directory of SmolLM2-135M-Instruct."""
    return _directory("SPIN_JAX_SMOLLM2", "a Hugging Face directory of SmolLM2-135M-Instruct")
