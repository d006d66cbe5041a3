"""Attention's kernels against the plain path, forward and gradient, sharded over 8 devices; and compiled for TPUs."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from spin_jax.errors import UserError
from spin_jax.models import attention
from spin_jax.models.attention import Kernel, causal_attention
from spin_jax.slices import SLICES

ROWS, HEADS = ("data", "fsdp"), "tensor"
BATCH = 4


def mesh_of(devices: list, *shape: int) -> Mesh:
    return Mesh(np.array(devices).reshape(shape), (*ROWS, HEADS), axis_types=(AxisType.Auto,) * 3)


def cpu_mesh() -> Mesh:
    return mesh_of(jax.devices("cpu"), 2, 2, 2)


def rows(length: int, heads: int, kv_heads: int, head_dim: int, packed: bool) -> dict:
    """Arguments of causal_attention, and the cotangent of its result."""
    keys = jax.random.split(jax.random.key(length), 5)
    shapes = {"q": heads, "k": kv_heads, "v": kv_heads, "cotangent": heads}
    arrays = {
        name: jax.random.normal(key, (BATCH, length, count, head_dim))
        for (name, count), key in zip(shapes.items(), keys, strict=False)
    }
    starts_BT = jax.random.bernoulli(keys[4], 2.0 / length, (BATCH, length))
    return arrays | {"segments": jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32) if packed else None}


def value_and_gradients(attend, arrays: dict, dtype=jnp.float32) -> dict[str, np.ndarray]:
    """What `attend(q, k, v, segments)` gives, and its pullback of the cotangent."""
    qkv = [arrays[name].astype(dtype) for name in ("q", "k", "v")]

    @jax.jit
    def run(qkv, cotangent, segments):
        value, pullback = jax.vjp(lambda *qkv: attend(*qkv, segments), *qkv)
        return value, *pullback(cotangent.astype(dtype))

    results = run(qkv, arrays["cotangent"], arrays["segments"])
    return {name: np.asarray(x, np.float32) for name, x in zip(("value", "dq", "dk", "dv"), results, strict=True)}


def with_kernel(kernel: Kernel | None, sliding_window: int | None):
    return lambda q, k, v, segments: causal_attention(
        q, k, v, segments_BT=segments, sliding_window=sliding_window, kernel=kernel
    )


def assert_same(found: dict, expected: dict) -> None:
    """Equal up to f32's rounding in sums of a few hundred terms of size 1."""
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(("sliding_window", "packed"), [(None, False), (5, False), (None, True), (5, True)])
def test_plain_is_the_definition(sliding_window, packed):
    """Query by query in float64, from the docstring's words."""
    arrays = rows(23, 4, 2, 8, packed)
    found = value_and_gradients(with_kernel(None, sliding_window), arrays)["value"]
    q, k, v = (np.asarray(arrays[name], np.float64) for name in ("q", "k", "v"))
    segments = np.asarray(arrays["segments"]) if packed else np.zeros((BATCH, 23))
    for b, i, n in np.ndindex(BATCH, 23, 4):
        seen = [j for j in range(i + 1) if i - j < (sliding_window or 23) and segments[b, i] == segments[b, j]]
        weights = np.exp(k[b, seen, n // 2] @ q[b, i, n] / np.sqrt(8))
        expected = weights @ v[b, seen, n // 2] / weights.sum()
        np.testing.assert_allclose(found[b, i, n], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "head_dim", "sliding_window", "packed"),
    [
        pytest.param(200, 8, 4, 64, None, False, id="one padded tile, grouped heads"),
        pytest.param(600, 4, 2, 128, 70, True, id="two tiles, window within a tile, segments"),
        pytest.param(256, 4, 4, 64, 300, True, id="window beyond the row, segments"),
        pytest.param(1100, 2, 2, 16, 500, False, id="three tiles, window across tiles, small heads"),
    ],
)
def test_splash_is_plain(length, heads, kv_heads, head_dim, sliding_window, packed):
    arrays = rows(length, heads, kv_heads, head_dim, packed)
    plain = value_and_gradients(with_kernel(None, sliding_window), arrays)
    splash = Kernel("splash", cpu_mesh(), ROWS, HEADS)
    assert_same(value_and_gradients(with_kernel(splash, sliding_window), arrays), plain)


@pytest.mark.parametrize(("sliding_window", "packed"), [(None, False), (70, False), (300, False), (70, True)])
def test_what_cudnn_is_told_is_plain(sliding_window, packed):
    """The arguments that cuDNN gets, given to XLA."""
    arrays = rows(128, 4, 2, 64, packed)
    told = functools.partial(attention.dot_product, sliding_window=sliding_window, implementation="xla")
    plain = value_and_gradients(with_kernel(None, sliding_window), arrays)
    assert_same(value_and_gradients(told, arrays), plain)


def assert_as_good_as_plain(kernel: Kernel, sliding_window: int | None, packed: bool) -> None:
    """In bfloat16, against f32 of numbers that are not rounded: at most 1.5 times plain's error in norm. A kernel's
    backward pass reads the rounded output, and splash rounds q once more, to scale it."""
    arrays = rows(256, 4, 2, 128, packed)
    exact = value_and_gradients(with_kernel(None, sliding_window), arrays)

    def errors(kernel: Kernel | None) -> dict[str, float]:
        found = value_and_gradients(with_kernel(kernel, sliding_window), arrays, jnp.bfloat16)
        return {name: np.linalg.norm(found[name] - exact[name]) / np.linalg.norm(exact[name]) for name in exact}

    plain, found = errors(None), errors(kernel)
    assert all(found[name] < 1.5 * plain[name] for name in plain), (found, plain)


def test_splash_in_bfloat16_is_as_good_as_plain():
    assert_as_good_as_plain(Kernel("splash", cpu_mesh(), ROWS, HEADS), None, packed=False)


@pytest.mark.parametrize(("sliding_window", "packed"), [(None, False), (70, False), (70, True)])
def test_cudnn_in_bfloat16_is_as_good_as_plain(sliding_window, packed):
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU: JAX_PLATFORMS=cuda,cpu pytest tests/test_attention.py")
    assert_as_good_as_plain(Kernel("cudnn", mesh_of(jax.devices()[:1], 1, 1, 1), ROWS, HEADS), sliding_window, packed)


def gradient_program(mesh: Mesh, name: str, length: int, sliding_window: int | None, saved: str = ""):
    """Value and gradient of attention by 8 query heads on 4 kv heads of 128, of which the backward pass finds what is
    `saved`; and the shapes of q, k, v and segments."""

    def shape(spec: PartitionSpec, dtype: jnp.dtype, *dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

    def loss(q, k, v, segments):
        return jnp.sum(with_kernel(Kernel(name, mesh, ROWS, HEADS), sliding_window)(q, k, v, segments) ** 2)

    policy = jax.checkpoint_policies.save_only_these_names(saved)
    gradient = jax.value_and_grad(jax.checkpoint(loss, policy=policy), argnums=(0, 1, 2))
    q, k, v = (shape(PartitionSpec(ROWS, None, HEADS), jnp.bfloat16, BATCH, length, heads, 128) for heads in (8, 4, 4))
    return jax.jit(gradient), (q, k, v, shape(PartitionSpec(ROWS), jnp.int32, BATCH, length))


@tpu.needs_libtpu
@pytest.mark.parametrize(
    ("chips", "sliding_window", "saved", "kernels"),
    [(tpu.V5E_4, None, attention.SPLASH_RESIDUALS, 3), (SLICES["v5p-8"], 300, "", 4)],
    ids=["v5e", "v5p"],
)
def test_splash_compiles_for_tpus(chips, sliding_window, saved, kernels):
    """A forward kernel, a second one where a remat policy does not save its residuals, two backward kernels; and
    nowhere the scores that the plain path holds."""
    length = 1024
    program, shapes = gradient_program(
        tpu.mesh(chips, data=1, fsdp=2, tensor=2), "splash", length, sliding_window, saved
    )
    compiled = program.lower(*shapes).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == kernels
    scores_bytes = BATCH // 2 * 8 // 2 * length**2 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < scores_bytes / 2


def test_cudnn_lowers_for_gpus(monkeypatch):
    """cuDNN's kernels with what a device has: its rows, its heads, the window; no mask where nothing is packed."""
    from jax._src.cudnn import fused_attention_stablehlo

    # Lowering asks for the version of a library that only machines with a GPU have, and compiles nothing.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91002)
    program, (*qkv, segments) = gradient_program(cpu_mesh(), "cudnn", 256, 70)

    def calls(segments) -> list[str]:
        text = program.trace(*qkv, segments).lower(lowering_platforms=("cuda",)).as_text()
        return [line.replace(r"\22", '"') for line in text.splitlines() if "custom_call @__cudnn" in line]

    def told(field: str, call: str) -> str:
        return re.search(rf'"{field}": "?(\w+)', call).group(1)

    *_, forward, backward = calls(None)
    assert "@__cudnn$fmhaSoftmax(" in forward and "@__cudnn$fmhaSoftmaxBackward(" in backward
    assert "(tensor<1x256x4x128xbf16>, tensor<1x256x2x128xbf16>, tensor<1x256x2x128xbf16>) ->" in forward
    for call in (forward, backward):
        assert told("mask_type", call) == "CAUSAL" and told("sliding_window_length", call) == "70"

    *_, forward, backward = calls(segments)
    assert "@__cudnn$fmhaScaleBiasSoftmax(" in forward and "@__cudnn$fmhaScaleBiasSoftmaxBackward(" in backward
    assert "tensor<1x1x256x256xbf16>) ->" in forward  # the mask, which has the window in it
    assert told("sliding_window_length", forward) == "0"


@tpu.needs_libtpu
def test_auto_is_the_kernel_of_the_devices():
    """Of the devices that a program is for: here it is a CPU that asks."""
    choose = functools.partial(attention.choose_kernel, rows=ROWS, heads=HEADS, head_dim=128, dtype=jnp.bfloat16)
    tpus = tpu.mesh(tpu.V5E_4, data=1, fsdp=4, tensor=1)
    assert choose("auto", tpus) == Kernel("splash", tpus, ROWS, HEADS)
    assert choose("plain", tpus) is None
    assert choose("auto", cpu_mesh()) is None


@pytest.mark.parametrize(
    ("asked", "platform", "head_dim", "dtype", "says"),
    [
        ("flash", "tpu", 128, jnp.bfloat16, "is not an attention"),
        ("splash", "gpu", 128, jnp.bfloat16, "is a TPU kernel"),
        ("cudnn", "cpu", 128, jnp.bfloat16, "is a GPU kernel and these devices are of platform 'cpu'"),
        ("cudnn", "gpu", 128, jnp.float32, "not float32"),
        ("cudnn", "gpu", 100, jnp.bfloat16, "not 100"),
        ("cudnn", "gpu", 256, jnp.bfloat16, "not 256"),
    ],
)
def test_what_a_kernel_cannot_do_is_said(asked, platform, head_dim, dtype, says):
    """And "auto" goes back to the plain path."""
    device = types.SimpleNamespace(platform=platform)
    mesh = types.SimpleNamespace(devices=np.array([device]))
    choose = functools.partial(attention.choose_kernel, mesh=mesh, rows=ROWS, heads=HEADS)
    with pytest.raises(UserError, match=f"config.model.attention='{asked}'.*{says}"):
        choose(asked, head_dim=head_dim, dtype=dtype)
    if asked == "cudnn" and platform == "gpu":
        assert choose("auto", head_dim=head_dim, dtype=dtype) is None
        assert choose("auto", head_dim=64, dtype=jnp.bfloat16).name == "cudnn"
