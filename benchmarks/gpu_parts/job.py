"""What the jobs of gpu.py share: their flags, the models by name, drawn pairs, the file that they write."""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import types

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402

from spin_jax.compile_check.known_models import known  # noqa: E402
from spin_jax.devices.accelerators import chip_of  # noqa: E402
from spin_jax.models import ModelConfig  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Training:
    """A step that fits 80 GB.

    Attributes:
        hub_id: whose shape it is.
        pairs: of a step; `micro_batches`: ours, in how many parts.
        peer_pairs: of a micro-batch of trl, whose rows are padded.
        lora_rank: 0 trains all weights.
    """

    hub_id: str
    pairs: int
    micro_batches: int
    peer_pairs: int
    lora_rank: int = 0


TRAININGS = {
    "135m": Training("HuggingFaceTB/SmolLM2-135M-Instruct", 64, 2, 8),
    "1b": Training("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 64, 4, 4),
    "7b": Training("alignment-handbook/zephyr-7b-sft-full", 16, 2, 2, lora_rank=16),
}
TINY = {"vocab_size": 256, "hidden_size": 48, "intermediate_size": 64, "num_layers": 2, "head_dim": 8}


def parse_flags(*names: str) -> argparse.Namespace:
    """gpu.py's flags to a job; `names` are positional."""
    parser = argparse.ArgumentParser()
    for name in names:
        parser.add_argument(name)
    for name in ("--size", "--platform", "--peer_python"):
        parser.add_argument(name, default="")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    flags = parser.parse_args()
    flags.on_gpu = flags.platform.startswith("cuda")
    return flags


def write(flags: argparse.Namespace, found: dict) -> None:
    """What is known so far; a job that fails later leaves this."""
    flags.out.write_text(json.dumps(found))


def shape(hub_id: str, size: str) -> ModelConfig:
    """The model, or a tiny one with its kind of layers and heads."""
    model = known(hub_id)
    if size == "full":
        return model
    groups = model.num_heads // model.num_kv_heads
    return dataclasses.replace(model, **TINY, num_heads=2 * groups, num_kv_heads=2)


def write_shape(model: ModelConfig, directory: str) -> None:
    """A Hugging Face directory without weights, and with a tokenizer that has no words."""
    import tokenizers
    import transformers

    config = model.to_huggingface("float32")
    pathlib.Path(directory, "config.json").write_text(json.dumps(config))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(directory)


def draw_pairs(pairs: int, vocabulary: int, size: str) -> list[dict[str, list[int]]]:
    """Token ids of pairs with the lengths of packed_step.py, a guess at UltraChat's; the longest first, so that those
    of like length come together where they are padded."""
    import packed_step

    lengths = packed_step.draw(packed_step.load_config("h100-8,code"), pairs)
    rng, shrink = np.random.default_rng(0), 1 if size == "full" else 32
    drawn = [
        {
            name: rng.integers(2, vocabulary, max(2, length // shrink)).tolist()
            for name, length in zip(("prompt", "real", "generated"), one, strict=True)
        }
        for one in lengths
    ]
    return sorted(drawn, key=lambda pair: -len(pair["prompt"]) - max(len(pair["real"]), len(pair["generated"])))


def peak_flops(kind: str, on_gpu: bool) -> float | None:
    """FLOP/s in bfloat16 of a device of that kind, where it is known."""
    device = types.SimpleNamespace(platform="gpu" if on_gpu else "cpu", device_kind=kind, memory_stats=dict)
    return chip_of(device).flops or None


def worker_arguments(flags: argparse.Namespace) -> types.SimpleNamespace:
    """What `contest.Worker` takes, for the contestants of a job."""
    return types.SimpleNamespace(platform=flags.platform, threads=os.cpu_count(), peer_python=flags.peer_python)
