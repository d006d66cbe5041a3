"""Choose the sizes that a config leaves open, by the number, kind and memory of the devices, before any download.

These sizes change results by rounding alone: the mesh, `model.remat`, `train.micro_batches`, `train.row_length`, and
the slots of sampling. Choices rest on an estimate of bytes, which tests compare with the TPU compiler's own figures.
"""

import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from spin_jax.config import Config, flatten, replace
from spin_jax.data.bin_packing import round_up
from spin_jax.data.layouts import LAYOUTS
from spin_jax.devices import sharding
from spin_jax.devices.accelerators import CPU, Device, GiB, Slice, found, tensor_shards
from spin_jax.devices.compiler_options import compute_dtype
from spin_jax.errors import UserError, as_flag
from spin_jax.kernels import KERNELS
from spin_jax.kernels.interface import choose as choose_kernel
from spin_jax.models import ModelConfig, cache_dtype, flops_per_token, num_adapter_params, num_params, saved_numbers
from spin_jax.objectives import OBJECTIVES

_LOG = logging.getLogger(__name__)

# Fill this share of a device's memory: the estimate may miss some. If nothing fits, take what needs least, up to MISS.
SHARE, MISS = 0.93, 1.05
# Remat policies to try, the fastest first; others are not worth their memory.
POLICIES = ("mlp", "gate", "attention", "qkv", "full")
# On devices with more FLOPs in the time in which a byte is read (v6e), keeping more than "qkv" gains nothing.
FAST_MATMULS = 400
ROW_LENGTH = 1024  # tokens of a packed row with plain attention
SLOTS = 512  # for each copy of the weights; with more, reading the cache takes half of a decode step already
SLOTS_CPU = 32  # with more, a step takes longer in proportion
PREFILL = 16  # prompts for each copy of the weights: their tokens make a large matmul
PROGRAM = 0.3 * GiB  # for a step's code, and for small buffers
REFILLS = 8  # fill each slot so often, if the number of prompts is known: with fewer, most slots idle in the end


def choose(config: Config, model: ModelConfig, devices: Sequence[Device], run: bool = True) -> Config:
    """Return a copy of the config with all sizes chosen for devices, a run's or those of a described slice.

    Args:
        run: False if the model is only sampled from or scored with, so that the devices hold no f32 params.

    Raises:
        UserError: mesh and devices do not go together.
    """
    on = target(config, model, devices, run)
    data, fsdp, tensor = mesh_sizes(config, on.slice.devices, model.tensor_axes, model.hidden_size)
    changes: dict[str, int] = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
    if not config.train.row_length:
        longest = KERNELS[on.kernel].row_length if on.kernel else ROW_LENGTH
        changes["train.row_length"] = max(longest, config.train.length_multiple)
    return _choose_memory(_choose_slots(replace(config, changes), model, on), model, on)


class Target(NamedTuple):
    """Devices, and how a config is computed on them."""

    slice: Slice
    dtype: jnp.dtype  # of matmuls
    cache_dtype: jnp.dtype  # of keys and values, while sampling
    kernel: str | None  # of attention
    run: bool  # as in `choose`


def target(config: Config, model: ModelConfig, devices: Sequence[Device], run: bool = True) -> Target:
    """Return what the config is computed on. Raise as `kernels.interface.choose` does."""
    dtype = compute_dtype(config.model.compute_dtype, devices[0])
    kernel = choose_kernel(config.model.attention, devices[0], model.head_dim, dtype)
    return Target(found(devices), dtype, cache_dtype(dtype, devices[0].platform), kernel, run)


