"""Attention's kernels against the plain path, forward and gradient, sharded over 8 devices; and compiled for TPUs."""

import functools
import importlib.util
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu
from jax.sharding import AxisType, Mesh

from spin_jax.devices.sharding import AXES
from spin_jax.errors import UserError
from spin_jax.kernels import KERNELS, flash_cpu
from spin_jax.kernels import cudnn as cudnn_lib
from spin_jax.kernels import tokamax as tokamax_lib
from spin_jax.kernels.interface import choose
from spin_jax.models.attention import causal_attention

BATCH = 4
tokamax = pytest.param(
    "tokamax",
    marks=pytest.mark.skipif(
        importlib.util.find_spec("tokamax") is None,
        reason=f"needs tokamax, and that Python 3.12: pip install {tokamax_lib.TOKAMAX}",
    ),
)


@pytest.fixture(autouse=True)
def others_promote_ranks(request):
    """What conftest.py forbids in our code, tokamax does."""
    with jax.numpy_rank_promotion("allow" if "tokamax" in request.node.name else "raise"):
        yield


def mesh_of(devices: list, *shape: int) -> Mesh:
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def cpu_mesh() -> Mesh:
    return mesh_of(jax.devices("cpu"), 2, 2, 2)


def one_device() -> Mesh:
    return mesh_of(jax.devices("cpu")[:1], 1, 1, 1)


def rows(length: int, heads: int, kv_heads: int, head_dim: int, packed: bool) -> dict:
    """Arguments of causal_attention, and the cotangent of its result. Packed: sequences of random lengths."""
    keys = jax.random.split(jax.random.key(length), 5)
    shapes = {"q": heads, "k": kv_heads, "v": kv_heads, "cotangent": heads}
    arrays = {
        name: jax.random.normal(key, (BATCH, length, count, head_dim))
        for (name, count), key in zip(shapes.items(), keys, strict=False)
    }
    slots_BT = np.broadcast_to(np.arange(length, dtype=np.int32), (BATCH, length))
    positions_BT, visible_until_BT = slots_BT, None
    if packed:
        starts_BT = np.array(jax.random.bernoulli(keys[4], 2.0 / length, (BATCH, length)))
        starts_BT[:, 0] = True
        positions_BT = slots_BT - np.maximum.accumulate(np.where(starts_BT, slots_BT, 0), axis=1)
        later_BT = np.roll(np.where(starts_BT, slots_BT, length), -1, axis=1)
        later_BT[:, -1] = length
        visible_until_BT = np.minimum.accumulate(later_BT[:, ::-1], axis=1)[:, ::-1].astype(np.int32)
    return arrays | {"positions": positions_BT, "ends": visible_until_BT}


def value_and_gradients(attend, arrays: dict, dtype=jnp.float32) -> dict[str, np.ndarray]:
    """What `attend(q, k, v, ends, positions)` gives, and its pullback of the cotangent."""
    qkv = [arrays[name].astype(dtype) for name in ("q", "k", "v")]

    @jax.jit
    def run(qkv, cotangent, ends, positions):
        value, pullback = jax.vjp(lambda *qkv: attend(*qkv, ends, positions), *qkv)
        return value, *pullback(cotangent.astype(dtype))

    results = run(qkv, arrays["cotangent"], arrays["ends"], arrays["positions"])
    return {name: np.asarray(x, np.float32) for name, x in zip(("value", "dq", "dk", "dv"), results, strict=True)}


