"""The compiler's schedule, read: loops, matmuls, HBM traffic and exchanges between chips, against counts by hand."""

import re

import jax
import jax.numpy as jnp
import pytest
import tpu
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from spin_jax.compile_check import hlo, hlo_cost
from spin_jax.compile_check.estimate import KERNEL_EFFICIENCY, read_work
from spin_jax.devices.accelerators import V5E, V6E

ONE_MATMUL = 2 * 256 * 512 * 512


def chain(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def nested(x, w):
    return jax.lax.scan(lambda x, w: (chain(x, w), None), x, w)[0]


def summed(x, w):
    return nested(x, w).astype(jnp.float32).sum()


def accumulated(xs, w):
    """Micro-batches around a rematerialised model."""

    def loss(w, x):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jax.lax.scan(layer, x, w)[0].astype(jnp.float32).sum()

    return jax.lax.scan(lambda total, x: (total + jax.grad(loss)(w, x), None), jnp.zeros_like(w), xs)[0]


def until(x, w):
    """Sampling's loop: it may end sooner."""

    def step(carry):
        i, x, _ = carry
        x = jnp.tanh(x @ w)
        return i + 1, x, jnp.all(x > 0.5)

    return jax.lax.while_loop(lambda carry: (carry[0] < 37) & ~carry[2], step, (0, x, False))


@tpu.needs_libtpu
@pytest.mark.parametrize(
    ("function", "x", "w", "matmuls", "trips"),
    [
        (nested, (256, 512), (3, 5, 512, 512), 15, [3, 5]),
        # Forward, then two products for each of its one.
        (jax.grad(summed, argnums=1), (256, 512), (3, 5, 512, 512), 45, [3, 5, 3, 5]),
        # Forward, forward again, two products.
        (accumulated, (3, 256, 512), (4, 512, 512), 48, [3, 4, 4]),
        (until, (256, 512), (512, 512), 37, [37]),
    ],
    ids=["nested", "gradient", "micro-batches", "sampling"],
)
def test_loops_multiply(function, x, w, matmuls, trips):
    """XLA's own count takes each body once."""
    mesh = tpu.mesh(tpu.V5E_4, x=4)
    text, compiled = tpu.schedule(function, tpu.shape(mesh, x), tpu.shape(mesh, w))
    work = read_work(text, V5E, {"x": 4})
    assert work.flops == matmuls * ONE_MATMUL
    assert [loop.trips for loop in work.loops] == trips
    assert compiled.cost_analysis()["flops"] < work.flops / 2


@tpu.needs_libtpu
def test_unrolled_agrees_with_xla():
    """Without loops XLA's count is right; what it adds is elementwise."""
    mesh = tpu.mesh(tpu.V5E_4, x=4)
    args = tpu.shape(mesh, (256, 512)), tpu.shape(mesh, (3, 512, 512))
    text, compiled = tpu.schedule(lambda x, w: x @ w[0] @ w[1] @ w[2], *args)
    assert read_work(text, V5E, {"x": 4}).flops == 3 * ONE_MATMUL == pytest.approx(compiled.cost_analysis()["flops"])


@tpu.needs_libtpu
def test_windowed_einsum():
    """What GSPMD makes of a large gathered weight: a loop that steps by 2 and passes pieces around a ring."""
    mesh = tpu.mesh(tpu.V5E_8, x=8)
    args = tpu.shape(mesh, (8192, 4096), "x"), tpu.shape(mesh, (4096, 32768), None, "x")
    rows = jax.NamedSharding(mesh, P("x"))
    text, compiled = tpu.schedule(lambda x, w: jax.lax.with_sharding_constraint(x @ w, rows), *args)
    work = read_work(text, V5E, {"x": 8})
    assert work.flops == 2 * 8192 * 4096 * 32768 / 8
    assert compiled.cost_analysis()["flops"] == pytest.approx(work.flops / 2, rel=0.01)
    assert [loop.trips for loop in work.loops] == [2]
    assert {(one.kind, one.axes, one.is_async) for one in work.traffic} == {("collective-permute", "x", True)}


@tpu.needs_libtpu
def test_hbm_counts_what_is_touched():
    """In place, a slice of a large array costs the slice; a padded layout costs its padding."""
    mesh = tpu.mesh(tpu.V5E_4, x=4)
    large, row = tpu.shape(mesh, (4096, 8192)), tpu.shape(mesh, (8, 8192))

    def update(large, row, at):
        return jax.lax.dynamic_update_slice(large, row * 2, (at, 0))

    at = tpu.shape(mesh, (), dtype=jnp.int32)
    updated, _ = tpu.schedule(update, large, row, at, donate_argnums=0)
    assert read_work(updated, V5E, {"x": 4}).hbm_bytes == pytest.approx(2 * 8 * 8192 * 2, rel=0.01)
    taken, _ = tpu.schedule(lambda large, at: jax.lax.dynamic_slice(large, (at, 0), (8, 8192)) * 2, large, at)
    assert read_work(taken, V5E, {"x": 4}).hbm_bytes == pytest.approx(2 * 8 * 8192 * 2, rel=0.01)
    added, _ = tpu.schedule(lambda a, b: a + b, large, large)
    assert read_work(added, V5E, {"x": 4}).hbm_bytes == 3 * 4096 * 8192 * 2
    assert hlo.Array("bf16", (128, 768, 1, 128), (3, 2, 1, 0), (2, 128)).bytes == 2 * 128 * 768 * 128 * 2
    assert hlo.Array("f32", (100,), (0,), (1024,), space=1).hbm_bytes == 0


@tpu.needs_libtpu
def test_exchanges_are_recognised():
    """Kind, axes, sizes and times of what a shard_map asks for, inside a loop."""
    mesh = tpu.mesh(tpu.V5E_8, fsdp=4, tensor=2)

    def layer(x, w):
        x = x @ jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
        x = jax.lax.psum(x.astype(jnp.float32), "tensor").astype(x.dtype)
        return jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]), None

    def body(x, w):
        x = jax.lax.scan(layer, x, w)[0]
        return jax.lax.psum_scatter(x.astype(jnp.float32), ("fsdp", "tensor"), scatter_dimension=0, tiled=True)

    specs = {"in_specs": (P(), P(None, "fsdp")), "out_specs": P(("fsdp", "tensor"))}
    mapped = jax.shard_map(body, mesh=mesh, check_vma=False, **specs)
    text, _ = tpu.schedule(mapped, tpu.shape(mesh, (512, 1024)), tpu.shape(mesh, (3, 1024, 1024), None, "fsdp"))
    found = {one.kind: one for one in read_work(text, V5E, {"data": 1, "fsdp": 4, "tensor": 2}).traffic}
    gather, reduce = found["all-gather"], found["all-reduce"]
    assert (gather.axes, gather.dtype, gather.times, gather.bytes) == ("fsdp", "bf16", 3, 3 * 1024 * 1024 * 2)
    assert gather.wire_bytes == gather.bytes * 3 / 4
    assert (reduce.axes, reduce.dtype, reduce.times, reduce.bytes) == ("tensor", "f32", 3, 3 * 512 * 1024 * 4)
    assert reduce.wire_bytes == reduce.bytes
    permute, scatter = found["collective-permute"], found["reduce-scatter"]
    assert (permute.axes, permute.times, permute.bytes, permute.is_async) == ("fsdp", 3, 3 * 512 * 1024 * 2, True)
    assert (scatter.axes, scatter.times, scatter.bytes) == ("fsdp+tensor", 1, 512 * 1024 * 4)


