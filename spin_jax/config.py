"""The schema of a run: every field with its unit and its reason, and the checks that refuse a wrong one in one line.

A file under `configs/` starts from `base_config()` and changes what it needs. Fields that may differ between
iterations are tuples: entry t is for iteration t and the last entry serves all later ones. Sizes of "auto", 0 or -1 are
left to the devices (spin_jax/auto.py).
"""

from collections.abc import Mapping

from ml_collections import ConfigDict

from spin_jax.errors import UserError, as_flag
from spin_jax.fields import check_field, check_names

STAGES = ("generate", "score", "train")  # of an iteration, in order; main and self_play can run some of them alone


def base_config() -> ConfigDict:
    """All fields with their defaults. The defaults are the paper's where the paper has a value (arXiv 2401.01335,
    section 6.1 and appendix B)."""
    c = ConfigDict()
    c.seed = 42  # the authors' seed; responses and data order are functions of it
    c.iterations = 4  # T of Algorithm 1; the paper's gains shrink to +0.19 points at the fourth

    c.model = ConfigDict()
    c.model.path = ""  # SFT model: Hugging Face directory or Hub id; "toy:" makes a tiny one
    c.model.revision = ""  # Hub revision (branch, tag or commit); "" is the default branch
    # of activations and matmuls, which add up in float32: "float32" | "bfloat16" | "auto", which is bfloat16, but on a
    # CPU without instructions for it (xla.compute_dtype)
    c.model.compute_dtype = "auto"
    # attention of whole rows: "plain" jax.numpy | "tiled", for CPUs | "flash", a TPU kernel | "cudnn", a GPU kernel |
    # "tokamax", for Hopper GPUs, with the extra of that name | "auto": the platform's, but never tokamax, which we have
    # not timed; all but the plain one never hold a row's scores [length, length]
    c.model.attention = "auto"
    # what the backward pass finds in memory, see models.compute.REMAT_POLICIES; "full" recomputes most and needs least;
    # "auto": what there is room for
    c.model.remat = "auto"
    # response positions whose logits are held at a time; 0 is all (smaller: less memory, more kernel launches)
    c.model.logits_chunk = 0
    # dtype of the exported weights, which are also the next opponent: bfloat16 rounds away most of what lr 1e-7
    # changes
    c.model.export_dtype = "float32"

    c.data = ConfigDict()
    c.data.train = ""  # JSONL, JSON, Parquet, directory, Hub id, "tfds:NAME" or "toy:"
    c.data.split = "train"  # split of a Hub, TFDS or saved data set
    # "messages" | "conversations" | "prompt_response" | "alpaca" | "pairs" | "auto" (from each row's columns)
    c.data.layout = "auto"
    # "last": all turns before the last answer are the prompt; "first": first user turn and its answer (the paper)
    c.data.turn = "last"
    # "chat": the tokenizer's template for both; "paper": Alpaca-style generation prompt and Zephyr training template
    c.data.template = "chat"
    # whether the name of a special token in a row's text, such as "</s>", is that token: for data that has a template's
    # own tokens in its text. Else it is text like any other, and cannot end a response
    c.data.parse_special_tokens = False
    # rows to train on, drawn with the seed (smaller sets nest in larger); 0 is all (the paper: 50,000)
    c.data.max_rows = 0
    c.data.eval_rows = 0  # rows held out of training for reward accuracy and margin
    c.data.max_length = 1024  # tokens of prompt and response together (the released code; the paper says 2,048)
    c.data.max_prompt_length = 512  # tokens of a prompt
    # a prompt over its budget: "keep_end" cuts its beginning (the released code), "skip" leaves the row out
    c.data.long_prompts = "keep_end"

    # Batch size, clipping, warm-up and weight decay of both SFT stages are those of c.train.
    c.sft = ConfigDict()
    c.sft.epochs = 0.0  # passes of supervised fine-tuning before iteration 0; 0 when model.path is an SFT model already
    c.sft.optimizer = "adamw"  # as the paper's SFT model was trained; "rmsprop" as in SPIN's own iterations
    c.sft.learning_rate = 2e-5  # peak; the alignment handbook's value for the paper's SFT model
    # also continue plain SFT from the same start for the FLOPs that SPIN spends, as a baseline beside every iteration
    c.sft.control = False
    c.sft.control_learning_rate = 2e-5  # peak of that baseline; tune it as well as SPIN's before comparing

    c.generate = ConfigDict()
    c.generate.temperature = 1.0  # y' ~ p_t needs 1.0 (equation 4.1); 0 is greedy, as the released generate.py
    c.generate.top_p = 1.0  # nucleus sampling; 1 is off
    c.generate.top_k = 0  # tokens; 0 is off
    c.generate.max_new_tokens = 256  # the released code's cap
    c.generate.min_new_tokens = 0  # no response ends by itself before it is this long
    # texts that end a response as well, such as ("###",); it is cut there and counts as cut, not as ended by itself
    c.generate.stop_strings = ()
    c.generate.responses = 1  # to each prompt; in a run each makes a pair with the human one
    # slots: responses decoded at a time, over all devices; one that ends gives its slot to the next prompt. The more,
    # the less often weights are read for a token; the cache is what fills the memory; 0: chosen by its size
    c.generate.batch_size = 0
    # prompts prefilled at a time, rounded up to the devices: more are a larger matmul and more memory beside the cache;
    # 0: 16 for each copy of the weights
    c.generate.prefill_batch_size = 0
    # when no prompt is left the slots are halved, down to so many a device; each size is a compiled program, and with
    # fewer slots a step is mostly the reading of weights, which stays
    c.generate.tail_batch_size = 8
    # prompts are padded to this many tokens, or a double of it; one compiled program each
    c.generate.prompt_bucket = 64

    c.spin = ConfigDict()
    c.spin.loss = "logistic"  # one of losses.LOSSES; the paper's choice
    c.spin.beta = (0.1,)  # lambda of equation 4.7, one entry an iteration
    # "stored": the opponent's log-probs computed before training, by the step's own program; "live": in every step,
    # with its params kept on the devices
    c.spin.opponent = "stored"
    c.spin.previous_iterations = 1  # how many earlier iterations' pairs are mixed in (the paper: newest + previous)

    c.train = ConfigDict()
    c.train.epochs = 2.0  # passes over the pairs per iteration (the paper)
    c.train.batch_size = 64  # pairs an optimizer step, over all devices (the paper)
    # gradient accumulation: the batch's rows are cut into this many parts, one after the other; 0: as few as fit
    c.train.micro_batches = 0
    c.train.learning_rate = (5e-7,)  # peak, one entry an iteration
    # share of the steps in linear warm-up; RMSProp's first steps are ten times too large without
    c.train.warmup_ratio = 0.1
    c.train.optimizer = "rmsprop"  # "rmsprop" with torch's semantics (the paper) | "adamw"
    c.train.weight_decay = 0.0  # adamw only; the paper uses none
    c.train.clip_norm = 1.0  # global gradient norm; the HF Trainer's default, which the released code keeps
    # Pairs share rows, about this many tokens long. The longer, the fuller; on GPUs attention computes what no token
    # sees, too, which long rows have more of. 0: 4,096 where a kernel skips what no token sees (TPUs), else 1,024.
    c.train.row_length = 0
    # a batch's rows are as short as its pairs and the shapes below allow, and a multiple of this many tokens long: half
    # of it is lost in each row on average
    c.train.length_multiple = 128
    # shapes that a stage's batches have at most, chosen so that they need the fewest slots in all; each is a compiled
    # program. With 3 in the place of 12 rows are 2% emptier (benchmarks/README.md), which is a minute in an hour; nine
    # programs of a 7B model compile for ten minutes or more
    c.train.row_shapes = 3
    # steps between Orbax checkpoints within an iteration; about two minutes of work lost at worst on the paper's
    # hardware
    c.train.checkpoint_every = 100

    # Low-rank updates (LoRA) of all linear layers of attention and MLP in place of full fine-tuning, in every training
    # stage; each iteration's are merged into its model. They want about ten times the learning rate: the alignment
    # handbook's DPO recipes for zephyr-7b have 5e-6 with LoRA (rank 16, alpha 16) and 5e-7 without.
    c.lora = ConfigDict()
    c.lora.rank = 0  # of each update; 0: full fine-tuning
    c.lora.alpha = 16.0  # updates count alpha / rank times, so that another rank needs no other learning rate

    c.mesh = ConfigDict()
    c.mesh.data = 1  # devices that hold copies of the params and split the batch
    c.mesh.fsdp = -1  # devices that split params, optimizer state and the batch; -1: all that remain
    # devices that split heads, MLP and vocabulary; -1: as few as leave each device two pairs of a batch
    c.mesh.tensor = -1
    # the same while sampling, whose mesh has no fsdp; -1: as many as divide devices and model, at most 8
    c.mesh.decode_tensor = -1

    c.toy = ConfigDict()  # the made task of configs/quickstart.py; read only where model.path and data.train are "toy:"
    c.toy.train_rows = 512  # SFT examples
    c.toy.eval_prompts = 128  # unseen prompts on which the exact measures are taken
    c.toy.hidden_size = 64  # width of the tiny Llama
    c.toy.num_layers = 2  # depth of the tiny Llama
    return c.lock()


