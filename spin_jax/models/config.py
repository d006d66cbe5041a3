"""A model's architecture: a frozen, hashable description, read from and written to Hugging Face `config.json`."""

import collections
import copy
import dataclasses
import functools
import sys
from typing import Any

from spin_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class LinearRopeScaling:
    """Position interpolation: every frequency is divided by `factor` (https://arxiv.org/abs/2306.15595)."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones are left alone, those between are interpolated.

    A wavelength (in tokens) is long above `original_max_position_embeddings / low_freq_factor` and short below
    `original_max_position_embeddings / high_freq_factor`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


RopeScaling = LinearRopeScaling | Llama3RopeScaling | None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of a Llama, Mistral, Qwen2, Qwen3 or Gemma 3 decoder. Hashable, hence static under `jax.jit`.

    Attributes:
        model_type: Hugging Face's name of the family. By itself it changes no computation.
        rope_scaling: None for plain rotary embeddings.
        max_position_embeddings: longest row, in tokens, that the model was made for. It is not enforced here.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it. None: all tokens before it.
        full_attention_every: n, if the n-th, 2n-th, ... layers have no window. These rotate by rope_theta and
            rope_scaling, and the others by local_rope_theta. None: all layers are alike.
        qkv_bias: whether query, key and value projections have a bias (Qwen2).
        qk_norm: whether each head's queries and keys are RMS-normed before the rotation (Qwen3, Gemma 3).
        query_pre_attn_scalar: scores are divided by its square root. None: by that of head_dim.
        activation: of the MLP's gate: "silu", or "gelu_pytorch_tanh", which is GELU approximated with tanh.
        scale_embeddings: whether embeddings are multiplied by the square root of hidden_size (Gemma 3).
        post_norms: whether the results of attention and MLP are RMS-normed before they are added (Gemma 3).
        norm_offset: RMS norms multiply by norm_offset + scale. It is 1 in Gemma 3, whose scales start at 0.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    rope_scaling: RopeScaling = None
    sliding_window: int | None = None
    full_attention_every: int | None = None
    local_rope_theta: float | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    query_pre_attn_scalar: int | None = None
    activation: str = "silu"
    scale_embeddings: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0

    @property
    def tensor_axes(self) -> tuple[int, ...]:
        """Sizes of the axes that a mesh's tensor axis splits; its size must divide them."""
        return self.num_heads, self.num_kv_heads, self.intermediate_size, self.vocab_size

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer; None if it has none."""
        every = self.full_attention_every or self.num_layers + 1
        return tuple(None if (i + 1) % every == 0 else self.sliding_window for i in range(self.num_layers))

    @functools.cached_property
    def window_shares(self) -> dict[int | None, float]:
        """{window: share of the layers that have it}; the window None is full attention."""
        return {window: count / self.num_layers for window, count in collections.Counter(self.windows).items()}

    @property
    def furthest(self) -> int | None:
        """How many tokens the cache must hold: the window, if all layers have it. None: all tokens."""
        return None if self.full_attention_every else self.sliding_window

    @staticmethod
    def from_huggingface(config: dict[str, Any], where: str) -> "ModelConfig":
        """Read a `config.json` written by transformers 4 or 5. Missing keys have the defaults of transformers.

        Args:
            config: the parsed file.
            where: the file's name, for messages.

        Raises:
            UserError: the architecture, or an option that changes the computation, is not supported; or a value is of
                the wrong kind.
        """
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in _FAMILIES:
            hint = "; name a model of text alone" if "vision_config" in config else ""
            known = ", ".join(_FAMILIES)
            raise UserError(f"{where}: model_type={model_type!r} is not supported; supported: {known}{hint}")
        architecture, traits = _FAMILIES[model_type]
        _refuse_unsupported(config, architecture, traits.get("activation", "silu"), where)
        read = _read_by_transformers(config, where)

        def positive(key: str, kind: type = int) -> Any:
            return _positive(getattr(read, key), key, kind, where)

        sizes = {ours: positive(theirs) for ours, theirs in _SIZES.items()}
        heads, kv_heads = sizes["num_heads"], sizes["num_kv_heads"]
        head_dim = _positive(getattr(read, "head_dim", None) or sizes["hidden_size"] // heads, "head_dim", int, where)
        if head_dim % 2:
            raise UserError(f"{where}: head_dim={head_dim} is odd; rotary embeddings need an even one")
        if heads % kv_heads:
            raise UserError(f"{where}: num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}")
        rope, local_rope_theta, is_gemma = read.rope_parameters, None, model_type == "gemma3_text"
        if is_gemma:
            local_rope_theta, scaling = _rope(rope["sliding_attention"], where)
            if scaling is not None:
                raise UserError(f"{where}: scaled rotations in layers with a sliding window are not supported")
            rope = rope["full_attention"]
        rope_theta, rope_scaling = _rope(rope, where)
        if (theta := config.get("rope_theta")) not in (None, rope_theta):
            # If both are given, transformers 4 obeys the first, and transformers 5 the second.
            raise UserError(f"{where}: rope_theta={theta!r} contradicts that of rope_parameters; remove the wrong one")
        sliding_window, full_attention_every = _windows(read, is_gemma, where)
        return ModelConfig(
            model_type=model_type,
            **sizes,
            head_dim=head_dim,
            rms_norm_eps=positive("rms_norm_eps", float),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            sliding_window=sliding_window,
            full_attention_every=full_attention_every,
            local_rope_theta=local_rope_theta,
            tie_embeddings=read.tie_word_embeddings,
            query_pre_attn_scalar=positive("query_pre_attn_scalar") if is_gemma else None,
            **traits,
        )

    def to_huggingface(self, dtype: str, source: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return a `config.json` that both transformers 4 and 5 read as this model.

        Args:
            dtype: of the weights in the same directory, such as "bfloat16".
            source: the config.json of the model that training started from. Replace what describes another
                architecture, and keep all else (token ids, the user's own keys).
        """
        out = dict(source or {})
        if source is None or ModelConfig.from_huggingface(source, "source config.json") != self:
            out |= self._fields()
        # transformers 4 reads rope_theta and rope_scaling, transformers 5 rope_parameters.
        rope: dict[str, Any] = {"rope_type": "default"}
        if self.rope_scaling is not None:
            (name,) = (name for name, scaling in _ROPE_SCALINGS.items() if scaling is type(self.rope_scaling))
            rope = {"rope_type": name, **dataclasses.asdict(self.rope_scaling)}
        out["rope_theta"] = self.rope_theta
        out["rope_scaling"] = None if self.rope_scaling is None else rope
        out["rope_parameters"] = rope | {"rope_theta": self.rope_theta}
        if self.local_rope_theta is not None:
            local = {"rope_type": "default", "rope_theta": self.local_rope_theta}
            out["rope_parameters"] = {"full_attention": out["rope_parameters"], "sliding_attention": local}
            out["rope_local_base_freq"] = self.local_rope_theta
        out.pop("dtype", None)
        return out | {"torch_dtype": dtype}  # every version reads this name

    def _fields(self) -> dict[str, Any]:
        """All fields except rope and dtype, under Hugging Face's names."""
        fields = {theirs: getattr(self, ours) for ours, theirs in _SIZES.items()}
        fields |= {"model_type": self.model_type, "architectures": [_FAMILIES[self.model_type][0]]}
        fields |= {"head_dim": self.head_dim, "rms_norm_eps": self.rms_norm_eps}
        fields |= {"tie_word_embeddings": self.tie_embeddings}
        if self.model_type == "llama":
            fields |= {"attention_bias": False, "mlp_bias": False}
        else:
            fields |= {"sliding_window": self.sliding_window}
        if self.model_type in ("qwen2", "qwen3"):
            windowed = self.sliding_window is not None
            fields |= {"use_sliding_window": windowed, "max_window_layers": 0 if windowed else self.num_layers}
        if self.model_type in ("qwen2", "qwen3", "gemma3_text"):
            kinds = ["full_attention" if window is None else "sliding_attention" for window in self.windows]
            fields |= {"layer_types": kinds}
        if self.model_type == "gemma3_text":
            fields |= {"hidden_activation": self.activation, "query_pre_attn_scalar": self.query_pre_attn_scalar}
            fields |= {"sliding_window_pattern": self.full_attention_every}
        else:
            fields |= {"hidden_act": self.activation}
        return fields