@tpu.needs_libtpu
def test_exchanges_on_the_sparse_core():
    """v5p and v6e can hand exchanges to another processor of the chip: they are then asynchronous calls."""
    mesh = tpu.mesh(tpu.V6E_4, x=4)
    gather = jax.shard_map(
        lambda w: jax.lax.all_gather(w, "x", tiled=True), mesh=mesh, in_specs=P("x"), out_specs=P("x")
    )
    offload = {"xla_tpu_enable_sparse_core_collective_offload_all_gather": True}
    text, _ = tpu.schedule(gather, tpu.shape(mesh, (8192, 8192), "x"), compiler_options=offload)
    work = read_work(text, V6E, {"x": 4})
    (found,) = work.traffic
    assert (found.kind, found.axes, found.is_async, found.bytes) == ("all-gather", "x", True, 8192 * 8192 * 2)
    # Nothing is there to hide it.
    assert work.seconds["exposed"] == pytest.approx(found.wire_bytes / V6E.ici_bytes_per_second)


@tpu.needs_libtpu
def test_pallas_kernels():
    """A kernel's own estimate; attention's is held against its shapes in test_flash.py."""
    mesh = tpu.mesh(tpu.V5E_4, x=4)

    def double(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    def estimated(x):
        estimate = pl.CostEstimate(flops=12345, transcendentals=0, bytes_accessed=678)
        return pl.pallas_call(double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), cost_estimate=estimate)(x)

    text, _ = tpu.schedule(
        jax.shard_map(estimated, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False), tpu.shape(mesh, (256, 256))
    )
    work = read_work(text, V5E, {"x": 4})
    assert (work.kernel_flops, work.hbm_bytes) == (12345, 678)


