"""The Llama family: configs, pure functions on params, Hugging Face directories in and out."""

from spin_jax.models.cache import NOWHERE, Columns, cache_dtype, columns_axis, init_cache, rows_axis
from spin_jax.models.compute import REMAT_POLICIES, Compute, kept_numbers
from spin_jax.models.config import ModelConfig
from spin_jax.models.directory import describe, downloaded, read_config, resolve, uploaded
from spin_jax.models.huggingface import holds, load, save
from spin_jax.models.identity import fingerprint
from spin_jax.models.llama import (
    abstract_params,
    flops_per_token,
    for_compute,
    forward,
    init_params,
    logical_axes,
    num_params,
    param_shardings,
    split_layers,
    unembed,
    unembed_flops,
)
from spin_jax.models.lora import abstract_adapters, adapter_shardings, attach, init_adapters, merge, num_adapter_params

__all__ = [
    "NOWHERE",
    "REMAT_POLICIES",
    "Columns",
    "Compute",
    "ModelConfig",
    "abstract_adapters",
    "abstract_params",
    "adapter_shardings",
    "attach",
    "cache_dtype",
    "columns_axis",
    "describe",
    "downloaded",
    "fingerprint",
    "flops_per_token",
    "for_compute",
    "forward",
    "holds",
    "init_adapters",
    "init_cache",
    "init_params",
    "kept_numbers",
    "load",
    "logical_axes",
    "merge",
    "num_adapter_params",
    "num_params",
    "param_shardings",
    "read_config",
    "resolve",
    "rows_axis",
    "save",
    "split_layers",
    "unembed",
    "unembed_flops",
    "uploaded",
]
