"""All fields of a config, each in one place: default, unit, reason, what it may be, whether it may change on resume.
Those of the sections that train a model are in `training.py`.

A section is a frozen dataclass; a function takes the one that it reads. `python -m spin_jax.config` lists the fields.
Sizes of "auto", 0 or -1 are left to the devices (spin_jax/sizing.py). The defaults are the paper's where the paper has
a value (arXiv 2401.01335, section 6.1 and appendix B).
"""

import dataclasses

from spin_jax.config.fields import CONTENT, FREE, LENGTH, Field, above, at_least, field
from spin_jax.config.training import LoraConfig, SftConfig, SpinConfig, TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The SFT model and how it computes. (`models.ModelConfig` is its architecture.)"""

    path: str = field(
        "",
        "The SFT model, or a PEFT adapter of it: a Hugging Face directory or Hub id; 'toy:' makes a tiny one.",
        resume=CONTENT,
    )
    revision: str = field("", "Hub revision: a branch, tag or commit; '' is the default branch.", resume=CONTENT)
    compute_dtype: str = field(
        "auto",
        "Of activations and matmuls, which add up in float32. 'auto' is bfloat16 where the device has instructions for "
        "it (devices/compiler_options.py).",
        choices=("auto", "float32", "bfloat16"),
    )
    attention: str = field(
        "auto",
        "Kernel for whole rows: 'plain' jax.numpy, 'tiled' for CPUs, 'flash' for TPUs, 'cudnn' for GPUs, 'tokamax' for "
        "Hopper GPUs (with the extra of that name). All but the plain one never hold a row's scores [length, length]. "
        "'auto' is the platform's, but never tokamax, which we have not timed.",
        choices=("auto", "plain", "spin_jax.kernels:KERNELS"),
        resume=FREE,
    )
    remat: str = field(
        "auto",
        "What the backward pass finds in memory (models.REMAT_POLICIES). 'full' recomputes most and needs least; "
        "'auto': what there is room for.",
        choices=("auto", "none", "full", "qkv", "attention", "gate", "mlp", "projections"),
        resume=FREE,
    )
    logits_chunk: int = field(
        0,
        "Response positions whose logits are held at a time; 0 is all. Smaller: less memory, more kernel launches.",
        bounds=at_least(0),
        resume=FREE,
    )
    export_dtype: str = field(
        "float32",
        "Dtype of the exported weights, which are also the next opponent. bfloat16 rounds away most of what a learning "
        "rate of 1e-7 changes.",
        choices=("float32", "bfloat16"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The SFT examples and what of them becomes prompt and response."""

    train: str = field("", "JSONL, JSON, Parquet, a directory, a Hub id, 'tfds:NAME' or 'toy:'.", resume=CONTENT)
    split: str = field("train", "Split of a Hub, TFDS or saved data set.", resume=CONTENT)
    layout: str = field(
        "auto",
        "Which columns a row has (docs/data.md). 'auto' tells it from each row's columns.",
        choices=("auto", "spin_jax.data.layouts:LAYOUTS"),
        resume=CONTENT,
    )
    turn: str = field(
        "last",
        "'last': all turns before the last answer are the prompt. 'first': the first user turn and its answer (the "
        "paper).",
        choices=("last", "first"),
    )
    template: str = field(
        "chat",
        "'chat': the tokenizer's template for sampling and training. 'paper': Alpaca-style prompts to sample from, and "
        "Zephyr's template to train with.",
        choices=("chat", "paper"),
    )
    parse_special_tokens: bool = field(
        False,
        "Read the name of a special token in a row's text, such as '</s>', as that token: for data that has a "
        "template's own tokens in its text. Else it is text like any other, and cannot end a response.",
    )
    max_rows: int = field(
        0,
        "Rows to train on, drawn with the seed (smaller sets nest in larger ones); 0 is all. The paper: 50,000.",
        bounds=at_least(0),
    )
    eval_rows: int = field(0, "Rows held out of training, for reward accuracy and margin.", bounds=at_least(0))
    max_length: int = field(
        1024,
        "Tokens of prompt and response together. The released code's; the paper says 2,048.",
        bounds=at_least(2, LENGTH),
    )
    max_prompt_length: int = field(512, "Tokens of a prompt.", bounds=at_least(1, LENGTH))
    long_prompts: str = field(
        "keep_end",
        "A prompt over its budget: 'keep_end' cuts its beginning (the released code), 'skip' leaves the row out.",
        choices=("keep_end", "skip"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Where the generated responses come from, and how they are sampled."""

    source: str = field(
        "opponent",
        "'opponent': it writes them here (but for those of iteration 0 that the data have). 'data': in every iteration "
        "those of the data, such as the rejected ones of preferences. 'external': another program writes them, "
        "see docs/baselines.md.",
        choices=("opponent", "data", "external"),
    )
    temperature: float = field(
        1.0,
        "y' ~ p_t needs 1 (equation 4.1); 0 is greedy, as the released generate.py.",
        bounds=at_least(0),
        decodes=True,
    )
    top_p: float = field(1.0, "Nucleus sampling; 1 is off.", bounds=above(0, 1), decodes=True)
    top_k: int = field(0, "Tokens that are drawn from; 0 is all.", bounds=at_least(0), decodes=True)
    max_new_tokens: int = field(
        256, "Tokens of a response. The released code's cap.", bounds=at_least(1, LENGTH), decodes=True
    )
    min_new_tokens: int = field(
        0, "Tokens before which no response ends by itself.", bounds=at_least(0, LENGTH), decodes=True
    )
    stop_strings: tuple[str, ...] = field(
        (), "Texts that end a response as well, such as ('###',). It ends there, and counts as truncated.", decodes=True
    )
    responses: int = field(
        1,
        "Responses to each prompt; in a run each makes a pair with the human one.",
        bounds=at_least(1, 128),  # sampling.MAX_RESPONSES
    )
    batch_size: int = field(
        0,
        "Slots: responses decoded at a time, over all devices. One that ends gives its slot to the next prompt. The "
        "more, the less often weights are read for a token; the cache is what fills the memory. 0: chosen by its size.",
        bounds=at_least(0, LENGTH),
        resume=FREE,
    )
    prefill_batch_size: int = field(
        0,
        "Prompts prefilled at a time, rounded up to the devices. More are a larger matmul, and more memory beside the "
        "cache. 0: 16 for each copy of the weights.",
        bounds=at_least(0, LENGTH),
        resume=FREE,
    )
    tail_batch_size: int = field(
        8,
        "Slots a device down to which they are halved when no prompt is left. Each size is a compiled program, and "
        "with fewer slots a step is mostly the reading of weights, which stays.",
        bounds=at_least(1, LENGTH),
        resume=FREE,
    )
    prompt_bucket: int = field(
        64,
        "Tokens that prompts are padded to, or a double of it; one compiled program each.",
        bounds=at_least(1, LENGTH),
        resume=FREE,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices split the work."""

    data: int = field(1, "Devices that hold copies of the params and split the batch.", resume=FREE)
    fsdp: int = field(-1, "Devices that split params, optimizer state and the batch; -1: all that remain.", resume=FREE)
    tensor: int = field(
        -1,
        "Devices that split heads, MLP and vocabulary. -1: one, but more where devices would not have two pairs of a "
        "batch each, or one each on up to eight devices.",
        resume=FREE,
    )
    slice: str = field(
        "",
        "The slice that the config is for, such as v5e-16 (devices/accelerators.py): a run on other devices is "
        "refused. A config's argument sets it, with the sizes above. '': any devices.",
        resume=FREE,
    )
    decode_tensor: int = field(
        -1,
        "The same while sampling, whose mesh has no fsdp; -1: as many as divide devices and model, at most 8.",
        resume=FREE,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What the models of a run are measured by."""

    evaluators: tuple[str, ...] = field(
        ("auto",),
        "Names in evaluation.EVALUATORS. 'auto': what costs little and the data allow.",
        choices=("auto", "spin_jax.evaluation:EVALUATORS"),
        resume=FREE,
    )
    every: int = field(
        1,
        "Iterations from one model that evaluators of much cost (lm_eval, mt_bench) measure to the next. The starting "
        "model and the last one are always measured.",
        bounds=at_least(1),
        resume=FREE,
    )
    tasks: tuple[str, ...] = field(
        (),
        "What lm_eval asks: tasks of the lm-evaluation-harness, as 'arc_challenge:25' with 25 examples before each "
        "question, or a table of the paper, 'open_llm' or 'paper_bbh'.",
        resume=FREE,
    )
    limit: float = field(
        0.0,
        "Questions of each task, the first ones; 0 is all, and below 1 a share of them. The paper's: all.",
        bounds=at_least(0),
        resume=FREE,
    )
    data_dir: str = field(
        "",
        "Local copies of the tasks' data, in folders of their names on the Hub, such as allenai/ai2_arc.",
        resume=FREE,
    )
    include_path: str = field("", "A directory with task files of one's own for the harness.", resume=FREE)
    apply_chat_template: bool = field(
        False, "Ask tasks in the tokenizer's chat template. The paper does not.", resume=FREE
    )
    fewshot_as_multiturn: bool = field(
        True, "Examples before a question are turns of the chat, where tasks are asked in one.", resume=FREE
    )
    mt_bench: str = field(
        "",
        "A copy of FastChat's llm_judge/data, with the questions that the evaluator 'mt_bench' answers.",
        resume=FREE,
    )
    mt_bench_tokens: int = field(
        1024, "Tokens of an answer to them. FastChat's cap.", bounds=at_least(1, LENGTH), resume=FREE
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """The made task of configs/quickstart.py; read only where `model.path` and `data.train` are "toy:"."""

    train_rows: int = field(512, "SFT examples of the toy task.", bounds=at_least(1))
    eval_prompts: int = field(128, "Unseen prompts on which its exact measures are taken.", bounds=at_least(1))
    hidden_size: int = field(64, "Width of its tiny Llama.", bounds=at_least(1, 2**14))
    num_layers: int = field(2, "Depth of its tiny Llama.", bounds=at_least(1, 2**10))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All of it: what one command is given."""

    seed: int = field(42, "Responses and the order of data are functions of it. The authors' seed.", bounds=at_least(0))
    iterations: int = field(
        4,
        "T of Algorithm 1. The paper's gains shrink to +0.19 points at the fourth.",
        bounds=at_least(1, 1000),
        resume=FREE,
    )
    model: ModelSection = ModelSection()
    data: DataConfig = DataConfig()
    sft: SftConfig = SftConfig()
    generate: GenerateConfig = GenerateConfig()
    spin: SpinConfig = SpinConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    mesh: MeshConfig = MeshConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    toy: ToyConfig = ToyConfig()


def _fields(section: type, prefix: str = "") -> dict[str, Field]:
    """{"section.name": its Field}, in the order in which they stand above."""
    found = {}
    for one in dataclasses.fields(section):
        name = prefix + one.name
        found |= {name: one.metadata["field"]} if one.metadata else _fields(type(one.default), f"{name}.")
    return found


FIELDS = _fields(Config)
