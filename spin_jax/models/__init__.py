"""The Llama family: configs, pure functions on params, Hugging Face directories in and out."""

from spin_jax.models.config import ModelConfig
from spin_jax.models.huggingface import load, read_config, resolve, save
from spin_jax.models.llama import (
    REMAT_POLICIES,
    abstract_params,
    flops_per_token,
    for_compute,
    forward,
    init_cache,
    init_params,
    logical_axes,
    num_params,
    unembed,
    unembed_flops,
)

__all__ = [
    "REMAT_POLICIES",
    "ModelConfig",
    "abstract_params",
    "flops_per_token",
    "for_compute",
    "forward",
    "init_cache",
    "init_params",
    "load",
    "logical_axes",
    "num_params",
    "read_config",
    "resolve",
    "save",
    "unembed",
    "unembed_flops",
]
