"""The attention kernels of packed rows against plain attention under the dense mask; and compiled for TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu
from jax.sharding import AxisType, Mesh, PartitionSpec

from spin_jax.compile_check.estimate import read_work
from spin_jax.devices.accelerators import V5E
from spin_jax.kernels import flash_tpu
from spin_jax.kernels.block_mask import RESIDUALS, needed_tiles, walk_keys, walk_queries
from spin_jax.kernels.flash_tpu import TILE, flash_attention
from spin_jax.models.attention import attend

# Lengths of prompt, real and generated, pair by pair of a row.
PACKED = [
    [(30, 70, 41), (1, 1, 0), (100, 150, 1), (5, 3, 90)],  # ragged; nothing, and one token, generated; padded
    [(140, 200, 230)],  # across all blocks
    [(128, 128, 128), (64, 32, 32), (1, 80, 3)],  # on the blocks' edges
    [],  # padding
]
LENGTH = 600


def packed(rows: list, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ends [B, T], positions [B, T], who sees whom [B, T, T]) of rows of pairs, the last from what the parts are."""
    ends = np.tile(np.arange(length, dtype=np.int32) + 1, (len(rows), 1))
    positions = np.zeros((len(rows), length), np.int32)
    pair, part = np.full((2, len(rows), length), -1)
    for row, pairs in enumerate(rows):
        start = 0
        for number, (prompt, real, generated) in enumerate(pairs):
            end = start + prompt + real + generated
            ends[row, start:end] = end
            ends[row, start + prompt : end - generated] = end - generated
            positions[row, start : end - generated] = np.arange(prompt + real)
            positions[row, end - generated : end] = prompt + np.arange(generated)
            pair[row, start:end] = number
            part[row, start:end] = np.repeat([0, 1, 2], [prompt, real, generated])
            start = end
    same = (pair[:, :, None] == pair[:, None]) & (pair >= 0)[:, None]
    same &= (part[:, :, None] == part[:, None]) | (part == 0)[:, None]
    return ends, positions, (same & np.tri(length, dtype=bool)) | np.eye(length, dtype=bool)


def within(visible: np.ndarray, positions: np.ndarray, sliding_window: int | None) -> np.ndarray:
    return visible & (positions[:, :, None] - positions[:, None] < (sliding_window or visible.shape[1]))


def arrays(heads: int, kv_heads: int, head_dim: int) -> tuple[jax.Array, ...]:
    """q, k, v and the cotangent of the output."""
    keys = jax.random.split(jax.random.key(0), 4)
    counts = (heads, kv_heads, kv_heads, heads)
    return tuple(
        jax.random.normal(key, (len(PACKED), LENGTH, n, head_dim)) for key, n in zip(keys, counts, strict=True)
    )


def value_and_gradients(attention, q, k, v, cotangent, dtype=jnp.float32) -> dict[str, np.ndarray]:
    @jax.jit
    def run(*qkv):
        value, pullback = jax.vjp(attention, *qkv)
        return value, *pullback(cotangent.astype(dtype))

    results = run(*(x.astype(dtype) for x in (q, k, v)))
    return {name: np.asarray(x, np.float32) for name, x in zip(("value", "dq", "dk", "dv"), results, strict=True)}


def plainly(q_BTNH, k_BTKH, v_BTKH, visible):
    return attend(q_BTNH, k_BTKH.transpose(0, 2, 3, 1), v_BTKH.swapaxes(1, 2), jnp.asarray(visible))


def on_eight_devices(attention):
    """Rows and heads of it split over the CPU's devices: each has its own rows, and so its own number of steps."""
    mesh = Mesh(np.array(jax.devices("cpu")).reshape(4, 2), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2)
    qkv, tokens = PartitionSpec("rows", None, "heads"), PartitionSpec("rows")
    specs = (qkv, qkv, qkv, tokens, tokens)
    return jax.shard_map(attention, mesh=mesh, in_specs=specs, out_specs=qkv, check_vma=False)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "sliding_window", "tile"),
    [
        pytest.param(8, 4, 64, None, 128, id="two kv heads and four query heads a step"),
        pytest.param(12, 2, 16, 70, 128, id="six heads on one, window"),
        pytest.param(6, 6, 128, 300, 256, id="no groups, window across blocks"),
    ],
)
def test_kernels_are_attention(heads, kv_heads, head_dim, sliding_window, tile, monkeypatch):
    """Equal up to f32's rounding in sums of a few hundred terms of size 1."""
    monkeypatch.setattr(flash_tpu, "TILE", tile)
    ends, positions, visible = packed(PACKED, LENGTH)
    mask = within(visible, positions, sliding_window)
    data = arrays(heads, kv_heads, head_dim)
    kernels = on_eight_devices(functools.partial(flash_attention, sliding_window=sliding_window, platform="cpu"))
    found = value_and_gradients(lambda q, k, v: kernels(q, k, v, ends, positions), *data)
    expected = value_and_gradients(functools.partial(plainly, visible=mask), *data)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=2e-5, err_msg=name)


