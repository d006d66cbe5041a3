"""What a compiled program needs and does on a slice, as numbers: from the compiler's schedule and a chip's data sheet.

Nothing here runs on a chip: every time is an estimate with an assumption, and says which.
"""

import collections
import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from spin_jax.compile_check import hlo, hlo_cost
from spin_jax.compile_check.hlo import Computation, Instruction, Module
from spin_jax.devices.accelerators import Chip

# Of the peak: what streams from HBM reach, and what a Pallas attention kernel reaches (the rest is softmax).
HBM_EFFICIENCY = 0.9
KERNEL_EFFICIENCY = 0.4

ASSUMPTIONS = {
    "compiler": "the compiler's cycles for each instruction, at the nominal clock; pessimistic where memory-bound",
    "kernels": "tiles that Pallas kernels visit, "
    f"at {KERNEL_EFFICIENCY:.0%} of peak FLOPs or {HBM_EFFICIENCY:.0%} of HBM, the slower",
    "exposed": "traffic between chips not hidden: rings over one torus axis, in the order of the compiler's schedule",
}


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of the program.

    Attributes:
        times: how often it is entered.
        trips: how often its body runs each time; None: unknown, and counted once everywhere.
        hbm_bytes: moved by one trip on a chip, inner loops included.
        seconds: of the compiler's cycles for one trip.
    """

    name: str
    times: int
    trips: int | None
    hbm_bytes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All exchanges of one sort in a run of the program.

    Attributes:
        axes: the mesh axes that exchange, such as "fsdp"; "of 8" for groups of 8 that no axes make.
        times: exchanges in a run.
        bytes: of the wholes that are gathered or reduced, all exchanges together.
        wire_bytes: that a chip sends for them.
    """

    kind: str
    axes: str
    dtype: str
    is_async: bool
    times: int
    bytes: float
    wire_bytes: float


@dataclasses.dataclass(frozen=True)
class Work:
    """What one run of a program does on each chip.

    Attributes:
        flops: of matmuls, loop trips counted.
        kernel_flops: of Pallas kernels.
        hbm_bytes: moved; by kernels as much as their authors estimate.
        seconds: by the keys of ASSUMPTIONS; they add up.
        exposed_alone: seconds["exposed"] if kernels took no time, and so hid nothing.
        roofline_seconds: every instruction at peak FLOPs or at HBM_EFFICIENCY of HBM, whichever is slower, summed; no
            traffic between chips.
    """

    flops: float
    kernel_flops: float
    hbm_bytes: float
    seconds: dict[str, float]
    exposed_alone: float
    roofline_seconds: float
    loops: tuple[Loop, ...]
    traffic: tuple[Traffic, ...]

    @staticmethod
    def from_json(fields: Mapping) -> "Work":
        loops = tuple(Loop(**loop) for loop in fields["loops"])
        return Work(**{**fields, "loops": loops, "traffic": tuple(Traffic(**one) for one in fields["traffic"])})

    def with_kernels(self, share: float, peak_flops: float) -> "Work":
        """The same where kernels do a share of what their authors estimate, FLOPs and bytes alike.

        Exposed seconds are convex in the share, as a longest path is in the lengths of its parts. They are read from
        the chord between no kernels and whole ones, which lies above. The roofline takes kernels as limited by FLOPs.
        """
        exposed = share * self.seconds["exposed"] + (1 - share) * self.exposed_alone
        return dataclasses.replace(
            self,
            kernel_flops=share * self.kernel_flops,
            seconds=self.seconds | {"kernels": share * self.seconds["kernels"], "exposed": exposed},
            roofline_seconds=self.roofline_seconds - (1 - share) * self.kernel_flops / peak_flops,
        )


def read_work(text: str, chip: Chip, mesh: Mapping[str, int]) -> Work:
    """Adds up a program from the text of its schedule; Pallas kernels do what their authors estimate.

    Args:
        mesh: size of each mesh axis, in the order in which devices are numbered.
    """
    module = hlo.parse(text)
    sums, loops = _run(module, module.entry, chip, mesh)
    exposed, exposed_alone = map(float, sums["waited"])
    traffic = [
        Traffic(*key, times=int(times), bytes=float(whole), wire_bytes=float(wire))
        for key, (times, whole, wire) in ((key, value) for key, value in sums.items() if isinstance(key, tuple))
    ]
    return Work(
        flops=sums["flops"],
        kernel_flops=sums["kernel_flops"],
        hbm_bytes=sums["hbm_bytes"],
        seconds={"compiler": sums["compiler"], "kernels": sums["kernels"], "exposed": exposed},
        exposed_alone=exposed_alone,
        roofline_seconds=sums["roofline_seconds"],
        loops=tuple(loops),
        traffic=tuple(sorted(traffic, key=lambda row: -row.wire_bytes)),
    )


