"""Evaluate models on tasks of the lm-evaluation-harness, on all devices and without torch.

    python -m spin_jax.evaluate --model=DIR_OR_ID[,DIR_OR_ID...] --out=DIR
        {--suite=open_llm|paper_bbh | --tasks=NAME[:SHOTS],...} [--num_fewshot=N] [--limit=N] [--data_dir=DIR]
        [--include_path=DIR] [--apply_chat_template] [--config=FILE[:ARG]] [--config.section.field=value ...]

A model is a SPIN iteration's model directory, or any Hugging Face directory or Hub id of a supported model. The scores
of each question go to the directory, and what is there is not asked again; a table goes to stdout, where each model is
compared with the first one, and the paper's rows stand beside a suite's. It needs pip install 'spin_jax[eval]'. Exit
status: 0 done, 2 a mistake that the one line printed says how to mend, 75 stopped by a signal.
"""

from spin_jax.runtime import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()  # before what takes longer to import

from absl import flags

from spin_jax import config as config_lib
from spin_jax.errors import UserError
from spin_jax.reports.paper_tables import SUITES
from spin_jax.runtime import cli
from spin_jax.runtime.files import expand

flags.adopt_module_key_flags(cli)
_MODEL = flags.DEFINE_string(
    "model",
    None,
    "Hugging Face directories or Hub ids, with commas between them, such as an iteration's model/.",
    allow_override=True,  # mt_bench.py has one, too
)
_TASKS = flags.DEFINE_list(
    "tasks", None, "Names of the harness's tasks and groups, or patterns such as mmlu_*; with shots, as gsm8k:5."
)
_SUITE = flags.DEFINE_enum("suite", None, list(SUITES), "The tasks of a table of the paper, in place of --tasks.")
_NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "Examples before each question, for tasks without their own :SHOTS.", lower_bound=0
)
_LIMIT = flags.DEFINE_float("limit", None, "Questions of each task, the first ones; below 1 a share of them.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Copies of the tasks' data, in folders named as on the Hub.")
_INCLUDE_PATH = flags.DEFINE_string("include_path", None, "A directory with task files of one's own.")
_APPLY_CHAT_TEMPLATE = flags.DEFINE_bool("apply_chat_template", None, "Ask in the tokenizer's chat template.")
_FEWSHOT_AS_MULTITURN = flags.DEFINE_bool(
    "fewshot_as_multiturn", None, "Examples are turns of the chat, as is usual with --apply_chat_template."
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "The directory for scores.",
    allow_override=True,  # generate.py has one, too
)


def main(argv: list[str]) -> int:
    del argv
    config = evaluation_config()

    # Only now: what follows imports jax and finds the devices, which a wrong flag should not wait for.
    from spin_jax.evaluation import lm_eval
    from spin_jax.runtime import compilation_cache, multihost, preemption

    multihost.start(None, None, None)
    compilation_cache.keep()
    out = expand(_OUT.value or "")

    def run() -> None:
        table = lm_eval.evaluate(config, _models(), out)
        multihost.on_process_zero(lambda: print(table))

    return preemption.exit_status(run)


def evaluation_config() -> config_lib.Config:
    """The config of the flags; `evaluate` says what is asked.

    Raises:
        UserError: a flag is missing, flags do not go together, or the config is wrong.
    """
    cli.require(model="runs/smollm2/iteration_0/model", out="runs/evaluation")
    if _FEWSHOT_AS_MULTITURN.value and not _APPLY_CHAT_TEMPLATE.value:
        raise UserError("--fewshot_as_multiturn needs a chat: add --apply_chat_template")
    config = cli.config(optional=True)
    given = {
        "tasks": _tasks(),
        "limit": _LIMIT.value,
        "data_dir": _DATA_DIR.value,
        "include_path": _INCLUDE_PATH.value,
        "apply_chat_template": _APPLY_CHAT_TEMPLATE.value,
        "fewshot_as_multiturn": _FEWSHOT_AS_MULTITURN.value,
    }
    changes = {f"evaluate.{name}": value for name, value in given.items() if value is not None}
    config_lib.override(config, changes | {"model.path": _models()[0], "data.train": "not read"})
    frozen = config_lib.freeze(config)
    if not frozen.evaluate.tasks:
        raise UserError("--tasks and --suite are missing: add --suite=open_llm, or a task as --tasks=arc_challenge:25")
    return frozen


def _models() -> list[str]:
    return (_MODEL.value or "").split(",")


def _tasks() -> tuple[str, ...] | None:
    """`config.evaluate.tasks` of the flags, if they have it."""
    if _SUITE.value and _TASKS.value:
        raise UserError("--suite and --tasks: give one of them")
    if _SUITE.value:
        return (_SUITE.value,)
    if not _TASKS.value:
        return None
    shots = _NUM_FEWSHOT.value
    return tuple(task if shots is None or ":" in task or task in SUITES else f"{task}:{shots}" for task in _TASKS.value)


if __name__ == "__main__":
    cli.log_plainly()
    cli.run(main)