def test_a_pallas_kernel_that_was_fused_with_an_exchange():
    """Its estimate stands there as it was written, over several lines."""
    text = """
HloModule m

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0:T(1024)} parameter(0)
  ROOT %kernel = f32[8]{0:T(1024)} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"cost_estimate": {
"bytes_accessed":678,
"flops":12345,
"transcendentals":9
}, "serialization_format": 1}
}
"""  # noqa: E501
    work = read_work(text, V5E, {"x": 4})
    assert (work.kernel_flops, work.hbm_bytes) == (12345, 678)


LOOP = """
HloModule m

%condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[8]{0:T(1024)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %limit = s32[]{:T(128)} constant(LIMIT)
  ROOT %compare = pred[]{:T(512)} compare(COMPARED), direction=DIRECTION
}

%body (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.1 = (s32[]{:T(128)}, f32[8]{0:T(1024)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x = f32[8]{0:T(1024)} get-tuple-element(%p.1), index=1
  %copied = s32[]{:T(128)S(6)} copy(%i.1)
  %step = s32[]{:T(128)} constant(STEP)
  %next = s32[]{:T(128)} add(%step, %copied)
  ROOT %out = (s32[]{:T(128)}, f32[8]{0:T(1024)}) tuple(%next, %x)
}

ENTRY %main (x.1: f32[8]) -> (s32[], f32[8]) {
  %x.1 = f32[8]{0:T(1024)} parameter(0)
  %start = s32[]{:T(128)} constant(START)
  %in = (s32[]{:T(128)}, f32[8]{0:T(1024)}) tuple(%start, %x.1)
  ROOT %loop = (s32[]{:T(128)}, f32[8]{0:T(1024)}) while(%in), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(
    ("start", "step", "compared", "direction", "limit", "trips"),
    [
        (0, 1, "%i, %limit", "LT", 32, 32),
        (0, 2, "%i, %limit", "LT", 15, 8),
        (1, 2, "%i, %limit", "LE", 15, 8),
        (31, -1, "%i, %limit", "GE", 0, 32),
        (0, 1, "%limit, %i", "GT", 32, 32),
        (0, 1, "%i, %limit", "NE", 32, 32),
        (40, 1, "%i, %limit", "LT", 32, 0),
        (0, 0, "%i, %limit", "LT", 32, None),
    ],
)
def test_trips(start, step, compared, direction, limit, trips):
    text = LOOP.replace("START", str(start)).replace("STEP", str(step)).replace("COMPARED", compared)
    module = hlo.parse(text.replace("DIRECTION", direction).replace("LIMIT", str(limit)))
    entry = module.computations[module.entry]
    assert hlo.trips(module, entry.root, entry) == trips


def test_trips_where_elements_are_written_short():
    """As libtpu 0.0.44 writes them: %p#0 for the get-tuple-element of index 0 of %p."""
    short = LOOP
    for name, tuple_, index in re.findall(r"  %(\S+) = .* get-tuple-element\(%(\S+)\), index=(\d)\n", LOOP):
        short = re.sub(rf"  %{re.escape(name)} = .*\n", "", short)
        short = re.sub(rf"%{re.escape(name)}(?=[,)])", f"%{tuple_}#{index}", short)
    assert "get-tuple-element" not in short and short.count("#") == 2
    values = {"COMPARED": "%p#0, %limit", "DIRECTION": "LT", "START": "3", "STEP": "2", "LIMIT": "15"}
    for name, value in values.items():
        short = short.replace(name, value)
    module = hlo.parse(short)
    entry = module.computations[module.entry]
    assert hlo.trips(module, entry.root, entry) == 6
    body = module.computations["body"]
    assert [user.name for user in body.users["p.1"]] == ["p.1#0", "p.1#1"]
    assert [user.name for user in body.users["p.1#1"]] == ["out"]


