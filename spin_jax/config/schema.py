"""All fields of a config, each in one place: default, unit, reason, what it may be, whether it may change on resume.

    python -m spin_jax.config

prints them. Sizes of "auto", 0 or -1 are left to the devices (spin_jax/sizing.py).
"""

import textwrap

from spin_jax.config.fields import BY_ITERATION, CONTENT, FREE, LENGTH, Field, above, at_least
from spin_jax.errors import as_flag

# The defaults are the paper's where the paper has a value (arXiv 2401.01335, section 6.1 and appendix B).
FIELDS: dict[str, Field] = {
    "seed": Field(42, "Responses and the order of data are functions of it. The authors' seed.", bounds=at_least(0)),
    "iterations": Field(
        4,
        "T of Algorithm 1. The paper's gains shrink to +0.19 points at the fourth.",
        bounds=at_least(1, 1000),
        resume=FREE,
    ),
    "model.path": Field(
        "", "The SFT model: a Hugging Face directory or Hub id; 'toy:' makes a tiny one.", resume=CONTENT
    ),
    "model.revision": Field("", "Hub revision: a branch, tag or commit; '' is the default branch.", resume=CONTENT),
    "model.compute_dtype": Field(
        "auto",
        "Of activations and matmuls, which add up in float32. 'auto' is bfloat16 where the device has instructions for "
        "it (devices/compiler_options.py).",
        choices=("auto", "float32", "bfloat16"),
    ),
    "model.attention": Field(
        "auto",
        "Kernel for whole rows: 'plain' jax.numpy, 'tiled' for CPUs, 'flash' for TPUs, 'cudnn' for GPUs, 'tokamax' for "
        "Hopper GPUs (with the extra of that name). All but the plain one never hold a row's scores [length, length]. "
        "'auto' is the platform's, but never tokamax, which we have not timed.",
        choices=("auto", "plain", "tiled", "flash", "cudnn", "tokamax"),
        resume=FREE,
    ),
    "model.remat": Field(
        "auto",
        "What the backward pass finds in memory (models.REMAT_POLICIES). 'full' recomputes most and needs least; "
        "'auto': what there is room for.",
        choices=("auto", "none", "full", "qkv", "attention", "gate", "mlp", "projections"),
        resume=FREE,
    ),
    "model.logits_chunk": Field(
        0,
        "Response positions whose logits are held at a time; 0 is all. Smaller: less memory, more kernel launches.",
        bounds=at_least(0),
        resume=FREE,
    ),
    "model.export_dtype": Field(
        "float32",
        "Dtype of the exported weights, which are also the next opponent. bfloat16 rounds away most of what a learning "
        "rate of 1e-7 changes.",
        choices=("float32", "bfloat16"),
    ),
    "data.train": Field("", "JSONL, JSON, Parquet, a directory, a Hub id, 'tfds:NAME' or 'toy:'.", resume=CONTENT),
    "data.split": Field("train", "Split of a Hub, TFDS or saved data set.", resume=CONTENT),
    "data.layout": Field(
        "auto",
        "Which columns a row has (docs/data.md). 'auto' tells it from each row's columns.",
        choices=("auto", "messages", "conversations", "prompt_response", "alpaca", "pairs"),
        resume=CONTENT,
    ),
    "data.turn": Field(
        "last",
        "'last': all turns before the last answer are the prompt. 'first': the first user turn and its answer (the "
        "paper).",
        choices=("last", "first"),
    ),
    "data.template": Field(
        "chat",
        "'chat': the tokenizer's template for sampling and training. 'paper': Alpaca-style prompts to sample from, and "
        "Zephyr's template to train with.",
        choices=("chat", "paper"),
    ),
    "data.parse_special_tokens": Field(
        False,
        "Read the name of a special token in a row's text, such as '</s>', as that token: for data that has a "
        "template's own tokens in its text. Else it is text like any other, and cannot end a response.",
    ),
    "data.max_rows": Field(
        0,
        "Rows to train on, drawn with the seed (smaller sets nest in larger ones); 0 is all. The paper: 50,000.",
        bounds=at_least(0),
    ),
    "data.eval_rows": Field(0, "Rows held out of training, for reward accuracy and margin.", bounds=at_least(0)),
    "data.max_length": Field(
        1024,
        "Tokens of prompt and response together. The released code's; the paper says 2,048.",
        bounds=at_least(2, LENGTH),
    ),
    "data.max_prompt_length": Field(512, "Tokens of a prompt.", bounds=at_least(1, LENGTH)),
    "data.long_prompts": Field(
        "keep_end",
        "A prompt over its budget: 'keep_end' cuts its beginning (the released code), 'skip' leaves the row out.",
        choices=("keep_end", "skip"),
    ),
    # Batch size, clipping, warm-up and weight decay of both SFT stages are those of "train".
    "sft.epochs": Field(
        0.0,
        "Passes of supervised fine-tuning before iteration 0; 0 where model.path is an SFT model already.",
        bounds=at_least(0, 10_000),
    ),
    "sft.optimizer": Field(
        "adamw",
        "'adamw', as the paper's SFT model was trained, or 'rmsprop', as in SPIN's own iterations.",
        choices=("adamw", "rmsprop"),
    ),
    "sft.learning_rate": Field(
        2e-5, "Peak. The alignment handbook's value for the paper's SFT model.", bounds=above(0, 1)
    ),
    "sft.control": Field(
        False,
        "Also continue plain SFT from the same start, for the FLOPs that SPIN spends: a baseline of each iteration.",
        resume=FREE,
    ),
    "sft.control_learning_rate": Field(
        2e-5, "Peak of that baseline. Tune it as well as SPIN's before comparing.", bounds=above(0, 1)
    ),
    "generate.temperature": Field(
        1.0,
        "y' ~ p_t needs 1 (equation 4.1); 0 is greedy, as the released generate.py.",
        bounds=at_least(0),
        decodes=True,
    ),
    "generate.top_p": Field(1.0, "Nucleus sampling; 1 is off.", bounds=above(0, 1), decodes=True),
    "generate.top_k": Field(0, "Tokens that are drawn from; 0 is all.", bounds=at_least(0), decodes=True),
    "generate.max_new_tokens": Field(
        256, "Tokens of a response. The released code's cap.", bounds=at_least(1, LENGTH), decodes=True
    ),
    "generate.min_new_tokens": Field(
        0, "Tokens before which no response ends by itself.", bounds=at_least(0, LENGTH), decodes=True
    ),
    "generate.stop_strings": Field(
        (),
        "Texts that end a response as well, such as ('###',). It is cut there, and counts as cut.",
        decodes=True,
    ),
    "generate.responses": Field(
        1,
        "Responses to each prompt; in a run each makes a pair with the human one.",
        bounds=at_least(1, 128),  # sampling.MAX_RESPONSES
    ),
    "generate.batch_size": Field(
        0,
        "Slots: responses decoded at a time, over all devices. One that ends gives its slot to the next prompt. The "
        "more, the less often weights are read for a token; the cache is what fills the memory. 0: chosen by its size.",
        bounds=at_least(0, LENGTH),
        resume=FREE,
    ),
    "generate.prefill_batch_size": Field(
        0,
        "Prompts prefilled at a time, rounded up to the devices. More are a larger matmul, and more memory beside the "
        "cache. 0: 16 for each copy of the weights.",
        bounds=at_least(0, LENGTH),
        resume=FREE,
    ),
    "generate.tail_batch_size": Field(
        8,
        "Slots a device down to which they are halved when no prompt is left. Each size is a compiled program, and "
        "with fewer slots a step is mostly the reading of weights, which stays.",
        bounds=at_least(1, LENGTH),
        resume=FREE,
    ),
    "generate.prompt_bucket": Field(
        64,
        "Tokens that prompts are padded to, or a double of it; one compiled program each.",
        bounds=at_least(1, LENGTH),
        resume=FREE,
    ),
    "spin.loss": Field(
        "logistic",
        "The objective: one of objectives.OBJECTIVES. The paper's choice.",
        choices="spin_jax.objectives:OBJECTIVES",
    ),
    "spin.beta": Field((0.1,), "Lambda of equation 4.7, an entry an iteration.", bounds=above(0), resume=BY_ITERATION),
    "spin.opponent": Field(
        "stored",
        "'stored': the opponent's log-probs are computed before training, by the step's own program. 'live': in every "
        "step, with its params kept on the devices.",
        choices=("stored", "live"),
    ),
    "spin.previous_iterations": Field(
        1,
        "How many earlier iterations' pairs are mixed in. The paper: the newest and the previous.",
        bounds=at_least(0),
    ),
    "train.epochs": Field(2.0, "Passes over the pairs in an iteration. The paper's.", bounds=above(0, 10_000)),
    "train.batch_size": Field(
        64, "Pairs an optimizer step, over all devices. The paper's.", bounds=at_least(1, LENGTH)
    ),
    "train.micro_batches": Field(
        0,
        "Gradient accumulation: parts that a batch's rows are cut into, one after the other. 0: as few as fit.",
        bounds=at_least(0, LENGTH),
        resume=FREE,
    ),
    "train.learning_rate": Field((5e-7,), "Peak, an entry an iteration.", bounds=above(0, 1), resume=BY_ITERATION),
    "train.warmup_ratio": Field(
        0.1,
        "Share of the steps in linear warm-up. RMSProp's first steps are ten times too large without.",
        bounds=at_least(0, 1),
    ),
    "train.optimizer": Field(
        "rmsprop", "'rmsprop' with torch's semantics (the paper), or 'adamw'.", choices=("rmsprop", "adamw")
    ),
    "train.weight_decay": Field(0.0, "Of adamw only. The paper uses none.", bounds=at_least(0)),
    "train.clip_norm": Field(
        1.0,
        "Largest global norm of a gradient. The Hugging Face Trainer's default, which the released code keeps.",
        bounds=above(0, 1e30),
    ),
    "train.row_length": Field(
        0,
        "Tokens of a packed row, about. The longer, the fuller; on GPUs attention also computes what no token sees, "
        "which long rows have more of. 0: 4,096 where a kernel skips that (TPUs), else 1,024.",
        bounds=at_least(0, LENGTH),
        resume=FREE,
    ),
    "train.length_multiple": Field(
        128,
        "Tokens that a row's length is a multiple of. Half of it is lost in each row on average.",
        bounds=at_least(1, LENGTH),
        resume=FREE,
    ),
    "train.row_shapes": Field(
        3,
        "Shapes that a stage's batches have at most, chosen so that they need the fewest slots in all; each is a "
        "compiled program. With 3 in the place of 12, rows are 2% emptier (benchmarks/README.md), a minute in an hour; "
        "nine programs of a 7B model compile for ten minutes or more.",
        bounds=at_least(1, LENGTH),
        resume=FREE,
    ),
    "train.checkpoint_every": Field(
        100,
        "Steps between checkpoints within an iteration: at worst about two minutes of work lost on the paper's "
        "hardware.",
        bounds=at_least(1),
        resume=FREE,
    ),
    # Low-rank updates (LoRA) of all linear layers of attention and MLP in place of full fine-tuning, in every training
    # stage; each iteration's are merged into its model. They want about ten times the learning rate: the alignment
    # handbook's DPO recipes for zephyr-7b have 5e-6 with LoRA (rank 16, alpha 16) and 5e-7 without.
    "lora.rank": Field(
        0,
        "Rank of low-rank updates, which want ten times the learning rate; 0: full fine-tuning.",
        bounds=at_least(0, 2**14),
    ),
    "lora.alpha": Field(
        16.0, "Updates count alpha / rank times, so that another rank needs no other learning rate.", bounds=above(0)
    ),
    "mesh.data": Field(1, "Devices that hold copies of the params and split the batch.", resume=FREE),
    "mesh.fsdp": Field(
        -1, "Devices that split params, optimizer state and the batch; -1: all that remain.", resume=FREE
    ),
    "mesh.tensor": Field(
        -1,
        "Devices that split heads, MLP and vocabulary. -1: one, but more where devices would not have two pairs of a "
        "batch each, or one each on up to eight devices.",
        resume=FREE,
    ),
    "mesh.slice": Field(
        "",
        "The slice that the config is for, such as v5e-16 (devices/accelerators.py): a run on other devices is "
        "refused. A config's argument sets it, with the sizes above. '': any devices.",
        resume=FREE,
    ),
    "mesh.decode_tensor": Field(
        -1,
        "The same while sampling, whose mesh has no fsdp; -1: as many as divide devices and model, at most 8.",
        resume=FREE,
    ),
    # The made task of configs/quickstart.py; read only where model.path and data.train are "toy:".
    "toy.train_rows": Field(512, "SFT examples of the toy task.", bounds=at_least(1)),
    "toy.eval_prompts": Field(128, "Unseen prompts on which its exact measures are taken.", bounds=at_least(1)),
    "toy.hidden_size": Field(64, "Width of its tiny Llama.", bounds=at_least(1, 2**14)),
    "toy.num_layers": Field(2, "Depth of its tiny Llama.", bounds=at_least(1, 2**10)),
}


def listing() -> str:
    """Every field as the flag that sets its default, with its documentation, its words and its bounds."""
    return "\n\n".join(f"{as_flag(name, field.default)}\n{_described(field)}" for name, field in FIELDS.items())


def _described(field: Field) -> str:
    text = field.doc
    if words := field.words():
        text += f" One of {', '.join(words)}."
    if field.bounds:
        lowest, highest, inclusive = field.bounds
        text += f" {'At least' if inclusive else 'Above'} {lowest}, at most {highest:,}."
    if field.resume == FREE:
        text += " May change on resume."
    return textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="    ")
