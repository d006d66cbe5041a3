"""The sections of a config that say how a model is trained: fields as in `schema.py`."""

import dataclasses
import math

from spin_jax.config.fields import BY_ITERATION, FREE, LENGTH, above, at_least, field

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of a block


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning: before iteration 0, and as the control of each iteration.

    Batch size, clipping, warm-up and weight decay of both are those of `train`.
    """

    epochs: float = field(
        0.0,
        "Passes of supervised fine-tuning before iteration 0; 0 where model.path is an SFT model already.",
        bounds=at_least(0, 10_000),
    )
    optimizer: str = field(
        "adamw",
        "'adamw', as the paper's SFT model was trained, or 'rmsprop', as in SPIN's own iterations.",
        choices=("spin_jax.training:OPTIMIZERS",),
    )
    learning_rate: float = field(
        2e-5, "Peak. The alignment handbook's value for the paper's SFT model.", bounds=above(0, 1)
    )
    loss_on: str = field(
        "response",
        "What is learned, before iteration 0 and in the control: 'response', the tokens of the answer alone, or 'all', "
        "those of the prompt too (the alignment handbook's, which the paper's SFT model was made with).",
        choices=("response", "all"),
    )
    control: bool = field(
        False,
        "Also continue plain SFT from the same start, for the FLOPs that SPIN spends: a baseline of each iteration.",
        resume=FREE,
    )
    control_learning_rate: float = field(
        2e-5, "Peak of that baseline. Tune it as well as SPIN's before comparing.", bounds=above(0, 1)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpinConfig:
    """The objective of an iteration, and the pairs it sees."""

    loss: str = field(
        "logistic",
        "The objective: one of objectives.OBJECTIVES. The paper's choice.",
        choices=("spin_jax.objectives:OBJECTIVES",),
    )
    beta: tuple[float, ...] = field(
        (0.1,), "Lambda of equation 4.7, an entry an iteration.", bounds=above(0), resume=BY_ITERATION
    )
    nll_weight: float = field(
        0.0,
        "Weight of the real response's -log p(y|x) / |y|, in nats a token, beside any loss but sft's. It holds up "
        "log p(y), which a margin lets fall; arXiv 2404.19733 takes 1.",
        bounds=at_least(0, 1e6),
    )
    label_smoothing: float = field(
        0.0,
        "Of 'cdpo' and 'robust': share of the pairs taken to be the wrong way round. Below 0.5, where pairs would say "
        "nothing.",
        bounds=at_least(0, 0.49),
    )
    noise_ratio: float = field(
        1.0,
        "Of 'space': its mu, how much generated responses count against real ones. The paper's.",
        bounds=above(0, 1e6),
    )
    history_weight: tuple[float, ...] = field(
        (0.0, 0.1),
        "Of 'tspin': weight of the generated response against that of theta_0, an entry an iteration. The paper's.",
        bounds=at_least(0, 1e6),
        resume=BY_ITERATION,
    )
    opponent_share: float = field(
        1.0,
        "Alpha of the reference alpha log p_t + (1 - alpha) log p_0, a geometric mixture of the opponent and theta_0 "
        "(alpha-SPIN, arXiv 2404.04291). 1 is SPIN; less costs a scoring pass, and keeps the policy nearer to theta_0.",
        bounds=at_least(0, 1),
    )
    opponent: str = field(
        "stored",
        "'stored': the opponent's log-probs are computed before training, by the step's own program. 'live': in every "
        "step, with its params kept on the devices.",
        choices=("stored", "live"),
    )
    previous_iterations: int = field(
        1,
        "How many earlier iterations' pairs are mixed in. The paper: the newest and the previous.",
        bounds=at_least(0),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimization, in every training stage."""

    epochs: float = field(2.0, "Passes over the pairs in an iteration. The paper's.", bounds=above(0, 10_000))
    match_flops: str = field(
        "",
        "A finished run's workdir: each iteration takes as many steps as spend that run's FLOPs, whatever `epochs` "
        "says, so that two objectives are compared at equal cost. '': `epochs` decides.",
    )
    batch_size: int = field(64, "Pairs an optimizer step, over all devices. The paper's.", bounds=at_least(1, LENGTH))
    micro_batches: int = field(
        0,
        "Gradient accumulation: parts that a batch's rows are cut into, one after the other. 0: as few as fit.",
        bounds=at_least(0, LENGTH),
        resume=FREE,
    )
    learning_rate: tuple[float, ...] = field(
        (5e-7,), "Peak, an entry an iteration.", bounds=above(0, 1), resume=BY_ITERATION
    )
    warmup_ratio: float = field(
        0.1,
        "Share of the steps in linear warm-up. RMSProp's first steps are ten times too large without.",
        bounds=at_least(0, 1),
    )
    optimizer: str = field(
        "rmsprop",
        "'rmsprop' with torch's semantics (the paper), or 'adamw'.",
        choices=("spin_jax.training:OPTIMIZERS",),
    )
    weight_decay: float = field(0.0, "Of adamw only. The paper uses none.", bounds=at_least(0))
    clip_norm: float = field(
        1.0,
        "Largest global norm of a gradient. The Hugging Face Trainer's default, which the released code keeps.",
        bounds=above(0, 1e30),
    )
    row_length: int = field(
        0,
        "Tokens of a packed row, about. The longer, the fuller; on GPUs attention also computes what no token sees, "
        "which long rows have more of. 0: 4,096 where a kernel skips that (TPUs), else 1,024.",
        bounds=at_least(0, LENGTH),
        resume=FREE,
    )
    length_multiple: int = field(
        128,
        "Tokens that a row's length is a multiple of. Half of it is lost in each row on average.",
        bounds=at_least(1, LENGTH),
        resume=FREE,
    )
    row_shapes: int = field(
        3,
        "Shapes that a stage's batches have at most, chosen so that they need the fewest slots in all; each is a "
        "compiled program. With 3 in the place of 12, rows are 2% emptier (benchmarks/README.md), a minute in an hour; "
        "nine programs of a 7B model compile for ten minutes or more.",
        bounds=at_least(1, LENGTH),
        resume=FREE,
    )
    checkpoint_every: int = field(
        100,
        "Steps between checkpoints within an iteration: at worst about two minutes of work lost on the paper's "
        "hardware.",
        bounds=at_least(1),
        resume=FREE,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank updates (LoRA) of the linear layers of attention and MLP, in every training stage, in place of full
    fine-tuning; each iteration's are merged into its model, and kept beside it as an adapter of PEFT.

    They want about ten times the learning rate: the alignment handbook's DPO recipes for zephyr-7b have 5e-6 with LoRA
    (rank 16, alpha 16) and 5e-7 without.
    """

    rank: int = field(
        0,
        "Rank of low-rank updates, which want ten times the learning rate; 0: full fine-tuning.",
        bounds=at_least(0, 2**14),
    )
    alpha: float = field(
        16.0, "Updates count alpha / rank times, so that another rank needs no other learning rate.", bounds=above(0)
    )
    use_rslora: bool = field(
        False,
        "Updates count alpha / sqrt(rank) times instead (rsLoRA, arXiv 2312.03732), which a large rank needs to learn "
        "as much as a small one.",
    )
    dropout: float = field(
        0.0,
        "Share of the numbers of an update's input that a training step sets to 0, the others growing for it; never in "
        "scoring, sampling or evaluation. 0: PEFT's default; an iteration makes few passes over its pairs.",
        bounds=at_least(0, 0.99),
    )
    target_modules: tuple[str, ...] = field(
        LINEAR_LAYERS,
        "Linear layers with an update, by Hugging Face's names. All of them: it takes all to match full fine-tuning "
        "(arXiv 2305.14314, section 4).",
        choices=LINEAR_LAYERS,
    )

    @property
    def scale(self) -> float:
        """How many times updates count."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)
