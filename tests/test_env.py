"""What a bug report needs, in one command."""

import os
import subprocess
import sys

import jax


def test_versions_settings_and_devices():
    environment = os.environ | {"HF_TOKEN": "hf_secret", "XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    ran = subprocess.run(
        [sys.executable, "-m", "spin_jax.env"], capture_output=True, text=True, timeout=120, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert f"jax: {jax.__version__}" in lines and "spin_jax: 0.1.0" in lines
    assert "XLA_FLAGS=--xla_force_host_platform_device_count=3" in lines and lines[-1].startswith("devices: 3 x ")
    assert "secret" not in ran.stdout


def test_a_device_that_is_not_there_is_a_line():
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    ran = subprocess.run(
        [sys.executable, "-m", "spin_jax.env"], capture_output=True, text=True, timeout=120, env=environment
    )
    assert ran.returncode == 0 and ran.stdout.splitlines()[-1].startswith("devices: "), ran.stderr
