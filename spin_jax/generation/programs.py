"""The jitted programs of sampling, made once for all who sample."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from spin_jax.config import GenerateConfig
from spin_jax.devices.compiler_options import jit
from spin_jax.devices.sharding import located
from spin_jax.generation import decode_loop
from spin_jax.models import Compute, ModelConfig, abstract_params, cast_params, param_shardings, split_layers
from spin_jax.models.params import make_resharding


def make_sampler(
    model: ModelConfig,
    settings: GenerateConfig,
    stop_ids: tuple[int, ...],
    compute: Compute,
    stops_SV: np.ndarray | None = None,
) -> decode_loop.Sampler:
    """The sampler of `config.generate`; `stops_SV` from `stop_strings.stop_table`."""
    truncate = settings.top_p < 1 or settings.top_k > 0
    decoder = decode_loop.Decoder(model, settings.max_new_tokens, truncate, compute)
    return dataclasses.replace(_sampler(decoder), stop_ids=stop_ids, stops_SV=stops_SV)


@functools.cache
def _sampler(decoder: decode_loop.Decoder) -> decode_loop.Sampler:
    mesh = decoder.compute.mesh
    rows = jax.tree.map(
        functools.partial(NamedSharding, mesh),
        decode_loop.specs(jax.eval_shape(lambda: decode_loop.start(decoder, 1, 1, 1))),
    )
    slots, queue = rows
    whole, ended = NamedSharding(mesh, PartitionSpec()), slots.responses

    def make(function: Callable, **options) -> Callable:
        return jit(mesh, functools.partial(function, decoder), **options)

    if decoder.by_layer:
        cast = functools.partial(cast_params, decoder.model, dtype=decoder.compute.dtype)
        copy, laid_out = jit(mesh, lambda params: split_layers(cast(params)), out_shardings=whole), whole
    else:
        copy, laid_out = make_resharding(decoder.model, decoder.compute), param_shardings(mesh, decoder.model)
    return decode_loop.Sampler(
        copy=copy,
        abstract_params=located(copy.eval_shape(abstract_params(decoder.model)), laid_out),
        start=make(decode_loop.start, static_argnums=(0, 1, 2), out_shardings=rows),
        prefill=make(decode_loop.prefill, donate_argnums=1, out_shardings=queue),
        decode=make(decode_loop.decode, donate_argnums=(1, 2), out_shardings=(slots, queue, ended, whole)),
        drain=make(decode_loop.drain, donate_argnums=1, out_shardings=slots),
        shrink=make(decode_loop.shrink, static_argnums=1, out_shardings=(slots, ended, whole)),
    )
