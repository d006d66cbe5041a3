"""The jitted programs of sampling, made once for each `DecodeSpec`."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.sharding import NamedSharding, PartitionSpec

from spin_jax.devices.compiler_options import jit
from spin_jax.devices.sharding import located
from spin_jax.generation import decode_loop, decode_state
from spin_jax.models import abstract_params, cast_params, param_shardings, split_layers
from spin_jax.models.params import make_resharding


@dataclasses.dataclass(frozen=True)
class DecodePrograms:
    """The functions of `decode_loop`, jitted. Those that take slots or a queue donate them.

    Attributes:
        spec: what they are compiled for.
        lay_out: params -> params as the others read them: once an iteration, not once a decode step.
        params: the tree that `lay_out` gives, as jax.ShapeDtypeStruct with shardings.
        start: (slots, places, width) -> Slots, Queue: both empty.
        prefill: (params, queue, prompts) -> Queue.
        decode: (params, slots, queue, sampling, more) -> Slots, Queue, Responses, Report.
        drain: (params, slots, sampling, kept) -> Slots.
        shrink: (slots, kept) -> Slots, Responses, Report; donates nothing, as no array stays as large as it was.
    """

    spec: decode_state.DecodeSpec
    lay_out: Callable
    params: dict
    start: Callable
    prefill: Callable
    decode: Callable
    drain: Callable
    shrink: Callable


@functools.cache
def decode_programs(spec: decode_state.DecodeSpec) -> DecodePrograms:
    """The programs of a spec; compiled when they are first called."""
    mesh = spec.execution.mesh
    rows = jax.tree.map(
        functools.partial(NamedSharding, mesh),
        decode_state.row_specs(jax.eval_shape(lambda: decode_state.start(spec, 1, 1, 1))),
    )
    slots, queue = rows
    whole, ended = NamedSharding(mesh, PartitionSpec()), slots.responses

    def make(function: Callable, **options) -> Callable:
        return jit(mesh, functools.partial(function, spec), **options)

    if spec.by_layer:
        cast = functools.partial(cast_params, spec.model, dtype=spec.execution.dtype)
        lay_out, shardings = jit(mesh, lambda params: split_layers(cast(params)), out_shardings=whole), whole
    else:
        lay_out, shardings = make_resharding(spec.model, spec.execution), param_shardings(mesh, spec.model)
    return DecodePrograms(
        spec=spec,
        lay_out=lay_out,
        params=located(lay_out.eval_shape(abstract_params(spec.model)), shardings),
        start=make(decode_state.start, static_argnums=(0, 1, 2), out_shardings=rows),
        prefill=make(decode_loop.prefill, donate_argnums=1, out_shardings=queue),
        decode=make(decode_loop.decode, donate_argnums=(1, 2), out_shardings=(slots, queue, ended, whole)),
        drain=make(decode_loop.drain, donate_argnums=1, out_shardings=slots),
        shrink=make(decode_loop.shrink, static_argnums=1, out_shardings=(slots, ended, whole)),
    )
