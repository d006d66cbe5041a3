"""What contestants of harness.py share: a model of the lm-evaluation-harness answers a block of questions a step."""

import importlib.metadata
import itertools
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from parent import Parent


def answer(parent: Parent, model: Any, *packages: str) -> None:
    """Blocks of the settings (`task`, `shots`, `questions`, their numbers), one a step, over and over; answers with the
    block's score."""
    settings = parent.settings
    manager = TaskManager(include_path=settings["include_path"], include_defaults=False)
    tasks = {block["task"]: None for block in settings["blocks"]}
    tasks = {name: manager.load([name])["tasks"][name] for name in tasks}
    parent.ready(lm_eval=lm_eval.__version__, **{name: importlib.metadata.version(name) for name in packages})
    for block in itertools.cycle(settings["blocks"]):
        parent.wait()
        name = block["task"]
        found: Any = lm_eval.simple_evaluate(
            model,
            tasks=[tasks[name]],
            task_manager=manager,
            num_fewshot=block["shots"],
            samples={name: block["questions"]},
            bootstrap_iters=0,
            log_samples=False,
        )
        parent.done(score=found["results"][name]["acc_norm,none"])
