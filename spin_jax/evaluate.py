"""Evaluate a model on tasks of the lm-evaluation-harness, on all devices and without torch.

    python -m spin_jax.evaluate --model=DIR_OR_ID --tasks=NAME,NAME --out=DIR [--num_fewshot=N] [--limit=N]
        [--include_path=DIR] [--apply_chat_template] [--config=FILE[:ARG]] [--config.section.field=value ...]

The model is a SPIN iteration's model directory, or any Hugging Face directory or Hub id of a supported model. The
harness's own results file goes to the directory, and its table to stdout. It needs pip install 'spin_jax[eval]'. Exit
status: 0 done, 2 a mistake that the one line printed says how to mend, 75 stopped by a signal.
"""

from spin_jax.runtime import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()  # before what takes longer to import

import importlib.util

from absl import flags

from spin_jax import config as config_lib
from spin_jax.errors import UserError
from spin_jax.runtime import cli
from spin_jax.runtime.files import expand, is_remote

flags.adopt_module_key_flags(cli)
_MODEL = flags.DEFINE_string("model", None, "A Hugging Face directory or Hub id, such as an iteration's model/.")
_TASKS = flags.DEFINE_list("tasks", None, "Names of the harness's tasks and groups, or patterns such as mmlu_*.")
_NUM_FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "Examples before each question; the task's own without it.")
_LIMIT = flags.DEFINE_float("limit", None, "Questions of each task, the first ones; below 1 a share of them.")
_INCLUDE_PATH = flags.DEFINE_string("include_path", None, "A directory with task files of one's own.")
_APPLY_CHAT_TEMPLATE = flags.DEFINE_bool("apply_chat_template", False, "Ask in the tokenizer's chat template.")
_FEWSHOT_AS_MULTITURN = flags.DEFINE_bool(
    "fewshot_as_multiturn", None, "Examples are turns of the chat, as is usual with --apply_chat_template."
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "The directory for the results file.",
    allow_override=True,  # generate.py has one, too
)


def main(argv: list[str]) -> int:
    del argv
    config = evaluation_config()
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("the lm-evaluation-harness is not installed: pip install 'spin_jax[eval]'")
    chat = _APPLY_CHAT_TEMPLATE.value
    as_turns = chat if _FEWSHOT_AS_MULTITURN.value is None else _FEWSHOT_AS_MULTITURN.value
    options = {"num_fewshot": _NUM_FEWSHOT.value, "limit": _LIMIT.value, "apply_chat_template": chat}

    # Only now: what follows imports jax and finds the devices, which a wrong flag should not wait for.
    from spin_jax.evaluation import harness
    from spin_jax.runtime import compilation_cache, multihost, preemption

    multihost.start(None, None, None)
    compilation_cache.keep()

    def run() -> None:
        out = expand(_OUT.value or "")
        harness.evaluate(config, _TASKS.value or [], out, _INCLUDE_PATH.value, fewshot_as_multiturn=as_turns, **options)

    return preemption.exit_status(run)


def evaluation_config() -> config_lib.Config:
    """The config of the flags, with the model's path.

    Raises:
        UserError: a flag is missing, flags do not go together, or the config is wrong.
    """
    cli.require(model="runs/smollm2/iteration_0/model", tasks="arc_challenge", out="runs/evaluation")
    if _FEWSHOT_AS_MULTITURN.value and not _APPLY_CHAT_TEMPLATE.value:
        raise UserError("--fewshot_as_multiturn needs a chat: add --apply_chat_template")
    if is_remote(_OUT.value or ""):
        raise UserError(f"--out={_OUT.value}: the harness writes to this machine's disk; give a directory")
    config = cli.config(optional=True)
    config_lib.override(config, {"model.path": _MODEL.value, "data.train": "not read"})
    return config_lib.freeze(config)


if __name__ == "__main__":
    cli.log_plainly()
    cli.run(main)
