"""MT-Bench: a model's answers, and what a judge thinks of them.

    python -m spin_jax.mt_bench --model=DIR_OR_ID --model_id=NAME --data=DIR --out=DIR
        [--config=FILE[:ARG]] [--config.section.field=value ...]
    python -m spin_jax.mt_bench --judge=MODEL --models=NAME,NAME --data=DIR --out=DIR [--mode=pairwise] [--dry_run]
        [--judge_url=URL] [--key_variable=NAME] [--parallel=N] [--price_in=X --price_out=X]

The first writes OUT/model_answer/NAME.jsonl. The second asks a model behind any OpenAI-compatible endpoint, writes
OUT/model_judgment/MODEL_single.jsonl or MODEL_pair.jsonl, and prints the results; it first says what that takes, and
asks only for what is missing. DATA is a copy of FastChat's fastchat/llm_judge/data, and all files are as FastChat's.
Judging needs pip install 'spin_jax[judge]', and no device. Exit status: 0 done, 2 a mistake that the one line printed
says how to mend, 75 stopped by a signal.
"""

from spin_jax.runtime import interrupts

if __name__ == "__main__":
    interrupts.end_at_once()  # before what takes longer to import

import importlib.util
import os
import re

from absl import flags

from spin_jax import config as config_lib
from spin_jax.errors import UserError
from spin_jax.runtime import cli
from spin_jax.runtime.files import expand

OPENAI = "https://api.openai.com/v1"

flags.adopt_module_key_flags(cli)
# evaluate.py and generate.py have some of them, too: allow_override.
_MODEL = flags.DEFINE_string("model", None, "Answers: a Hugging Face directory or Hub id.", allow_override=True)
_MODEL_ID = flags.DEFINE_string("model_id", None, "Its name in the files, such as iteration_0.")
_DATA = flags.DEFINE_string("data", None, "A copy of FastChat's llm_judge/data: questions, references, judge prompts.")
_OUT = flags.DEFINE_string("out", None, "The directory of model_answer/ and model_judgment/.", allow_override=True)
_JUDGE = flags.DEFINE_string("judge", None, "Judges: a model's name, as its endpoint knows it.")
_MODELS = flags.DEFINE_list(
    "models", None, "Whose answers are judged: names in OUT/model_answer, or files; others are compared with the first."
)
_MODE = flags.DEFINE_enum("mode", "single", ["single", "pairwise"], "Ratings, or comparisons with the first model.")
_URL = flags.DEFINE_string("judge_url", OPENAI, "An endpoint that speaks /chat/completions, up to that.")
_KEY = flags.DEFINE_string("key_variable", "OPENAI_API_KEY", "The environment variable that holds the endpoint's key.")
_PARALLEL = flags.DEFINE_integer("parallel", 4, "Judgments asked for at a time.", lower_bound=1)
_PRICE_IN = flags.DEFINE_float("price_in", None, "Of a million tokens of prompts, for an estimate.", lower_bound=0)
_PRICE_OUT = flags.DEFINE_float("price_out", None, "Of a million tokens of replies.", lower_bound=0)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Say what judging takes, and the results so far; ask for nothing.")


def main(argv: list[str]) -> int:
    del argv
    config = bench_config()
    if _JUDGE.value:
        if importlib.util.find_spec("openai") is None:
            raise UserError("the client of the judge's endpoint is not installed: pip install 'spin_jax[judge]'")
        _judge(_JUDGE.value, _key())
        return 0

    # Only now: what follows imports jax and finds the devices, which a wrong flag should not wait for.
    from spin_jax.evaluation.mt_bench_answers import answer_alone
    from spin_jax.runtime import compilation_cache, multihost, preemption

    multihost.start(None, None, None)
    compilation_cache.keep()
    return preemption.exit_status(lambda: answer_alone(config, _OUT.value or "", _MODEL_ID.value or ""))