def _run(module: Module, name: str, chip: Chip, mesh: Mapping[str, int]) -> tuple[dict[Any, Any], list[Loop]]:
    """(sums, loops) of one run of a computation: what its instructions take, and what they call, as often as it runs.

    Sums are those of `Work` by their names; (kind, axes, dtype, is_async) -> [times, bytes, wire_bytes] of exchanges;
    and "elapsed" and "waited", seconds in all and of waiting for other chips, [2]: with kernels that take their time,
    and with kernels that take none.

    The links carry one exchange after the other. An asynchronous one is waited for where it ends, so far as what is
    scheduled in between has not hidden it; one that ends in another computation is taken as hidden.
    """
    here = module.computations[name]
    sums: dict[Any, Any] = collections.defaultdict(float, elapsed=np.zeros(2), waited=np.zeros(2))
    loops, links, finish = [], np.zeros(2), {}
    for one in here.instructions.values():
        now, own = sums["elapsed"], _costs(module, one, here, chip)
        exchange = hlo_cost.collective(module, one, here)
        if exchange:
            links = np.maximum(links, now) + exchange.wire_bytes / chip.ici_bytes_per_second
            finish[exchange.ends] = links
            dtypes = "+".join(sorted({array.dtype for array in exchange.arrays}))
            key = (exchange.kind, axes_of(exchange, mesh), dtypes, exchange.is_async)
            own[key] = np.array([1, exchange.bytes, exchange.wire_bytes])
        ended = one.name if exchange and not exchange.is_async else hlo_cost.ended(module, one, here)
        waited = np.maximum(0.0, finish.pop(ended, now) - now)
        own |= {"waited": waited, "elapsed": waited + own["compiler"] + own["kernels"] * np.array([1, 0])}
        parts = [(1, own, [])]
        if one.opcode == "while":
            trips = hlo.trips(module, one, here)
            condition, body = (_run(module, one.called[part], chip, mesh) for part in ("condition", "body"))
            loop = Loop(one.op_name, 1, trips, hbm_bytes=body[0]["hbm_bytes"], seconds=body[0]["compiler"])
            parts += [(1, {}, [loop]), (trips or 1, *condition), (trips or 1, *body)]
        elif one.opcode in ("call", "conditional"):
            # Of a conditional's branches the first, which is the dearest where they are made
            # (`attention.attend_cached`, `sampling.next_tokens`).
            parts.append((1, *_run(module, next(iter(one.called.values())), chip, mesh)))
        for times, added, inner in parts:
            for key, value in added.items():
                sums[key] = sums[key] + times * value
            loops += [dataclasses.replace(loop, times=times * loop.times) for loop in inner]
    return sums, loops


def _costs(module: Module, one: Instruction, here: Computation, chip: Chip) -> dict[Any, Any]:
    """The sums of `_run` for one instruction, without its waiting for other chips and without what it calls."""
    flops, moved = hlo_cost.flops(module, one, here), hlo_cost.hbm_bytes(module, one, here)
    kernels, hbm_speed = hlo_cost.kernels(module, one, here), HBM_EFFICIENCY * chip.hbm_bytes_per_second
    kernel_flops = sum(of_kernel for of_kernel, _ in kernels)
    return {
        "flops": flops,
        "kernel_flops": kernel_flops,
        "hbm_bytes": moved,
        "compiler": one.cycles / chip.clock,
        "kernels": sum(max(work / (KERNEL_EFFICIENCY * chip.flops), size / hbm_speed) for work, size in kernels),
        "roofline_seconds": max((flops + kernel_flops) / chip.flops, moved / hbm_speed),
    }


def axes_of(exchange: hlo_cost.Collective, mesh: Mapping[str, int]) -> str:
    """The mesh axes whose chips exchange, joined by "+"; "of N" for groups that are not those of any axes."""
    sizes = [size for size in mesh.values() if size > 1]
    names = [name for name, size in mesh.items() if size > 1]
    ids = np.arange(int(np.prod(sizes))).reshape(sizes)
    if exchange.kind == "collective-permute":
        places = [(np.argwhere(ids == a), np.argwhere(ids == b)) for a, b in exchange.groups]
        moved = np.any([np.any(a != b, axis=0) for a, b in places if len(a) and len(b)], axis=0)
        return "+".join(np.array(names)[np.atleast_1d(moved)]) if np.ndim(moved) else "of 2"
    wanted = {frozenset(group) for group in exchange.groups}
    for count in range(1, len(names) + 1):
        for axes in itertools.combinations(range(len(names)), count):
            rest = [axis for axis in range(len(names)) if axis not in axes]
            rows = ids.transpose(rest + list(axes)).reshape(-1, int(np.prod([sizes[axis] for axis in axes])))
            if wanted == {frozenset(row) for row in rows.tolist()}:
                return "+".join(names[axis] for axis in axes)
    return f"of {max(map(len, exchange.groups), default=1)}"
