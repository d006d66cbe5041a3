"""What a model is: one frozen, hashable description, read from and written to Hugging Face `config.json`."""

import dataclasses
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
    """The architecture of a Llama, Mistral, Qwen2 or Qwen3 decoder. Hashable, hence static under `jax.jit`.

    Attributes:
        model_type: "llama", "mistral", "qwen2" or "qwen3": names the Hugging Face class, and changes nothing by itself.
        rope_scaling: None for plain rotary embeddings.
        sliding_window: every layer lets a token see itself and the `sliding_window - 1` tokens before it; None: all.
        qkv_bias: query, key and value projections have a bias (Qwen2).
        qk_norm: queries and keys are RMS-normed per head before the rotation (Qwen3).
        max_position_embeddings: the longest row, in tokens, that the model was made for. Nothing here enforces it.
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
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def tensor_axes(self) -> tuple[int, ...]:
        """Sizes of the axes that a mesh's tensor axis splits, and so must divide."""
        return self.num_heads, self.num_kv_heads, self.intermediate_size, self.vocab_size

    @staticmethod
    def from_huggingface(config: dict[str, Any], where: str) -> "ModelConfig":
        """Reads a `config.json` written by transformers 4 or 5; a missing key means what it means to transformers.

        Args:
            config: the parsed file.
            where: the file's name, for messages.

        Raises:
            UserError: an architecture or option that is not supported and would change the computation, or a value of
                the wrong kind. Nothing that matters is ignored.
        """
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in _FAMILIES:
            raise UserError(f"{where}: model_type={model_type!r} is not supported; supported: {', '.join(_FAMILIES)}")
        family = _FAMILIES[model_type]
        _refuse_unsupported(config, family["architecture"], where)

        def positive(key: str, kind: type = int) -> Any:
            return _positive(config.get(key, family.get(key)), key, kind, where)

        hidden_size, num_heads = positive("hidden_size"), positive("num_attention_heads")
        # Absent means the class's default; null means "derive it", as transformers does.
        head_dim = config.get("head_dim", family.get("head_dim"))
        kv_heads = config.get("num_key_value_heads", family.get("num_key_value_heads"))
        if head_dim is None and hidden_size % num_heads:
            raise UserError(
                f"{where}: hidden_size={hidden_size} is no multiple of num_attention_heads={num_heads}; set head_dim"
            )
        head_dim = _positive(hidden_size // num_heads if head_dim is None else head_dim, "head_dim", int, where)
        kv_heads = _positive(num_heads if kv_heads is None else kv_heads, "num_key_value_heads", int, where)
        if head_dim % 2:
            raise UserError(f"{where}: head_dim={head_dim} is odd; rotary embeddings need an even one")
        if num_heads % kv_heads:
            raise UserError(
                f"{where}: num_attention_heads={num_heads} is no multiple of num_key_value_heads={kv_heads}"
            )

        max_positions = positive("max_position_embeddings")
        rope_theta, rope_scaling = _rope(config, max_positions, where)
        return ModelConfig(
            model_type=model_type,
            vocab_size=positive("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=positive("intermediate_size"),
            num_layers=positive("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=positive("rms_norm_eps", float),
            rope_theta=rope_theta,
            max_position_embeddings=max_positions,
            rope_scaling=rope_scaling,
            sliding_window=_sliding_window(config, model_type, positive("num_hidden_layers"), where),
            tie_embeddings=_flag(config, "tie_word_embeddings", where),
            qkv_bias=family["qkv_bias"],
            qk_norm=family["qk_norm"],
        )

    def to_huggingface(self, dtype: str, source: dict[str, Any] | None = None) -> dict[str, Any]:
        """A `config.json` that transformers 4 and 5 both read as this model.

        Args:
            dtype: the dtype of the weights beside it, e.g. "bfloat16".
            source: the config.json that the model came from. What describes another model is replaced; everything else
                in it (token ids, the user's own keys) is kept.
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
        out.pop("dtype", None)
        return out | {"torch_dtype": dtype}  # the name that every version reads

    def _fields(self) -> dict[str, Any]:
        """Everything but rope and dtype under Hugging Face's names."""
        fields = {
            "model_type": self.model_type,
            "architectures": [_FAMILIES[self.model_type]["architecture"]],
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_embeddings,
        }
        if self.model_type == "llama":
            fields |= {"attention_bias": False, "mlp_bias": False}
        else:
            fields |= {"sliding_window": self.sliding_window}
        if self.model_type in ("qwen2", "qwen3"):
            windowed = self.sliding_window is not None
            kind = "sliding_attention" if windowed else "full_attention"
            fields |= {"use_sliding_window": windowed, "max_window_layers": 0 if windowed else self.num_layers}
            fields |= {"layer_types": [kind] * self.num_layers}
        return fields


# What transformers 5.23 assumes where config.json is silent (its configuration_*.py), and what sets a family apart.
_SHARED: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "qkv_bias": False,
    "qk_norm": False,
}
_QWEN = _SHARED | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _SHARED
    | {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
    },
    "mistral": _SHARED
    | {
        "architecture": "MistralForCausalLM",
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "qwen2": _QWEN | {"architecture": "Qwen2ForCausalLM", "qkv_bias": True},
    "qwen3": _QWEN | {"architecture": "Qwen3ForCausalLM", "qk_norm": True, "head_dim": 128},
}

_ROPE_SCALINGS = {"default": None, "linear": LinearRopeScaling, "llama3": Llama3RopeScaling}

# Options that change the computation, with the only value that is computed here.
_ONLY_SUPPORTED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,  # Qwen2's bias is not an option of its config
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "is_causal": True,
    "use_mrope": False,
}


def _refuse_unsupported(config: dict[str, Any], architecture: str, where: str) -> None:
    quantised = config.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise UserError(
            f"{where}: has a quantization_config ({method!r}), and quantised weights are not supported; name the model "
            "that they were made from"
        )
    for key, only in _ONLY_SUPPORTED.items():
        value = config.get(key)
        if value is not None and value != only:
            raise UserError(f"{where}: {key}={value!r} is not supported, only {only!r} is")
    architectures = config.get("architectures")
    if architectures and architectures != [architecture]:
        raise UserError(f"{where}: architectures={architectures!r} is not supported, only [{architecture!r}] is")


_TOO_MANY_LAYERS = 10_000  # to be listed, as they are before the weights show how many there are


def _positive(value: Any, key: str, kind: type, where: str) -> Any:
    accepted = (int, float) if kind is float else int
    most = sys.float_info.max if kind is float else _TOO_MANY_LAYERS if key == "num_hidden_layers" else 2**31
    if isinstance(value, bool) or not isinstance(value, accepted) or not 0 < value < most:
        what = "number" if kind is float else f"integer below {most}"
        raise UserError(f"{where}: {key}={value!r} must be a positive {what}")
    return kind(value)


def _flag(config: dict[str, Any], key: str, where: str) -> bool:
    """An option that is off where it is absent or null. Text is refused: "false" would be true."""
    value = config.get(key)
    if value not in (None, True, False):
        raise UserError(f"{where}: {key}={value!r} must be true or false")
    return bool(value)


def _rope(config: dict[str, Any], max_positions: int, where: str) -> tuple[float, RopeScaling]:
    """(theta, scaling) from transformers 4's `rope_theta` and `rope_scaling` or transformers 5's `rope_parameters`."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    given = config.get(key) or {}
    if not isinstance(given, dict):
        raise UserError(f"{where}: {key}={given!r} must be null or an object with a rope_type")
    rope = {name: value for name, value in given.items() if value is not None}
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"{where}: {key} differs between kinds of layer ({', '.join(rope)}), which is not supported")

    # Where both are given transformers 4 obeys the first and transformers 5 the second.
    theta, theta_5 = config.get("rope_theta"), rope.pop("rope_theta", None)
    if theta is not None and theta_5 is not None and theta != theta_5:
        raise UserError(f"{where}: rope_theta={theta!r} contradicts {key}.rope_theta={theta_5!r}; remove the wrong one")
    theta = next((value for value in (theta, theta_5) if value is not None), 10000.0)
    theta = _positive(theta, "rope_theta", float, where)

    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{where}: {key}.partial_rotary_factor is not supported")
    old_name = rope.pop("type", "default")
    name = rope.pop("rope_type", old_name)
    if not isinstance(name, str) or name not in _ROPE_SCALINGS:
        raise UserError(f"{where}: {key} of type {name!r} is not supported; supported: {', '.join(_ROPE_SCALINGS)}")
    scaling = _ROPE_SCALINGS[name]
    if scaling is Llama3RopeScaling:
        rope.setdefault("original_max_position_embeddings", max_positions)
    fields = {field.name: field.type for field in dataclasses.fields(scaling)} if scaling else {}
    if set(rope) != set(fields):
        raise UserError(f"{where}: {key} of type {name!r} has the fields {sorted(rope)}; expected {sorted(fields)}")
    values = {name: _positive(rope[name], f"{key}.{name}", kind, where) for name, kind in fields.items()}
    if scaling is Llama3RopeScaling and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise UserError(f"{where}: {key}.high_freq_factor must be greater than low_freq_factor")
    return theta, scaling(**values) if scaling else None


def _sliding_window(config: dict[str, Any], model_type: str, num_layers: int, where: str) -> int | None:
    """The window of every layer. Mistral has one unless it is null, Qwen only if `use_sliding_window`, Llama never."""
    window = config.get("sliding_window", _FAMILIES[model_type]["sliding_window"])
    is_qwen = model_type in ("qwen2", "qwen3")
    if model_type == "llama" or (is_qwen and not _flag(config, "use_sliding_window", where)):
        window = None
    first_layer = config.get("max_window_layers", 28) if is_qwen else 0
    if not isinstance(first_layer, int):
        raise UserError(f"{where}: max_window_layers={first_layer!r} must be an integer")
    sliding = [window is not None and layer >= first_layer for layer in range(num_layers)]
    layer_types = config.get("layer_types") or ["sliding_attention" if each else "full_attention" for each in sliding]
    if not isinstance(layer_types, list) or not all(isinstance(kind, str) for kind in layer_types):
        raise UserError(f"{where}: layer_types={layer_types!r} must be a list with the kind of each layer")
    kinds = set(layer_types)
    if len(kinds) > 1:
        source = "layer_types" if config.get("layer_types") else f"max_window_layers={first_layer}"
        raise UserError(f"{where}: {source} mixes {' and '.join(sorted(kinds))}; only one for all layers is supported")
    if kinds == {"full_attention"} and (window is None or is_qwen):
        return None
    if kinds == {"sliding_attention"} and window is not None:
        return _positive(window, "sliding_window", int, where)
    raise UserError(f"{where}: layer_types of {kinds.pop()} with sliding_window={window!r} is not supported")