def bench_config() -> config_lib.Config:
    """The config of the flags, with the model's path and the questions; judging reads no other field.

    Raises:
        UserError: a flag is missing, flags do not go together, or the config is wrong.
    """
    if bool(_MODEL.value) == bool(_JUDGE.value):
        raise UserError("give --model=DIR_OR_ID to answer with a model, or else --judge=MODEL to judge answers")
    directories = {"data": "FastChat/fastchat/llm_judge/data", "out": "runs/mt_bench"}
    own = {"models": "sft,iteration_0"} if _JUDGE.value else {"model_id": "iteration_0"}
    cli.require(**own, **directories)
    for name in filter(None, [_MODEL_ID.value, *_names()]):
        if not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"{name!r} names a file: write it in letters, digits, '.', '-' and '_'")
    if len(set(_names())) < len(_names()):
        raise UserError(f"--models={','.join(_MODELS.value or [])}: names one twice: leave it out, or rename its file")
    if _MODE.value == "pairwise" and _JUDGE.value and len(_names()) < 2:
        raise UserError("--mode=pairwise compares models with the first of --models: name two at least")
    if (_PRICE_IN.value is None) != (_PRICE_OUT.value is None):
        raise UserError("--price_in and --price_out go together: give both, or neither")
    config = cli.config(optional=True)
    path = _MODEL.value or "not read"
    config_lib.override(config, {"model.path": path, "data.train": "not read", "evaluate.mt_bench": _DATA.value})
    return config_lib.freeze(config)


def _names() -> list[str]:
    """Of the models to be judged; of a file, its own without .jsonl."""
    return [os.path.basename(one).removesuffix(".jsonl") for one in _MODELS.value or []]


def _key() -> str:
    """The endpoint's key; "" where it may do without one.

    Raises:
        UserError: it may not, or the key is none.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*", _KEY.value or "", re.ASCII):
        raise UserError(
            "--key_variable names an environment variable, which holds the key: do not write the key itself"
        )
    key = os.environ.get(_KEY.value or "", "").strip()
    if not key and _URL.value == OPENAI and not _DRY_RUN.value:
        raise UserError(f"{OPENAI} needs a key: put it into the environment variable {_KEY.value}, or set --judge_url")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"the environment variable {_KEY.value} holds no key: it has letters that no header may have")
    return key


def _judge(model: str, key: str) -> None:
    """Ask for the judgments that are missing, and print the results."""
    from spin_jax.evaluation import judge, mt_bench
    from spin_jax.reports.summary import summary_table

    mode, out, models = _MODE.value, _OUT.value or "", _names()
    questions = mt_bench.read_questions(_DATA.value or "")
    files = [expand(one) if one.endswith(".jsonl") else mt_bench.answers_file(out, one) for one in _MODELS.value or []]
    answers = {name: mt_bench.read_answers(file, questions) for name, file in zip(models, files, strict=True)}
    matches = judge.make_matches(_DATA.value or "", questions, answers, mode)
    file = judge.judgment_file(out, model, mode)
    found, missing = judge.read_judgments(file, matches)
    prices = None if _PRICE_IN.value is None or _PRICE_OUT.value is None else (_PRICE_IN.value, _PRICE_OUT.value)
    print(f"{file}: {len(found)} judgments are there; {judge.Cost.of(missing).told(prices)}", flush=True)
    if missing and not _DRY_RUN.value:
        judge.judge_all(judge.Endpoint(_URL.value or "", model, key), missing, file, _PARALLEL.value or 1)
        found, _ = judge.read_judgments(file, matches)
    if left_out := judge.without_verdict(found):
        print(f"{left_out} of {len(found)} judgments have no verdict, and are left out")
    if found and mode == "pairwise":
        print(summary_table(mt_bench.win_table(found, models)))
    elif found:
        print(summary_table(mt_bench.score_table(questions, found, models)))


if __name__ == "__main__":
    cli.log_plainly()
    cli.run(main)
