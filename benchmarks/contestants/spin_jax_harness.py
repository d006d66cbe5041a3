"""This project's model of the lm-evaluation-harness as a contestant of harness.py. Option: `dtype`."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from harness_questions import answer  # noqa: E402
from parent import Parent  # noqa: E402

from spin_jax.config import Config, replace  # noqa: E402
from spin_jax.evaluation.harness import HarnessModel  # noqa: E402
from spin_jax.evaluation.loaded_model import load_model  # noqa: E402


def main() -> None:
    parent = Parent()
    config = replace(
        Config(), {"model.path": parent.settings["model"], "model.compute_dtype": parent.settings["dtype"]}
    )
    answer(parent, HarnessModel(load_model(config)), "jax", "jaxlib")


if __name__ == "__main__":
    main()