def with_kernel(kernel: str | None, sliding_window: int | None, mesh: Mesh | None = None):
    return lambda q, k, v, ends, positions: causal_attention(q, k, v, ends, positions, sliding_window, kernel, mesh)


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
    ends, positions = arrays["ends"] if packed else np.full((BATCH, 23), 23), arrays["positions"]
    for b, i, n in np.ndindex(BATCH, 23, 4):
        near = positions[b, i] - positions[b] < (sliding_window or 23)
        seen = [j for j in range(i + 1) if i < ends[b, j] and near[j]]
        weights = np.exp(k[b, seen, n // 2] @ q[b, i, n] / np.sqrt(8))
        expected = weights @ v[b, seen, n // 2] / weights.sum()
        np.testing.assert_allclose(found[b, i, n], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["tiled", "flash", tokamax])
@pytest.mark.parametrize(
    ("length", "head_dim", "sliding_window", "packed"), [(200, 64, None, False), (600, 128, 70, True)]
)
def test_tiles_on_a_mesh_are_plain(name, length, head_dim, sliding_window, packed):
    """Each device with its rows and heads; flash itself is tested in test_flash.py; tokamax is XLA here."""
    arrays = rows(length, 8, 4, head_dim, packed)
    plain = value_and_gradients(with_kernel(None, sliding_window), arrays)
    assert_same(value_and_gradients(with_kernel(name, sliding_window, cpu_mesh()), arrays), plain)


@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (6, 1)])
@pytest.mark.parametrize(("length", "sliding_window"), [(1, None), (63, 5), (64, None), (130, 64), (400, None)])
def test_tiled_is_plain(heads, length, sliding_window):
    """Of every grouping of heads, about the tiles' edges."""
    arrays = rows(length, *heads, 16, packed=True)
    plain = value_and_gradients(with_kernel(None, sliding_window), arrays)
    tiled = value_and_gradients(with_kernel("tiled", sliding_window, one_device()), arrays)
    assert_same(tiled, plain)


def test_tiled_does_not_compute_what_nobody_sees():
    """A value that is no number spoils what is computed with it, were it at weight 0."""
    q, k, v = (x[:, :256] for x in map(rows(256, 2, 1, 16, False).get, ("q", "k", "v")))
    slots = np.broadcast_to(np.arange(256, dtype=np.int32), q.shape[:2])
    ends = np.where(slots < 128, 128, 256).astype(np.int32)
    found = flash_cpu.tiled_attention(q, k, v.at[:, :128].set(jnp.nan), ends, slots, sliding_window=None)
    assert np.isnan(found[:, :128]).all() and np.isfinite(found[:, 128:]).all()


def test_tiled_in_bfloat16_is_as_good_as_plain():
    assert_as_good_as_plain("tiled", one_device(), 70, True)


@pytest.mark.parametrize(("sliding_window", "packed"), [(None, False), (70, False), (300, False), (70, True)])
def test_what_cudnn_is_told_is_plain(sliding_window, packed):
    """The arguments that cuDNN gets, given to XLA."""
    arrays = rows(128, 4, 2, 64, packed)
    told = functools.partial(cudnn_lib.cudnn_attention, sliding_window=sliding_window, implementation="xla")
    if not packed:
        arrays["ends"] = np.full_like(arrays["positions"], 128)
    plain = value_and_gradients(with_kernel(None, sliding_window), arrays)
    assert_same(value_and_gradients(told, arrays), plain)


def assert_as_good_as_plain(kernel: str, mesh: Mesh, sliding_window: int | None, packed: bool) -> None:
    """In bfloat16, against f32 of numbers that are not rounded: at most 1.5 times plain's error in norm, as a kernel's
    backward pass reads the rounded output."""
    arrays = rows(256, 4, 2, 128, packed)
    with jax.default_matmul_precision("float32"):  # a GPU would round
        exact = value_and_gradients(with_kernel(None, sliding_window), arrays)

    def errors(kernel: str | None) -> dict[str, float]:
        found = value_and_gradients(with_kernel(kernel, sliding_window, mesh), arrays, jnp.bfloat16)
        return {name: np.linalg.norm(found[name] - exact[name]) / np.linalg.norm(exact[name]) for name in exact}

    plain, found = errors(None), errors(kernel)
    assert all(found[name] < 1.5 * plain[name] for name in plain), (found, plain)


@pytest.mark.parametrize("name", ["cudnn", tokamax])
@pytest.mark.parametrize(("sliding_window", "packed"), [(None, False), (70, False), (70, True)])
def test_gpu_kernels_in_bfloat16_are_as_good_as_plain(name, sliding_window, packed):
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU: JAX_PLATFORMS=cuda,cpu pytest tests/models/test_attention.py")
    if reason := KERNELS[name].refusal(jax.devices()[0], 128, jnp.bfloat16):
        pytest.skip(reason)
    assert_as_good_as_plain(name, mesh_of(jax.devices()[:1], 1, 1, 1), sliding_window, packed)


def test_cudnn_lowers_for_gpus(monkeypatch):
    """cuDNN's kernels, forward and backward, with what a device has: its rows and heads, and their mask, of which no
    gradient is asked."""
    from jax._src.cudnn import fused_attention_stablehlo

    # Lowering asks for the version of a library that only machines with a GPU have, and compiles nothing.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91002)
    forward, backward = gpu_calls(with_kernel("cudnn", 70, cpu_mesh()))
    assert "@__cudnn$fmhaScaleBiasSoftmax(" in forward and "@__cudnn$fmhaScaleBiasSoftmaxBackward(" in backward
    assert "(tensor<1x256x4x128xbf16>, tensor<1x256x2x128xbf16>, tensor<1x256x2x128xbf16>, " in forward
    assert "tensor<1x1x256x256xbf16>) ->" in forward  # the mask, which has the window in it
    taken, given = backward.split(" -> ")
    assert "tensor<1x1x256x256xbf16>" in taken and "256x256" not in given


@pytest.mark.parametrize("name", [tokamax])
def test_tokamax_lowers_for_hopper(name, monkeypatch):
    """Its kernels: one forward, one for dq, one for dk and dv. Here a CPU asks, and is told that it is an H100."""
    from tokamax._src import gpu_utils

    for function, capability in {"is_sm80": False, "is_sm90": True, "is_sm100": False}.items():
        monkeypatch.setattr(gpu_utils, function, lambda *_, found=capability: found)
    monkeypatch.setattr(gpu_utils, "has_mosaic_gpu_support", lambda *_: True)
    attend = functools.partial(tokamax_lib.tokamax_attention, sliding_window=70, platform="gpu")
    forward, *backward = gpu_calls(attend)
    assert len(backward) == 2 and all("@mosaic_gpu" in call for call in (forward, *backward))
    assert "tensor<4x256x8x128xbf16>, tensor<4x256x4x128xbf16>, tensor<4x256x4x128xbf16>" in forward


def gpu_calls(attend) -> list[str]:
    """The calls of kernels in an attention and its gradient, lowered for NVIDIA's GPUs."""

    def loss(q, k, v, *tokens):
        return jnp.sum(attend(q, k, v, *tokens).astype(jnp.float32))

    qkv = [jax.ShapeDtypeStruct((BATCH, 256, heads, 128), jnp.bfloat16) for heads in (8, 4, 4)]
    tokens = [jax.ShapeDtypeStruct((BATCH, 256), jnp.int32)] * 2
    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*qkv, *tokens)
    lines = program.lower(lowering_platforms=("cuda",)).as_text().splitlines()
    return [line for line in lines if "custom_call @__cudnn" in line or "custom_call @mosaic_gpu" in line]


