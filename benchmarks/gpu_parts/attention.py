"""Job of gpu.py: attention's paths against each other, forward and backward, on packed rows of drawn lengths.

    cudnn                    as a run asks for it, without a gradient of the mask
    cudnn, mask gradient     as jax before 0.11.1 computes it, for all that is left to its public arguments
    cudnn, causal            told besides that nothing is seen ahead, so that it could skip half of the tiles
    tokamax                  for Hopper, where it is installed
    plain                    jax.numpy, where the scores of a row fit

`error` is that of value and gradients, in norm, against plain attention of the same rounded numbers in float32.
"""

import functools
import itertools
import statistics
import time

import job

ROUNDS = 10
PLAIN_BYTES = 10 * 2**30  # of f32 scores; the backward pass holds a few times as much


def main() -> None:
    flags = job.parse_flags()
    full = flags.size == "full"
    heads, kv_heads, head_dim = (32, 8, 128) if full else (4, 2, 16)
    found = {"heads": [heads, kv_heads, head_dim], "lengths": {}}
    for length in (1024, 2048, 4096) if full else (128,):
        arrays = draw((16384 if full else 256) // length, length, heads, kv_heads, head_dim, flags)
        found["lengths"][length] = at = {"needed_tflop": needed_flops(arrays) / 1e12, "paths": {}}
        for name, attend in paths(flags.on_gpu, head_dim).items():
            if name == "plain" and 4 * heads * arrays["ends"].size * length > PLAIN_BYTES:
                continue
            at["paths"][name] = measure(attend, arrays, ROUNDS if full else 2)
            job.write(flags, found)
    fastest = {length: min(times(at), key=times(at).get) for length, at in found["lengths"].items() if times(at)}
    job.write(flags, found | {f"fastest_{length}": name for length, name in fastest.items()})


def times(at: dict) -> dict[str, float]:
    return {name: one["ms"] for name, one in at["paths"].items() if "ms" in one}


def draw(rows: int, length: int, heads: int, kv_heads: int, head_dim: int, flags) -> dict:
    """Arguments in bfloat16, and rows that pairs fill; what is left of a row sees itself."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    drawn = job.draw_pairs(64, 1000, flags.size)
    pairs = itertools.cycle([drawn[i] for i in np.random.default_rng(0).permutation(64)])
    slots = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    ends, positions = slots + 1, slots.copy()
    for row in range(rows):
        at = 0
        for pair in itertools.islice(pairs, 64):
            prompt, real, generated = map(len, pair.values())
            middle, end = at + prompt + real, at + prompt + real + generated
            if end > length:
                continue  # the next one may fit
            ends[row, at : at + prompt], ends[row, at + prompt : middle], ends[row, middle:end] = end, middle, end
            positions[row, at:middle] = np.arange(prompt + real)
            positions[row, middle:end] = prompt + np.arange(generated)
            at = end
    keys = jax.random.split(jax.random.key(length), 4)
    shapes = {"q": heads, "k": kv_heads, "v": kv_heads, "do": heads}
    arrays = {
        name: jax.random.normal(key, (rows, length, count, head_dim), jnp.bfloat16)
        for (name, count), key in zip(shapes.items(), keys, strict=True)
    }
    return arrays | {"ends": ends, "positions": positions}


def needed_flops(arrays: dict) -> float:
    """Of what tokens see: two matmuls forward and five backward."""
    import numpy as np

    _, _, heads, head_dim = arrays["q"].shape
    visible = np.maximum(arrays["ends"] - np.arange(arrays["ends"].shape[1]), 0).sum()
    return 7 * 2.0 * heads * head_dim * float(visible)


def paths(on_gpu: bool, head_dim: int) -> dict:
    """name -> attention of (q, k, v, ends, positions)"""
    import jax
    import jax.numpy as jnp

    from spin_jax.devices import sharding
    from spin_jax.kernels import KERNELS
    from spin_jax.kernels.block_mask import causal_mask
    from spin_jax.models.attention import causal_attention

    mesh = sharding.one_device_mesh()

    def by_kernel(name: str | None):
        return lambda q, k, v, ends, positions: causal_attention(q, k, v, ends, positions, None, name, mesh)

    def by_cudnn(q, k, v, ends, positions, *, causal: bool, gradient: bool):
        mask = causal_mask(ends, positions, None)[:, None]
        ask = functools.partial(jax.nn.dot_product_attention, q, k, v, is_causal=causal, implementation="cudnn")
        return ask(bias=jnp.where(mask, 0, -(2.0**40)).astype(q.dtype)) if gradient else ask(mask=mask)

    found = {}
    if on_gpu:
        found["cudnn"] = by_kernel("cudnn")
        found["cudnn, mask gradient"] = functools.partial(by_cudnn, causal=False, gradient=True)
        found["cudnn, causal"] = functools.partial(by_cudnn, causal=True, gradient=False)
    else:
        found["tiled"] = by_kernel("tiled")
    if not KERNELS["tokamax"].refusal(jax.devices()[0], head_dim, jnp.bfloat16):
        found["tokamax"] = by_kernel("tokamax")
    return found | {"plain": by_kernel(None)}


def measure(attend, arrays: dict, rounds: int) -> dict:
    """Milliseconds of forward and backward pass together, and of the forward pass; or why there are none."""
    import jax
    import jax.numpy as jnp

    qkv, tokens = [arrays[name] for name in ("q", "k", "v")], (arrays["ends"], arrays["positions"])

    @functools.partial(jax.jit, static_argnums=0)
    def both(attend, qkv, do, tokens):
        value, pullback = jax.vjp(lambda *qkv: attend(*qkv, *tokens), *qkv)
        return value, *pullback(do)

    try:
        forward = functools.partial(jax.jit(lambda qkv, tokens: attend(*qkv, *tokens)), qkv, tokens)
        backward = functools.partial(both, attend, qkv, arrays["do"], tokens)
        found = {"ms": timed(backward, rounds), "forward_ms": timed(forward, rounds)}
        if arrays["ends"].shape[1] <= 1024:
            with jax.default_matmul_precision("float32"):
                wide = [x.astype(jnp.float32) for x in (*qkv, arrays["do"])]
                exact = both(paths(False, 0)["plain"], wide[:3], wide[3], tokens)
            found["error"] = {
                name: float(jnp.linalg.norm(x.astype(jnp.float32) - y) / jnp.linalg.norm(y))
                for name, x, y in zip(("value", "dq", "dk", "dv"), backward(), exact, strict=True)
            }
    except Exception as error:  # whatever a library says, the other paths go on
        return {"error": f"{type(error).__name__}: {error}"[:2000]}
    return found


def timed(call, rounds: int) -> float:
    import jax

    seconds = []
    for _ in range(2 + rounds):  # the first one compiles
        begin = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(seconds[2:])


if __name__ == "__main__":
    main()
