"""Writes harness.json: what `--model hf` of the lm-evaluation-harness says to the requests of tests/harness_tasks.py.

In float64: in float32 torch's own rounding moves the log-prob of a text of 66 tokens by 1.1e-3, as much as is asked.

    PYTHONPATH=tests python tests/golden/make_harness_golden.py ASSETS SMOLLM2_DIR

needs torch, accelerate and lm-eval 0.4.13. ASSETS has data/ and lm_eval/.
"""

import json
import pathlib
import sys
import tempfile

import harness_tasks
from lm_eval.models.huggingface import HFLM


def main(assets: str, model: str) -> None:
    theirs = HFLM(pretrained=model, dtype="float64", device="cpu", batch_size=4)
    with tempfile.TemporaryDirectory() as directory:
        tasks = harness_tasks.write_tasks(pathlib.Path(assets).resolve(), pathlib.Path(directory))
        found = harness_tasks.ask(theirs, tasks)
    pathlib.Path(__file__).with_name("harness.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
