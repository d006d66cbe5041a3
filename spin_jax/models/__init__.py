"""The Llama family: descriptions, and pure functions on params."""

from spin_jax.models.config import ModelConfig
from spin_jax.models.execution import REMAT_POLICIES, Execution, saved_numbers
from spin_jax.models.flops import flops_per_token, num_params, unembed_flops
from spin_jax.models.kv_cache import EMPTY_POSITION, Columns, cache_dtype, columns_axis, init_cache, rows_axis
from spin_jax.models.llama import forward, unembed
from spin_jax.models.lora import abstract_adapters, adapter_shardings, attach, init_adapters, merge, num_adapter_params
from spin_jax.models.params import (
    abstract_params,
    cast_params,
    init_params,
    logical_axes,
    param_shardings,
    split_layers,
)

__all__ = [
    "EMPTY_POSITION",
    "REMAT_POLICIES",
    "Columns",
    "Execution",
    "ModelConfig",
    "abstract_adapters",
    "abstract_params",
    "adapter_shardings",
    "attach",
    "cache_dtype",
    "cast_params",
    "columns_axis",
    "flops_per_token",
    "forward",
    "init_adapters",
    "init_cache",
    "init_params",
    "saved_numbers",
    "logical_axes",
    "merge",
    "num_adapter_params",
    "num_params",
    "param_shardings",
    "rows_axis",
    "split_layers",
    "unembed",
    "unembed_flops",
]
