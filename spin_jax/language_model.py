"""A model opened: its description, its tokenizer, and how it computes on both meshes; without its weights."""

import logging
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from spin_jax import checkpoints, models
from spin_jax.config import Config
from spin_jax.data.chat_format import ChatFormat, load_chat
from spin_jax.devices import sharding
from spin_jax.devices.accelerators import Device
from spin_jax.models.execution import make_decode_execution, make_execution
from spin_jax.runtime import multihost

_LOG = logging.getLogger(__name__)


class LanguageModel(NamedTuple):
    """A model in the hands of a config, without its weights."""

    source: epath.Path  # its directory, with its tokenizer
    model: models.ModelConfig
    chat: ChatFormat
    execution: models.Execution  # on the training mesh
    decode: models.Execution  # on the decode mesh


def on_both_meshes(
    config: Config, model: models.ModelConfig, devices: Sequence[Device] | None = None
) -> tuple[models.Execution, models.Execution]:
    """How a model computes on the training mesh and on the decode mesh of a config of `sizing.choose`.

    Args:
        devices: of both meshes; None is all there are.

    Raises:
        UserError: config, model and devices do not go together.
    """
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    execution = make_execution(config.model, model, mesh)
    decode = make_decode_execution(config.mesh, model, execution)
    sharding.check_batch(decode.mesh, "--config.generate.batch_size", config.generate.batch_size)
    models.param_shardings(decode.mesh, model)
    return execution, decode


def open_language_model(config: Config, path: str) -> LanguageModel:
    """The model at `path`, a directory or Hub id, and how it computes on the devices that there are; the config is one
    of `sizing.choose`.

    Raises:
        UserError: it is not there or not supported, has no usable tokenizer, or cannot sample on these devices.
    """
    source = multihost.on_each_process(lambda: epath.Path(checkpoints.resolve(path, config.model.revision or None)))
    model = multihost.on_each_process(lambda: checkpoints.read_config(source))
    execution, decode = on_both_meshes(config, model)
    chat = multihost.on_each_process(
        lambda: load_chat(
            pathlib.Path(source),
            config.data.template,
            parse_special_tokens=config.data.parse_special_tokens,
            vocab_size=model.vocab_size,
        )
    )
    settings = config.generate
    if settings.responses > 1 and (settings.temperature == 0 or settings.top_k == 1):
        _LOG.warning(
            "--config.generate.responses=%d, but sampling is greedy: the responses to a prompt are all the same; set "
            "--config.generate.temperature=1.0, or --config.generate.responses=1",
            settings.responses,
        )
    return LanguageModel(source, model, chat, execution, decode)