NESTED = """
ENTRY %main (p: (s32[], (bf16[8,128], f32[4,256]), u32[])) -> f32[4,256] {
  %p = (s32[], (bf16[8,128]{1,0:T(8,128)(2,1)}, /*index=5*/f32[4,256]{1,0:T(8,128)S(1)}), /*index=5*/u32[]) parameter(0)
LINES
}
"""
WRITTEN_OUT = """
  %e = (bf16[8,128]{1,0:T(8,128)(2,1)}, f32[4,256]{1,0:T(8,128)S(1)}) get-tuple-element(%p), index=1
  %e.1 = f32[4,256]{1,0:T(8,128)S(1)} get-tuple-element(%e), index=1
  ROOT %sum = f32[4,256]{1,0:T(8,128)} add(%e.1, %e.1)
"""


def test_elements_of_elements_written_short():
    """They are the instructions that they are short for, once each, and no work."""
    short, full = (
        hlo.parse(NESTED.replace("LINES", lines.strip("\n"))).computations["main"]
        for lines in ("  ROOT %sum = f32[4,256]{1,0:T(8,128)} add(%p#1#1, %p#1#1)", WRITTEN_OUT)
    )
    assert list(short.instructions) == ["p", "p#1", "p#1#1", "sum"]
    for one, other in zip(short.instructions.values(), full.instructions.values(), strict=True):
        assert (one.opcode, one.arrays, one.attributes) == (other.opcode, other.arrays, other.attributes)
    assert short.root.operands == ("p#1#1", "p#1#1")
    assert short.users["p#1"] == [short.instructions["p#1#1"]]
    module = hlo.Module({"main": short}, "main")
    # The operand lies in VMEM: what is written to HBM is the sum, in tiles of eight rows.
    assert sum(hlo_cost.hbm_bytes(module, one, short) for one in short.instructions.values()) == 8 * 256 * 4


SCHEDULE = """
ENTRY %main (x: f32[250000000]) -> f32[250000000] {
  %x = f32[250000000]{0} parameter(0)
  %start = (f32[250000000]{0}, f32[250000000]{0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %work = f32[250000000]{0} add(%x, %x), backend_config={"window_config":{"estimated_cycles":"CYCLES"}}
  %done = f32[250000000]{0} collective-permute-done(%start)
  %reduce = f32[250000000]{0} all-reduce(%done), replica_groups={{0,1}}, to_apply=%add
  ROOT %out = f32[250000000]{0} add(%reduce, %work)
}
"""


@pytest.mark.parametrize(("milliseconds", "exposed"), [(0, 20), (4, 16), (10, 10), (30, 10)])
def test_what_is_scheduled_in_between_hides_an_exchange(milliseconds, exposed):
    """1 GB at 100 GB/s takes 10 ms; a synchronous one cannot be hidden."""
    cycles = round(milliseconds * 1e-3 * V5E.clock)
    work = read_work(SCHEDULE.replace("CYCLES", str(cycles)), V5E, {"x": 2})
    assert work.seconds["compiler"] == pytest.approx(milliseconds * 1e-3)
    assert work.seconds["exposed"] == pytest.approx(exposed * 1e-3)


def test_kernels_that_visit_a_share_of_their_tiles():
    """They compute less, and hide less of an exchange: here 4 ms in full, of which a quarter is left."""
    flops = round(4e-3 * KERNEL_EFFICIENCY * V5E.flops)
    kernel = f'custom-call(%x), custom_call_target="{hlo.MOSAIC}", backend_config={{"cost_estimate":{{"flops":{flops},'
    text = re.sub("add\\(%x, %x\\).*", kernel + '"bytes_accessed":0}}', SCHEDULE)
    full = read_work(text, V5E, {"x": 2})
    assert full.seconds == pytest.approx({"compiler": 0, "kernels": 4e-3, "exposed": 16e-3})
    assert full.with_kernels(1, V5E.flops) == full
    part = full.with_kernels(0.25, V5E.flops)
    assert part.kernel_flops == flops / 4
    assert part.seconds == pytest.approx({"compiler": 0, "kernels": 1e-3, "exposed": 19e-3})
    assert full.roofline_seconds - part.roofline_seconds == pytest.approx(3e-3 * KERNEL_EFFICIENCY)


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("[2,2]<=[4]", ((0, 1), (2, 3))),
        ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2], device_ids=(0,1,3,2) {'b'}", ((0, 1), (3, 2))),
    ],
)
def test_groups_in_each_notation(written, groups):
    line = f"  ROOT %r = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={written}, to_apply=%add"
    module = hlo.parse("ENTRY %main (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0} parameter(0)\n" + line + "\n}\n")
    assert hlo_cost.groups(module.computations["main"].root) == groups


def test_not_a_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule m\n")
