"""How a contestant of a benchmark talks with its parent: one JSON object a line. Any Python 3.10+, no packages.

The parent's first line holds the settings. The contestant answers with what it runs on, and then makes one step, as
the benchmark has it, for every further line. It sleeps in between, so that another contestant has the machine to
itself.
"""

import json
import os
import resource
import sys
import time


class Parent:
    """The other end of stdin and stdout.

    Attributes:
        settings: `model` (a directory; where it has no weights some take random ones), the contestant's own options,
            and what there is to do. train_step.py:
            `batches` (of pairs: `prompt`, `real`, `generated`, lists of token ids), `beta`, `learning_rate`,
            `clip_norm`; step i takes batch i, and after the last one the first again, and answers with `loss` (before
            the update) and `real_logp` (mean of log p(y|x) over the real responses, in nats). sampling.py: `prompts`
            (lists of token ids), `max_new_tokens`, `stop_ids`; a step answers all prompts, and says how many `tokens`.
            harness.py: `include_path` and `blocks` (`task`, `shots`, numbers of `questions`); step i answers block i,
            and says its `score`.
    """

    def __init__(self):
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what a library prints is no answer
        self.settings = json.loads(sys.stdin.readline())

    def ready(self, **versions: object) -> None:
        """Model, data and optimizer are there; what the step runs on, and what else is constant, for the report."""
        self._answer(versions)

    def wait(self) -> None:
        """Sleep until a step is wanted; its time begins. Ends the process when no more are."""
        if not sys.stdin.readline():
            sys.exit()
        self._started = time.perf_counter(), time.process_time()

    def done(self, **facts: float) -> None:
        """The step is made; `facts` are what the benchmark wants to know of it."""
        seconds, cpu_seconds = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._answer({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_rss": peak} | facts)

    def _answer(self, message: dict) -> None:
        self._answers.write(json.dumps(message) + "\n")
