"""The harness's own `hf` model as a contestant of harness.py. Options: `dtype`, `batch_size`."""

from harness_questions import answer
from lm_eval.models.huggingface import HFLM
from parent import Parent


def main() -> None:
    parent = Parent()
    options = {name: parent.settings[name] for name in ("dtype", "batch_size")}
    answer(
        parent,
        HFLM(pretrained=parent.settings["model"], device="cpu", **options),
        "torch",
        "transformers",
        "accelerate",
    )


if __name__ == "__main__":
    main()
