"""Programs compiled for TPUs that are not here: a mesh of described chips, and the compiler's schedule."""

import importlib.util
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spin_jax.compile_check import compiler
from spin_jax.devices.accelerators import V5E, V6E, Slice

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the compiler for TPUs: pip install 'jax[tpu]'"
)
V5E_4 = Slice(4, V5E, "v5e:2x2")
V6E_4 = Slice(4, V6E, "v6e:2x2")
V5E_8 = Slice(8, V5E, "v5e:2x4")


def mesh(target: Slice, **sizes: int) -> Mesh:
    """A mesh of a slice's described devices, axes by name."""
    return Mesh(np.array(compiler.devices_of(target)).reshape(*sizes.values()), tuple(sizes))


def shape(on: Mesh, dims: tuple[int, ...], *spec: str | None, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(on, PartitionSpec(*spec)))


def schedule(function, *args, **jit_options) -> tuple[str, jax.stages.Compiled]:
    """The text of the compiler's schedule of a function called with `args`, and what jax makes of it."""
    with tempfile.TemporaryDirectory() as directory:
        options = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
        compiled = jax.jit(function, **jit_options).lower(*args).compile(compiler_options=options)
        (file,) = pathlib.Path(directory).glob("*.after_codegen.txt")
        return file.read_text(), compiled