# Our names of sizes -> Hugging Face's.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_position_embeddings": "max_position_embeddings",
}

# model_type -> (the Hugging Face class, what sets the family apart).
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {"qkv_bias": True}),
    "qwen3": ("Qwen3ForCausalLM", {"qk_norm": True}),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {"qk_norm": True, "post_norms": True, "norm_offset": 1.0}
        | {"scale_embeddings": True, "activation": "gelu_pytorch_tanh"},
    ),
}

_ROPE_SCALINGS = {"default": None, "linear": LinearRopeScaling, "llama3": Llama3RopeScaling}

# Options that change the computation, with the only value that is supported.
_ONLY_SUPPORTED: dict[str, Any] = {
    "attention_bias": False,  # Qwen2's bias is not an option of its config
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "is_causal": True,
    "use_mrope": False,
    "use_bidirectional_attention": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}


def _refuse_unsupported(config: dict[str, Any], architecture: str, activation: str, where: str) -> None:
    quantised = config.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise UserError(
            f"{where}: has a quantization_config ({method!r}), and quantised weights are not supported; name the model "
            "that they were made from"
        )
    for key, only in (_ONLY_SUPPORTED | {"hidden_act": activation, "hidden_activation": activation}).items():
        value = config.get(key)
        if value is not None and value != only:
            raise UserError(f"{where}: {key}={value!r} is not supported, only {only!r} is")
    kinds = config.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise UserError(f"{where}: layer_types={kinds!r} must be a list with the kind of each layer")
    architectures = config.get("architectures")
    if architectures and architectures != [architecture]:
        raise UserError(f"{where}: architectures={architectures!r} is not supported, only [{architecture!r}] is")


