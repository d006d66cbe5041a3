"""The jitted programs of sampling, made once for each `DecodeSpec`."""

import functools
from collections.abc import Callable

import jax
from jax.sharding import NamedSharding, PartitionSpec

from spin_jax.devices.compiler_options import jit
from spin_jax.devices.sharding import located
from spin_jax.generation import decode_loop, decode_state
from spin_jax.models import abstract_params, cast_params, param_shardings, split_layers
from spin_jax.models.params import make_resharding


class DecodePrograms:
    """The functions of `decode_loop`, jitted. They donate the slots and the queue that they are given.

    Attributes:
        spec: what they are compiled for.
        lay_out: params -> params as the other programs read them. Call it once an iteration.
        params: the tree that `lay_out` returns, as jax.ShapeDtypeStruct with shardings.
        start: (slots, places, width) -> Slots, Queue: both empty.
        prefill: (params, queue, prompts) -> Queue.
        decode: (params, slots, queue, sampling, more) -> Slots, Queue, Responses, Report.
        drain: (params, slots, sampling, kept) -> Slots.
        shrink: (slots, kept) -> Slots, Responses, Report. It donates nothing, since every array becomes smaller.
    """

    def __init__(self, spec: decode_state.DecodeSpec):
        self.spec, mesh = spec, spec.execution.mesh
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
            self.lay_out = jit(mesh, lambda params: split_layers(cast(params)), out_shardings=whole)
            shardings = whole
        else:
            self.lay_out = make_resharding(spec.model, spec.execution)
            shardings = param_shardings(mesh, spec.model)
        self.params = located(self.lay_out.eval_shape(abstract_params(spec.model)), shardings)
        self.start = make(decode_state.start, static_argnums=(0, 1, 2), out_shardings=rows)
        self.prefill = make(decode_loop.prefill, donate_argnums=1, out_shardings=queue)
        self.decode = make(decode_loop.decode, donate_argnums=(1, 2), out_shardings=(slots, queue, ended, whole))
        self.drain = make(decode_loop.drain, donate_argnums=1, out_shardings=slots)
        self.shrink = make(decode_loop.shrink, static_argnums=1, out_shardings=(slots, ended, whole))


decode_programs = functools.cache(DecodePrograms)