def test_bfloat16_is_as_good_as_plain():
    """Against f32 of numbers that are not rounded: at most 1.5 times plain's error in norm, as the backward pass reads
    the rounded output."""
    ends, positions, visible = packed(PACKED, LENGTH)
    data = arrays(2, 1, 128)

    plain = functools.partial(plainly, visible=visible)
    exact = value_and_gradients(plain, *data)

    def kernels(q, k, v):
        return flash_attention(q, k, v, jnp.asarray(ends), jnp.asarray(positions), sliding_window=None, platform="cpu")

    def errors(attention) -> dict[str, float]:
        found = value_and_gradients(attention, *data, jnp.bfloat16)
        return {name: np.linalg.norm(found[name] - exact[name]) / np.linalg.norm(exact[name]) for name in exact}

    found, expected = errors(kernels), errors(plain)
    assert all(found[name] < 1.5 * expected[name] for name in expected), (found, expected)


def test_a_slot_sees_itself(monkeypatch):
    """Whatever its end: the weight of its own value is 1."""
    monkeypatch.setattr(flash_tpu, "TILE", 128)
    q, k, v, _ = (x[:1, :200] for x in arrays(2, 1, 16))
    zeros = jnp.zeros((1, 200), jnp.int32)
    found = flash_attention(q, k, v, zeros, zeros, sliding_window=None, platform="cpu")
    np.testing.assert_allclose(found, jnp.repeat(v, 2, axis=2), rtol=1e-6)


def test_what_nobody_sees_is_not_computed():
    """A value that is no number spoils what is computed with it, were it at weight 0."""
    tokens = map(jnp.asarray, packed([[(100, 100, 56), (100, 100, 56)]], 512)[:2])
    q, k, v, _ = (x[:1, :512] for x in arrays(2, 1, 16))
    found = flash_attention(q, k, v.at[:, :256].set(jnp.nan), *tokens, sliding_window=None, platform="cpu")
    assert np.isnan(found[:, :256]).all() and np.isfinite(found[:, 256:]).all()


@pytest.mark.parametrize("sliding_window", [None, 16])
def test_needed_tiles(sliding_window):
    """Without a window, exactly those with a visible entry; with one, all of these, and fewer than without."""
    ends, positions, visible = packed(PACKED, 640)
    tiles = within(visible, positions, sliding_window).reshape(len(PACKED), 5, 128, 5, 128).any(axis=(2, 4))
    tokens = jnp.stack([ends, positions], axis=1)
    needed = np.asarray(needed_tiles(tokens, 128, sliding_window))
    if sliding_window is None:
        np.testing.assert_array_equal(needed, tiles)
    else:
        assert (needed >= tiles).all() and needed.sum() < needed_tiles(tokens, 128, None).sum()


def test_walks_visit_needed_tiles_once():
    """Block after block, each up to its diagonal."""
    ends, positions, _ = packed(PACKED, 640)
    needed = needed_tiles(jnp.stack([ends, positions], axis=1), 128, None)
    for (walk, count), by_queries in ((walk_queries(needed), True), (walk_keys(needed), False)):
        row, i, j = (np.asarray(x)[:count] for x in walk)
        assert sorted(zip(row, i, j, strict=True)) == list(zip(*np.nonzero(needed), strict=True))
        block = list(zip(row, i if by_queries else j, strict=True))
        starts = [step for step in range(count) if step == 0 or block[step] != block[step - 1]]
        assert len(starts) == len(PACKED) * 5 == len(set(block))
        np.testing.assert_array_equal(np.nonzero(i == j)[0] + 1, [*starts[1:], count])


@tpu.needs_libtpu
@pytest.mark.parametrize(
    ("chips", "dtype", "head_dim", "sliding_window", "saved", "kernels"),
    [
        (tpu.V5E_4, jnp.bfloat16, 128, None, RESIDUALS, 3),
        (tpu.V6E_4, jnp.float32, 256, 300, "", 4),
    ],
    ids=["v5e", "v6e"],
)
def test_compiles_for_tpus(chips, dtype, head_dim, sliding_window, saved, kernels):
    """In a scan of layers under remat: the forward kernel, a second one where its residuals are not saved, and the two
    backward ones. All are counted, as of rows that hold one sequence."""
    layers, batch, length, heads, kv_heads = 3, 2, 1024, 8, 2
    mesh = tpu.mesh(chips, rows=2, heads=2)
    rows, qkv = PartitionSpec("rows"), PartitionSpec("rows", None, "heads")
    attention = jax.shard_map(
        functools.partial(flash_attention, sliding_window=sliding_window),
        mesh=mesh,
        in_specs=(qkv, qkv, qkv, rows, rows),
        out_specs=qkv,
        check_vma=False,
    )

    def loss(q, k, v, ends, positions):
        def layer(q, _):
            return attention(q, k, v, ends, positions), None

        policy = jax.checkpoint_policies.save_only_these_names(saved)
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer, policy=policy), q, length=layers)[0].astype(jnp.float32))

    q, k = (tpu.shape(mesh, (batch, length, n, head_dim), *qkv, dtype=dtype) for n in (heads, kv_heads))
    tokens = tpu.shape(mesh, (batch, length), *rows, dtype=jnp.int32)
    text, compiled = tpu.schedule(jax.grad(loss, argnums=(0, 1, 2)), q, k, k, tokens, tokens)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == kernels
    scores_bytes = batch // 2 * heads // 2 * length**2 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < scores_bytes / 2
    matmuls = 2 * (kernels - 2) + 3 + 4
    causal = length**2 * (1 + TILE / length) / 2
    work = read_work(text, V5E, {"rows": 2, "heads": 2})
    assert work.kernel_flops == layers * matmuls * 2 * batch // 2 * heads // 2 * causal * head_dim
