"""What a bug report needs: versions, settings and devices of this machine.

python -m spin_jax.env
"""

import importlib.metadata
import os
import platform
from collections.abc import Iterator

from spin_jax.runtime import cli
from spin_jax.runtime.files import first_line

PACKAGES = (
    "spin_jax jax jaxlib libtpu flax optax orbax-checkpoint transformers tokenizers datasets safetensors "
    "ml-collections numpy lm-eval openai tokamax torch"
).split()
SETTINGS = ("JAX_", "XLA_", "LIBTPU_", "SPIN_JAX_", "HF_HUB_OFFLINE", "HF_HOME", "GLIBC_TUNABLES")  # no keys, no tokens


def main(argv: list[str]) -> int:
    del argv
    for line in lines():
        print(line, flush=True)  # finding devices can take long, or fail
    return 0


def lines() -> Iterator[str]:
    """One after the other, the devices last."""
    yield f"system: {platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()}"
    for name in PACKAGES:
        try:
            yield f"{name}: {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{name}: not installed"
    yield from (f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS))
    import jax

    from spin_jax import sizing

    try:
        yield f"devices: {sizing.describe(jax.devices())}"
    except Exception as error:  # noqa: BLE001  where a driver is missing jax and drivers each raise their own
        yield f"devices: {first_line(error)}"


if __name__ == "__main__":
    cli.run(main)
