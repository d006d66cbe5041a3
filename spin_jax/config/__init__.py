"""The config of a run: written as an `ml_collections.ConfigDict`, read as a frozen `Config`.

A file under `configs/` starts from `base_config()` and changes what it needs; flags change it further. `freeze` refuses
what cannot run, in one line, and everything after it takes the frozen section that it reads. Fields that may differ
between iterations are tuples: entry t is for iteration t and the last entry serves all later ones.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from spin_jax.config.fields import check_names
from spin_jax.config.schema import (
    FIELDS,
    Config,
    DataConfig,
    EvaluateConfig,
    GenerateConfig,
    MeshConfig,
    ModelSection,
    ToyConfig,
)
from spin_jax.config.training import LoraConfig, SftConfig, SpinConfig, TrainConfig
from spin_jax.errors import UserError, as_flag

STAGES = ("generate", "score", "train")  # of an iteration, in order; main and self_play can run some of them alone


def base_config() -> ConfigDict:
    """A config of all fields of `schema.FIELDS` with their defaults, to be changed."""
    return ConfigDict(dataclasses.asdict(Config())).lock()


def at_iteration(values: Sequence[Any], iteration: int) -> Any:
    """The entry of a per-iteration tuple for `iteration`: the last one serves all later iterations."""
    return values[min(iteration, len(values) - 1)]


def flatten(config: ConfigDict | Config) -> dict[str, Any]:
    """{"section.field": value} of a config; tuples stay whole."""
    flat = {}
    for name, value in (dataclasses.asdict(config) if isinstance(config, Config) else config.to_dict()).items():
        flat |= {f"{name}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def replace(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy with other values, by their dotted names, such as {"train.batch_size": 8}. They are not checked."""
    return _build({**flatten(config), **changes})


def _build(values: Mapping[str, Any]) -> Config:
    top = {name: value for name, value in values.items() if "." not in name}
    for one in dataclasses.fields(Config):
        if dataclasses.is_dataclass(one.default):
            prefix = f"{one.name}."
            mine = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
            top[one.name] = type(one.default)(**mine)
    return Config(**top)


def override(config: ConfigDict, changes: Mapping[str, object]) -> None:
    """Set fields by their dotted names, such as {"train.batch_size": 8}.

    Where a field has one value an iteration, a list or a number alone will do.

    Raises:
        UserError: no such field, or no such value of it; `freeze` judges what goes together.
    """
    check_names(changes, FIELDS)
    values = {name: _like(FIELDS[name].default, value) for name, value in changes.items()}
    for name, value in values.items():
        FIELDS[name].check(name, value)
    config.update_from_flattened_dict(values)


def _like(default: object, value: object) -> object:
    if isinstance(default, tuple) and isinstance(value, (list, int, float)) and not isinstance(value, bool):
        return tuple(value) if isinstance(value, list) else (value,)
    return value


def freeze(config: ConfigDict | Config) -> Config:
    """The config as everything reads it. What cannot run is refused here, before anything is loaded: this needs no
    device and imports no jax.

    Raises:
        UserError: one line with the field, its value and what to write instead.
    """
    given = flatten(config)
    check_names(given, FIELDS)
    if missing := [name for name in FIELDS if name not in given]:
        raise UserError(f"--config.{missing[0]} is missing: start the config from spin_jax.config.base_config()")
    for name, value in given.items():
        FIELDS[name].check(name, value)
    frozen = _build(given)
    _check_data(frozen)
    _check_sampling(frozen.generate, frozen.data.max_prompt_length)
    _check_training(frozen)
    _check_mesh(frozen.mesh)
    return frozen


