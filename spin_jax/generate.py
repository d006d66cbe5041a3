"""Sampling alone: a response to every prompt of a file.

    python -m spin_jax.generate --config=FILE[:ARG] --prompts=FILE --out=FILE [--config.section.field=value ...]

The model is that at config.model.path: a SPIN iteration's model directory, or any Hugging Face directory or Hub id of a
supported model. A row of the prompts needs no response; a line of the file written has the prompt, the response, its
number of tokens and whether it was truncated. The same command again goes on where the last one ended. Exit status: 0
done, 2 a mistake that the one line printed says how to mend, 75 stopped by a signal.
"""

from spin_jax.runtime import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()  # before what takes longer to import


from absl import flags

from spin_jax import config as config_lib
from spin_jax.errors import UserError
from spin_jax.runtime import cli

flags.adopt_module_key_flags(cli)
_PROMPTS = flags.DEFINE_string("prompts", None, "The prompts: a JSONL file, or what else --config.data.train may be.")
_OUT = flags.DEFINE_string("out", None, "The JSONL file to write; OUT.parts is beside it until it is whole.")


def main(argv: list[str]) -> int:
    del argv
    config = sampling_config()

    # Only now: what follows imports jax and finds the devices, which a wrong flag should not wait for.
    from spin_jax.generation import batch_inference
    from spin_jax.runtime import multihost, preemption

    multihost.start(None, None, None)
    return preemption.exit_status(lambda: batch_inference.answer(config, _OUT.value or ""))


def sampling_config() -> config_lib.Config:
    """The config of the flags, with the prompts in the place of its data.

    Raises:
        UserError: a flag is missing, or the config is wrong.
    """
    cli.require(config="configs/base.py", prompts="prompts.jsonl", out="answers.jsonl")
    config = cli.config()
    if config_lib.flatten(config)["model.path"] == "toy:":
        raise UserError(
            '--config.model.path="toy:" is made by a run: name the run\'s model, as '
            "--config.model.path=WORKDIR/iteration_0/model"
        )
    # The model answers, also where a run of this config would take the data's responses.
    config_lib.override(config, {"data.train": _PROMPTS.value, "generate.source": "opponent"})
    return config_lib.freeze(config)


if __name__ == "__main__":
    cli.log_plainly()
    cli.run(main)
