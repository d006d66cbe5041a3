"""Sampling alone: a response to every prompt of a file.

    python -m spin_jax.generate --config=FILE[:ARG] --prompts=FILE --out=FILE [--config.section.field=value ...]

The model is that at config.model.path: a SPIN iteration's model directory, or any Hugging Face directory or Hub id of a
supported model. A row of the prompts needs no response; a line of the file written has the prompt, the response, its
number of tokens and whether it was cut. The same command again goes on where the last one ended. Exit status: 0 done,
2 a mistake that the one line printed says how to mend, 75 stopped by a signal.
"""

from absl import flags
from ml_collections import ConfigDict

from spin_jax import command
from spin_jax import config as config_lib
from spin_jax.errors import UserError

_PROMPTS = flags.DEFINE_string("prompts", None, "The prompts: a JSONL file, or what else config.data.train may be.")
_OUT = flags.DEFINE_string("out", None, "The JSONL file to write; OUT.parts is beside it until it is whole.")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"{argv[1]!r} is not a flag: fields are changed as --config.section.field=value")
    config = sampling_config()

    # Only now: what follows imports jax and finds the devices, which a wrong flag should not wait for.
    from spin_jax import answers, hosts, stopping

    hosts.start(None, None, None)
    return stopping.exit_status(lambda: answers.answer(config, _OUT.value))


def sampling_config() -> ConfigDict:
    """The config of the flags, with the prompts in the place of its data.

    Raises:
        UserError: a flag is missing, or the config is wrong.
    """
    for flag in ("config", "prompts", "out"):
        if not flags.FLAGS[flag].present:
            raise UserError(
                f"--{flag} is missing: python -m spin_jax.generate --config=configs/base.py --prompts=prompts.jsonl "
                "--out=answers.jsonl --config.model.path=DIR"
            )
    config = command.config()
    if config.model.path == "toy:":
        raise UserError("config.model.path=toy: is made by a run: name its model, as ...=WORKDIR/iteration_0/model")
    config.data.train = _PROMPTS.value
    config_lib.validate(config)
    return config


if __name__ == "__main__":
    command.log_plainly()
    command.run(main)