def test_first_slot_that_is_seen():
    """Where a kernel may begin: for each slot the first of the row whose end is beyond it."""
    visible_until_BT = np.array([[6, 6, 4, 4, 6, 6, 7, 10, 9, 10], [1, 10, 10, 4, 10, 10, 10, 8, 10, 10]], np.int32)
    expected = [[0, 0, 0, 0, 0, 0, 6, 7, 7, 7], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]]
    np.testing.assert_array_equal(tokamax_lib.first_seen(jnp.asarray(visible_until_BT)), expected)


@tpu.needs_libtpu
def test_auto_is_the_kernel_of_the_devices():
    """Of the devices that a program is for: here it is a CPU that asks."""
    device = tpu.mesh(tpu.V5E_4, data=1, fsdp=4, tensor=1).devices.flat[0]
    assert choose("auto", device, 128, jnp.bfloat16) == "flash"
    assert choose("plain", device, 128, jnp.bfloat16) is None
    assert choose("auto", jax.devices("cpu")[0], 128, jnp.bfloat16) == "tiled"


@pytest.mark.parametrize(
    ("asked", "platform", "head_dim", "dtype", "says"),
    [
        ("flash", "gpu", 128, jnp.bfloat16, "is a TPU kernel"),
        ("cudnn", "cpu", 128, jnp.bfloat16, "is a GPU kernel and these devices are of platform 'cpu'"),
        ("cudnn", "gpu", 128, jnp.float32, "not float32"),
        ("cudnn", "gpu", 100, jnp.bfloat16, "not 100"),
        ("cudnn", "gpu", 256, jnp.bfloat16, "not 256"),
        ("tokamax", "tpu", 128, jnp.bfloat16, "is a GPU kernel"),
    ],
)
def test_what_a_kernel_cannot_do_is_said(asked, platform, head_dim, dtype, says):
    """And "auto" goes back to the plain path."""
    device = types.SimpleNamespace(platform=platform, device_kind="some", compute_capability="9.0")
    with pytest.raises(UserError, match=f"--config.model.attention={asked} .*{says}"):
        choose(asked, device, head_dim, dtype)
    if asked == "cudnn" and platform == "gpu":
        assert choose("auto", device, head_dim, dtype) is None
        assert choose("auto", device, 64, jnp.bfloat16) == "cudnn"


def test_tokamax_is_asked_for_by_name(monkeypatch):
    """Where it can run; elsewhere one line says what is missing."""

    def chosen(asked: str, dtype=jnp.bfloat16, compute_capability="9.0") -> str | None:
        device = {"platform": "gpu", "device_kind": "some", "compute_capability": compute_capability}
        return choose(asked, types.SimpleNamespace(**device), 64, dtype)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"=tokamax needs a package .*: pip install tokamax==0.0.17"):
        chosen("tokamax")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tokamax")
    assert chosen("tokamax", compute_capability="9.0") == "tokamax"
    with pytest.raises(UserError, match=r"compute capability 9.0, as H100 has, and this .* has less"):
        chosen("tokamax", compute_capability="8.0")
    with pytest.raises(UserError, match="takes 16-bit numbers, not float32"):
        chosen("tokamax", jnp.float32)
    assert chosen("auto") == "cudnn"