def _check_data(config: Config) -> None:
    path, data = config.model.path, config.data
    for field, value in (("model.path", path), ("data.train", data.train)):
        if not value:
            raise UserError(f"--config.{field} is empty: name one, as --config.{field}=PATH")
    if (path == "toy:") != (data.train == "toy:"):
        raise UserError(
            f"{as_flag('model.path', path)} and {as_flag('data.train', data.train)} must both be toy:, or neither: "
            "they share a tokenizer"
        )
    if path == "toy:" and not config.sft.epochs:
        raise UserError("--config.sft.epochs=0 leaves the toy model untrained: write --config.sft.epochs=5")
    if path == "toy:" and config.lora.rank:
        raise UserError(
            f"--config.lora.rank={config.lora.rank} cannot train the toy model, which starts from random weights: "
            "write --config.lora.rank=0"
        )
    if data.max_prompt_length >= data.max_length:
        raise UserError(
            f"--config.data.max_prompt_length={data.max_prompt_length} leaves no room for a response in "
            f"--config.data.max_length={data.max_length}: lower the one, or raise the other"
        )


def _check_sampling(generate: GenerateConfig, max_prompt_length: int) -> None:
    if not all(generate.stop_strings):
        raise UserError(
            f"{as_flag('generate.stop_strings', generate.stop_strings)} has an empty text, which would end every "
            "response: leave it out"
        )
    if generate.source == "data" and generate.responses > 1:
        raise UserError(
            f"--config.generate.responses={generate.responses} has no effect with --config.generate.source=data, "
            "which takes the one generated response of each row: write --config.generate.responses=1"
        )
    if generate.min_new_tokens > generate.max_new_tokens:
        raise UserError(
            f"--config.generate.min_new_tokens={generate.min_new_tokens} is more than "
            f"--config.generate.max_new_tokens={generate.max_new_tokens}: lower it"
        )
    if generate.prompt_bucket > max(64, 2 * max_prompt_length):
        raise UserError(
            f"--config.generate.prompt_bucket={generate.prompt_bucket} pads every prompt to so many tokens, where "
            f"--config.data.max_prompt_length={max_prompt_length}: lower it"
        )


def _check_training(config: Config) -> None:
    train, sft = config.train, config.sft
    if not config.lora.target_modules:
        raise UserError(
            "--config.lora.target_modules=() updates nothing: name linear layers, as "
            f"{as_flag('lora.target_modules', ('q_proj', 'v_proj'))}, or train all weights with --config.lora.rank=0"
        )
    if train.warmup_ratio == 1:
        raise UserError("--config.train.warmup_ratio=1 must be below 1: it is a share of the steps")
    if train.micro_batches > train.batch_size:
        raise UserError(
            f"--config.train.micro_batches={train.micro_batches} cannot cut --config.train.batch_size="
            f"{train.batch_size} pairs into so many parts: lower it"
        )
    if 0 < train.row_length < train.length_multiple:
        raise UserError(
            f"--config.train.length_multiple={train.length_multiple} is more than --config.train.row_length="
            f"{train.row_length}, of which rows are about as long: lower it"
        )
    optimizers = {"train.optimizer": train.optimizer}
    if sft.epochs or sft.control:
        optimizers["sft.optimizer"] = sft.optimizer
    for field, optimizer in optimizers.items():
        if train.weight_decay and optimizer == "rmsprop":
            raise UserError(
                f"--config.train.weight_decay={train.weight_decay} works with adamw only, not with --config.{field}="
                "rmsprop: set the one to 0, or the other to adamw"
            )


def _check_mesh(mesh: MeshConfig) -> None:
    sizes = [mesh.data, mesh.fsdp, mesh.tensor]
    if mesh.decode_tensor < 1 and mesh.decode_tensor != -1:
        raise UserError(f"--config.mesh.decode_tensor={mesh.decode_tensor} must be at least 1, or -1: found for you")
    if any(size < 1 and size != -1 for size in sizes) or mesh.data == mesh.fsdp == -1:
        raise UserError(
            f"--config.mesh.data={mesh.data} --config.mesh.fsdp={mesh.fsdp} --config.mesh.tensor={mesh.tensor}: each "
            "is a number of devices, at least 1, or -1: found for you, but of data and fsdp one at most"
        )


def as_json(config: Config) -> dict[str, Any]:
    """Flat, with tuples as JSON has them."""
    return json.loads(json.dumps(flatten(config)))