def at_iteration(values: tuple, iteration: int):
    """The entry of a per-iteration tuple for `iteration`: the last one serves all later iterations."""
    return values[min(iteration, len(values) - 1)]


def flatten(config: ConfigDict) -> dict[str, object]:
    """{"section.field": value} of a config, in schema order; tuples stay whole."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat.update({f"{name}.{inner}": v for inner, v in flatten(value).items()})
        else:
            flat[name] = value
    return flat


def override(config: ConfigDict, changes: Mapping[str, object]) -> None:
    """Set fields by their dotted names, such as {"train.batch_size": 8}.

    Where a field has one value an iteration, a list or a number alone will do.

    Raises:
        UserError: no such field, or no such value of it; `validate` judges what goes together.
    """
    schema = flatten(base_config())
    check_names(changes, schema)
    values = {field: _like(schema[field], value) for field, value in changes.items()}
    for field, value in values.items():
        check_field(field, value, schema[field])
    config.update_from_flattened_dict(values)


def _like(default: object, value: object) -> object:
    if isinstance(default, tuple) and isinstance(value, (list, int, float)) and not isinstance(value, bool):
        return tuple(value) if isinstance(value, list) else (value,)
    return value


def validate(config: ConfigDict) -> None:
    """Refuse what cannot run, before anything is loaded. Needs no device and imports no jax.

    Raises:
        UserError: one line with the field, its value and what to write instead.
    """
    schema, given = flatten(base_config()), flatten(config)
    check_names(given, schema)
    if missing := [field for field in schema if field not in given]:
        raise UserError(f"--config.{missing[0]} is missing: start the config from spin_jax.config.base_config()")
    for field, value in given.items():
        check_field(field, value, schema[field])
    _check_data(config)
    _check_sampling(config.generate, config.data.max_prompt_length)
    _check_training(config)
    _check_mesh(config.mesh)


def _check_data(config: ConfigDict) -> None:
    path, data = config.model.path, config.data
    for field, value in (("model.path", path), ("data.train", data.train)):
        if not value:
            raise UserError(f"--config.{field} is empty: name one, as --config.{field}=PATH")
    if (path == "toy:") != (data.train == "toy:"):
        raise UserError(
            f"{as_flag('model.path', path)} and {as_flag('data.train', data.train)} must both be toy:, or neither: "
            "they share a tokenizer"
        )
    if path == "toy:" and not config.sft.epochs:
        raise UserError("--config.sft.epochs=0 leaves the toy model untrained: write --config.sft.epochs=5")
    if path == "toy:" and config.lora.rank:
        raise UserError(
            f"--config.lora.rank={config.lora.rank} cannot train the toy model, which starts from random weights: "
            "write --config.lora.rank=0"
        )
    if data.max_prompt_length >= data.max_length:
        raise UserError(
            f"--config.data.max_prompt_length={data.max_prompt_length} leaves no room for a response in "
            f"--config.data.max_length={data.max_length}: lower the one, or raise the other"
        )


def _check_sampling(generate: ConfigDict, max_prompt_length: int) -> None:
    if not all(generate.stop_strings):
        raise UserError(
            f"{as_flag('generate.stop_strings', generate.stop_strings)} has an empty text, which would end every "
            "response: leave it out"
        )
    if generate.min_new_tokens > generate.max_new_tokens:
        raise UserError(
            f"--config.generate.min_new_tokens={generate.min_new_tokens} is more than "
            f"--config.generate.max_new_tokens={generate.max_new_tokens}: lower it"
        )
    if generate.prompt_bucket > max(64, 2 * max_prompt_length):
        raise UserError(
            f"--config.generate.prompt_bucket={generate.prompt_bucket} pads every prompt to so many tokens, where "
            f"--config.data.max_prompt_length={max_prompt_length}: lower it"
        )


def _check_training(config: ConfigDict) -> None:
    train, sft = config.train, config.sft
    if train.warmup_ratio == 1:
        raise UserError("--config.train.warmup_ratio=1 must be below 1: it is a share of the steps")
    if train.micro_batches > train.batch_size:
        raise UserError(
            f"--config.train.micro_batches={train.micro_batches} cannot cut --config.train.batch_size="
            f"{train.batch_size} pairs into so many parts: lower it"
        )
    if 0 < train.row_length < train.length_multiple:
        raise UserError(
            f"--config.train.length_multiple={train.length_multiple} is more than --config.train.row_length="
            f"{train.row_length}, of which rows are about as long: lower it"
        )
    optimizers = {"train.optimizer": train.optimizer}
    if sft.epochs or sft.control:
        optimizers["sft.optimizer"] = sft.optimizer
    for field, optimizer in optimizers.items():
        if train.weight_decay and optimizer == "rmsprop":
            raise UserError(
                f"--config.train.weight_decay={train.weight_decay} works with adamw only, not with --config.{field}="
                "rmsprop: set the one to 0, or the other to adamw"
            )


def _check_mesh(mesh: ConfigDict) -> None:
    sizes = [mesh.data, mesh.fsdp, mesh.tensor]
    if mesh.decode_tensor < 1 and mesh.decode_tensor != -1:
        raise UserError(f"--config.mesh.decode_tensor={mesh.decode_tensor} must be at least 1, or -1: found for you")
    if any(size < 1 and size != -1 for size in sizes) or mesh.data == mesh.fsdp == -1:
        raise UserError(
            f"--config.mesh.data={mesh.data} --config.mesh.fsdp={mesh.fsdp} --config.mesh.tensor={mesh.tensor}: each "
            "is a number of devices, at least 1, or -1: found for you, but of data and fsdp one at most"
        )
