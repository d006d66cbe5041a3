"""The Llama family: descriptions, and pure functions on params."""

from spin_jax.models.config import ModelConfig
from spin_jax.models.execution import REMAT_POLICIES, Execution, saved_numbers
from spin_jax.models.flops import flops_per_token, num_params, unembed_flops
from spin_jax.models.kv_cache import EMPTY_POSITION, Columns, cache_dtype, columns_axis, init_cache, rows_axis
from spin_jax.models.llama import forward, unembed
from spin_jax.models.lora import (
    Dropout,
    abstract_adapters,
    adapter_shardings,
    adapter_weights,
    attach,
    init_adapters,
    merge,
    num_adapter_params,
)
from spin_jax.models.params import (
    abstract_params,
    cast_params,
    init_params,
    logical_axes,
    param_shardings,
    split_layers,
)
