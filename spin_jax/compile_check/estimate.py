"""What a compiled program needs and does on a slice, as numbers: from the compiler's schedule and a chip's data sheet.

Nothing here runs on a chip: every time is an estimate with an assumption, and says which.
"""

import collections
import dataclasses
import itertools
from collections.abc import Mapping

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
    time, alone = _Clock(module, chip, True), _Clock(module, chip, False)
    flops = kernel_flops = moved = compiler = kernels = roofline = 0.0
    loops, traffic = [], collections.defaultdict(lambda: np.zeros(3))
    for run in hlo.executed(module):
        one, here, times = run.instruction, run.computation, run.times
        matmuls, bytes_ = hlo_cost.flops(module, one, here), hlo_cost.hbm_bytes(module, one, here)
        flops += times * matmuls
        moved += times * bytes_
        compiler += times * one.cycles / chip.clock
        kernel = sum(flops for flops, _ in hlo_cost.kernels(module, one, here))
        kernel_flops += times * kernel
        kernels += times * time.kernels(one, here)
        roofline += times * max((matmuls + kernel) / chip.flops, bytes_ / (HBM_EFFICIENCY * chip.hbm_bytes_per_second))
        if exchange := hlo_cost.collective(module, one, here):
            dtypes = "+".join(sorted({array.dtype for array in exchange.arrays}))
            key = (exchange.kind, axes_of(exchange, mesh), dtypes, exchange.is_async)
            traffic[key] += times * np.array([1, exchange.bytes, exchange.wire_bytes])
        if one.opcode == "while":
            loops.append(_loop(module, run, chip))
    rows = [
        Traffic(kind, axes, dtype, is_async, int(n), float(whole), float(wire))
        for (kind, axes, dtype, is_async), (n, whole, wire) in traffic.items()
    ]
    return Work(
        flops=flops,
        kernel_flops=kernel_flops,
        hbm_bytes=moved,
        seconds={"compiler": compiler, "kernels": kernels, "exposed": time.computation(module.entry)[1]},
        exposed_alone=alone.computation(module.entry)[1],
        roofline_seconds=roofline,
        loops=tuple(loops),
        traffic=tuple(sorted(rows, key=lambda row: -row.wire_bytes)),
    )


def _loop(module: Module, run: hlo.Run, chip: Chip) -> Loop:
    body = list(hlo.executed(module, run.instruction.called["body"]))
    return Loop(
        name=run.instruction.op_name,
        times=run.times,
        trips=hlo.trips(module, run.instruction, run.computation),
        hbm_bytes=sum(one.times * hlo_cost.hbm_bytes(module, one.instruction, one.computation) for one in body),
        seconds=sum(one.times * one.instruction.cycles for one in body) / chip.clock,
    )


class _Clock:
    """Walks schedules with a chip's speeds; Pallas kernels take their time, or none."""

    def __init__(self, module: Module, chip: Chip, with_kernels: bool):
        self._module, self._chip, self._with_kernels = module, chip, with_kernels

    def kernels(self, instruction: Instruction, computation: Computation) -> float:
        """Seconds of the Pallas kernels in an instruction."""
        if not self._with_kernels:
            return 0.0
        flops, bytes_ = KERNEL_EFFICIENCY * self._chip.flops, HBM_EFFICIENCY * self._chip.hbm_bytes_per_second
        found = hlo_cost.kernels(self._module, instruction, computation)
        return sum(max(kernel_flops / flops, moved / bytes_) for kernel_flops, moved in found)

    def computation(self, name: str) -> tuple[float, float]:
        """(seconds, of which waiting for other chips) of one run of a computation.

        The links carry one exchange after the other. An asynchronous one is waited for where it ends, so far as what is
        scheduled in between has not hidden it; one that ends in another computation is taken as hidden.
        """
        here = self._module.computations[name]
        now = waited = links = 0.0
        finish: dict[str, float] = {}
        for instruction in here.instructions.values():
            exchange = hlo_cost.collective(self._module, instruction, here)
            if exchange:
                links = max(links, now) + exchange.wire_bytes / self._chip.ici_bytes_per_second
                finish[exchange.ends] = links
            ended = instruction.name if exchange and not exchange.is_async else None
            ended = ended or hlo_cost.ended(self._module, instruction, here)
            wait = max(0.0, finish.pop(ended, 0.0) - now)
            inside, inside_waited = self._inside(instruction, here)
            now += wait + inside + instruction.cycles / self._chip.clock + self.kernels(instruction, here)
            waited += wait + inside_waited
        return now, waited

    def _inside(self, instruction: Instruction, here: Computation) -> tuple[float, float]:
        if instruction.opcode == "while":
            times = hlo.trips(self._module, instruction, here) or 1
            runs = [(times, self.computation(instruction.called[part])) for part in ("condition", "body")]
        elif instruction.opcode in ("call", "conditional"):
            runs = [(1, self.computation(next(iter(instruction.called.values()))))]
        else:
            return 0.0, 0.0
        return sum(n * seconds for n, (seconds, _) in runs), sum(n * waited for n, (_, waited) in runs)


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