def mesh_sizes(config: Config, total: int, tensor_axes: Sequence[int] = (), hidden_size: int = 0) -> list[int]:
    """Return the sizes of `config.mesh` on so many devices, none of them -1. Raise as `sharding.mesh_sizes` does.

    Args:
        tensor_axes, hidden_size: of the model. Chosen tensor and fsdp sizes divide them. With `config.mesh.data=1`, the
            default, devices that this leaves over hold copies of the params.
    """
    data, fsdp, tensor = config.mesh.data, config.mesh.fsdp, config.mesh.tensor
    if tensor == -1 and -1 in (data, fsdp):
        tensor = tensor_shards(total, config.train.batch_size, tensor_axes)
    if (data, fsdp) == (1, -1) and total % tensor == 0:
        fsdp = math.gcd(total // tensor, hidden_size)
        data = total // (tensor * fsdp)
    elif (data, tensor) == (1, -1) and total % fsdp == 0:
        tensor = math.gcd(total // fsdp, *tensor_axes)
        data = total // (tensor * fsdp)
    return sharding.mesh_sizes(data, fsdp, tensor, total)


# ---- sampling


def _choose_slots(config: Config, model: ModelConfig, on: Target) -> Config:
    """Choose the slots of sampling: so many that the cache fills half of the memory that weights leave, up to SLOTS."""
    batch_size, prefill = config.generate.batch_size, config.generate.prefill_batch_size
    copies = on.slice.devices // _decode_shards(config, model, on)
    if not batch_size:
        slots = SLOTS_CPU if on.slice.chip.name == CPU.name else SLOTS
        if on.slice.chip.hbm_bytes:
            slots = min(slots, max(1, _slots_that_fit(config, model, on, 0.5)))
        if on.run and config.data.max_rows:  # else all of a file's prompts are answered
            asked = config.data.max_rows * config.generate.responses
            slots = min(slots, max(SLOTS_CPU, _power_of_two(asked / REFILLS / copies)))
        batch_size = slots * copies
    prefill = prefill or min(PREFILL, batch_size // copies) * copies
    return replace(config, {"generate.batch_size": batch_size, "generate.prefill_batch_size": prefill})


def _decode_shards(config: Config, model: ModelConfig, on: Target) -> int:
    """Return how many devices share a copy of the weights while sampling."""
    return sharding.decode_shards(on.slice.devices, config.mesh.decode_tensor, model.tensor_axes)


def _slots_that_fit(config: Config, model: ModelConfig, on: Target, share: float) -> int:
    """Return how many slots of a copy of the weights, a power of two, have a cache within a share of the memory that
    weights leave; 0 if they leave none."""
    room = on.slice.chip.hbm_bytes - sum(sampling_bytes(config, model, on).values())
    slots = share * room / cache_bytes(config, model, on)
    return _power_of_two(slots) if slots >= 1 else 0


def sampling_bytes(config: Config, model: ModelConfig, on: Target) -> dict[str, float]:
    """Estimate the bytes on a device while sampling, by kind and without the cache: a run's params, and the copy that
    is sampled from. One CPU also has a copy into which the files are loaded (`decode_state.DecodeSpec.by_layer`)."""
    count, held = num_params(model), {}
    if on.run:
        held["params"] = 4 * count / (config.mesh.fsdp * config.mesh.tensor)
    elif on.slice.chip.name == CPU.name and on.slice.devices == 1:
        held["loaded"] = count * on.dtype.itemsize
    return held | {"copy": count * on.dtype.itemsize / _decode_shards(config, model, on)}


def cache_bytes(config: Config, model: ModelConfig, on: Target) -> float:
    """Return the bytes of a slot's keys and values on a device."""
    tokens = config.data.max_prompt_length + config.generate.max_new_tokens
    of_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * on.cache_dtype.itemsize
    return of_token * tokens / _decode_shards(config, model, on)


def _power_of_two(number: float) -> int:
    """Return the largest power of two that is not above `number`, and at least 1."""
    return 1 << max(0, math.floor(math.log2(max(1.0, number))))


# ---- training


def _choose_memory(config: Config, model: ModelConfig, on: Target) -> Config:
    """Choose remat and micro-batches that fit: the fewest micro-batches, and with those the policy that keeps most. If
    nothing fits, choose what needs least."""
    chip, num_shards = on.slice.chip, config.mesh.data * config.mesh.fsdp
    limit = SHARE * chip.hbm_bytes
    asked, parts = config.model.remat, config.train.micro_batches
    policies = POLICIES if asked == "auto" else (asked,)
    if asked == "auto" and chip.flops and chip.flops / chip.hbm_bytes_per_second > FAST_MATMULS:
        policies = POLICIES[POLICIES.index("qkv") :]
    most = max(1, config.train.batch_size // num_shards)
    for micro_batches in [parts] if parts else [2**i for i in range(most.bit_length())]:
        for remat in policies:
            chosen = replace(config, {"model.remat": remat, "train.micro_batches": micro_batches})
            if not limit or sum(training_bytes(chosen, model, on).values()) <= limit:
                return chosen
    return chosen


def training_bytes(config: Config, model: ModelConfig, on: Target) -> dict[str, float]:
    """Estimate the bytes on a device in a training step of the longest pairs, by kind. The config has all sizes chosen.

    Params, optimizer and gradients follow from the number of params. The rest is the peak in the backward pass, as TPU
    programs have shown it: what the remat policy keeps; logits with softmax and gradient; of one layer the MLP, the
    gathered weights with those of the next layer, and the scores of plain attention.
    """
    mesh, train = config.mesh, config.train
    shards, count = mesh.fsdp * mesh.tensor, num_params(model)
    adamw = "adamw" in (train.optimizer, config.sft.optimizer if config.sft.epochs or config.sft.control else "")
    trained = num_adapter_params(model, config.lora) if config.lora.rank else count
    held = {"params": 4 * trained, "optimizer": (8 if adamw else 4) * trained}
    held["gradients"] = 4 * trained * (2 if train.micro_batches > 1 else 1)
    if config.lora.rank or config.spin.opponent == "live":
        held["frozen params"] = count * on.dtype.itemsize
    needed = {kind: size / shards for kind, size in held.items()}
    pairs = math.ceil(train.batch_size / (mesh.data * mesh.fsdp * train.micro_batches))
    prompt, real, generated = longest_pair(config)
    tokens_of = {"real": real, "generated": generated, "proto": generated}
    responses = [tokens_of.get(name, real) for name in OBJECTIVES[config.spin.loss].responses]
    of_pair = prompt + sum(responses) - len(responses)
    rows = math.ceil(pairs / max(1, train.row_length // of_pair))  # as short as they can be, and as full
    tokens = rows * round_up(math.ceil(pairs / rows) * of_pair, train.length_multiple)
    lanes = 128 if on.slice.chip.name.startswith("TPU") else 1
    kept = model.num_layers * saved_numbers(model, config.model.remat, lanes)
    needed["activations"] = tokens * (kept + 2 * model.intermediate_size) * on.dtype.itemsize / mesh.tensor
    logits = pairs * min(sum(responses), config.model.logits_chunk or math.inf) * model.vocab_size
    needed["program"] = PROGRAM
    needed["logits"] = 3 * 4 * logits / mesh.tensor
    if on.kernel is None:
        needed["scores"] = (
            3 * 4 * tokens * max(train.row_length, prompt + sum(responses)) * model.num_heads / mesh.tensor
        )
    if mesh.fsdp > 1:
        layer = flops_per_token(model, 0) / (2 * model.num_layers)  # two FLOPs for each number in its matrices
        needed["gathered weights"] = 2 * layer * on.dtype.itemsize / mesh.tensor
    return needed


def longest_pair(config: Config) -> tuple[int, int, int]:
    """Return the tokens of prompt, real and generated response of the longest pair that a config allows, in which both
    responses fill their budgets. Generated responses from the data have the budget of a human response."""
    data = config.data
    given = data.layout in LAYOUTS and LAYOUTS[data.layout].generated
    generated = data.max_length if given else config.generate.max_new_tokens
    prompt = max(1, min(data.max_prompt_length, data.max_length - generated))
    return prompt, data.max_length - prompt, min(generated, data.max_length - prompt)


def check_memory(
    config: Config, model: ModelConfig, devices: Sequence[Device], trains: bool = True, run: bool = True
) -> None:
    """Refuse a config, with all sizes chosen, for which the devices have too little memory.

    Args:
        trains: whether they must hold a training step.
        run: as in `choose`.

    Raises:
        UserError: with the arithmetic, and what would fit.
    """
    on = target(config, model, devices, run)
    limit = on.slice.chip.hbm_bytes
    stage, of_kinds = _largest_stage(config, model, on, trains)
    needed = sum(of_kinds.values())
    if not limit or needed <= SHARE * limit:
        return
    kinds = ", ".join(f"{kind} {_gib(size)}" for kind, size in of_kinds.items() if size > 0.005 * GiB)
    takes = f"{stage} takes {_gib(needed)} GiB of each ({kinds})"
    if needed <= MISS * limit:
        _LOG.warning("%s: %s by an estimate, which may be too much", describe(devices), takes)
        return
    tries = []
    if stage == "sampling" and (slots := _slots_that_fit(config, model, on, 0.8)):
        tries.append(f"--config.generate.batch_size={slots * on.slice.devices // _decode_shards(config, model, on)}")
    if trains and not config.lora.rank:
        low_rank = replace(config, {"lora.rank": 16})
        size = sum(_largest_stage(low_rank, model, on, trains)[1].values())
        if size <= SHARE * limit:
            tries.append(f"--config.lora.rank=16 with ten times the learning rate ({_gib(size)} GiB)")
    if on.slice.chip.name != CPU.name:
        tries.append(f"{on.slice.devices * math.ceil(needed / (SHARE * limit))} of these devices")
    tries.append("a smaller model, such as configs/smollm2_135m.py has")
    raise UserError(f"{describe(devices)}: too little for {config.model.path}: {takes}; try {', or '.join(tries)}")


def _largest_stage(config: Config, model: ModelConfig, on: Target, trains: bool) -> tuple[str, dict[str, float]]:
    """Return the stage that needs most memory, and its bytes on a device by kind."""
    stages = stage_bytes(config, model, on, trains)
    return max(stages.items(), key=lambda stage: sum(stage[1].values()))


def stage_bytes(config: Config, model: ModelConfig, on: Target, trains: bool = True) -> dict[str, dict[str, float]]:
    """Estimate the bytes on a device by kind: of "sampling" with its cache and, if the run `trains`, of "training"."""
    slots = config.generate.batch_size * _decode_shards(config, model, on) / on.slice.devices
    sampling = sampling_bytes(config, model, on) | {"cache": slots * cache_bytes(config, model, on)}
    return {"sampling": sampling} | ({"training": training_bytes(config, model, on)} if trains else {})


def _gib(size: float) -> str:
    return f"{size / GiB:.1f}" if size > GiB else f"{size / GiB:.2f}"


def describe(devices: Sequence[Device]) -> str:
    """Describe devices, as "8 x TPU v5e of 15.8 GiB"."""
    there = found(devices)
    memory = f" of {there.chip.hbm_bytes / GiB:.1f} GiB" if there.chip.hbm_bytes else ""
    return f"{there.devices} x {there.chip.name}{memory}"


def what(config: Config, chosen: Config) -> str:
    """Return what was chosen, as flags."""
    before = flatten(config)
    fields = (as_flag(field, value) for field, value in flatten(chosen).items() if value != before[field])
    return " ".join(fields) or "nothing was left to choose"