_TOO_MANY_LAYERS = 10_000  # layers are listed before the weights show how many there are: keep the list short


def _positive(value: Any, key: str, kind: type, where: str) -> Any:
    accepted = (int, float) if kind is float else int
    most = sys.float_info.max if kind is float else _TOO_MANY_LAYERS if key == "num_hidden_layers" else 2**31
    if isinstance(value, bool) or not isinstance(value, accepted) or not 0 < value < most:
        what = "number" if kind is float else f"integer below {most}"
        raise UserError(f"{where}: {key}={value!r} must be a positive {what}")
    return kind(value)


def _read_by_transformers(config: dict[str, Any], where: str) -> Any:
    """Let transformers read a config.json: it fills in missing keys, and translates them to those of version 5."""
    _positive(config.get("num_hidden_layers", 1), "num_hidden_layers", int, where)
    plain: dict[str, Any] = copy.deepcopy(config) | {"dtype": None, "torch_dtype": None}
    from transformers import AutoConfig

    try:
        # Give it a copy, since it changes its input, without dtypes: each stored tensor has its own.
        return AutoConfig.for_model(**plain)
    except Exception as error:  # transformers raises what it likes
        what = " ".join(str(error).split()).rpartition("Error: ")[2][:200]
        raise UserError(f"{where}: transformers does not take it ({what}); mend that value") from error


def _rope(given: dict[str, Any], where: str) -> tuple[float, RopeScaling]:
    """Read (theta, scaling) from transformers' `rope_parameters`."""
    rope = {name: value for name, value in given.items() if value is not None and name != "type"}
    theta = _positive(rope.pop("rope_theta", None), "rope_theta", float, where)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor in rope_parameters is not supported")
    name = rope.pop("rope_type", "default")
    if not isinstance(name, str) or name not in _ROPE_SCALINGS:
        raise UserError(f"{where}: rope_type={name!r} is not supported; supported: {', '.join(_ROPE_SCALINGS)}")
    scaling = _ROPE_SCALINGS[name]
    fields: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(scaling)} if scaling else {}
    if set(rope) != set(fields):
        raise UserError(f"{where}: rope_type={name!r} is given with {sorted(rope)}; expected {sorted(fields)}")
    values = {name: _positive(rope[name], f"rope_parameters.{name}", kind, where) for name, kind in fields.items()}
    if scaling is Llama3RopeScaling and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise UserError(f"{where}: rope_parameters.high_freq_factor must be greater than low_freq_factor")
    return theta, scaling(**values) if scaling else None


def _windows(read: Any, differ: bool, where: str) -> tuple[int | None, int | None]:
    """Read (sliding_window, full_attention_every).

    Args:
        differ: whether layers with a window rotate otherwise than layers without.
    """
    window = None if read.model_type == "llama" else read.sliding_window
    if window is not None:
        window = _positive(window, "sliding_window", int, where)
    alike = ["full_attention" if window is None else "sliding_attention"] * read.num_hidden_layers
    kinds = getattr(read, "layer_types", None) or alike
    full = [kind == "full_attention" for kind in kinds]
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    # Mistral's layers depend on the window alone, so layer_types must agree with it.
    if unknown or (window is None and not all(full)) or (read.model_type == "mistral" and kinds != alike):
        named = " and ".join(sorted(set(kinds)))
        raise UserError(f"{where}: layer_types of {named} with sliding_window={window!r} is not supported")
    if not differ and len(set(full)) == 1:
        return (None if full[0] else window), None
    every = (full + [True]).index(True) + 1
    if full != [(layer + 1) % every == 0 for layer in range(len(full))]:
        layers = [layer for layer, each in enumerate(full) if each]
        raise UserError(f"{where}: full attention in layers {layers} is not supported, only in every n-th, n - 1 first")
    return window, every
