"""What the instructions of a compiled program cost: matmul FLOPs, HBM bytes, traffic between chips.

Each function answers for one run of one instruction; `estimate.read_work` weighs them by how often it runs.
"""

import dataclasses
import math
import re

import numpy as np

from spin_jax.compile_check.hlo import MOSAIC, Array, Computation, Instruction, Module

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")

# Opcodes that name, bundle or forward values and move none. What a loop or a call moves is counted inside it.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all add-dependency partition-id "
    "replica-id opt-barrier async-update".split()
)
_FREE_CUSTOM_CALLS = frozenset("AllocateBuffer ConcatBitcast AssumeGatherIndicesInBound AsyncCollectiveDone".split())
# Of their operand these read the elements that are asked of their result.
_ELEMENTWISE = frozenset("bitcast convert copy reshape transpose".split())

# FLOPs


def flops(module: Module, instruction: Instruction, computation: Computation) -> float:
    """FLOPs of the matmuls in one run of an instruction, fused ones included: 2 for each multiply and add."""
    if instruction.opcode == "dot":
        return _dot_flops(instruction, computation)
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, computation)
    if instruction.opcode in ("fusion", "async-start"):
        inner = module.computations[instruction.called["calls"]]
        return sum(flops(module, one, inner) for one in inner.instructions.values())
    return 0.0


def _dot_flops(instruction: Instruction, computation: Computation) -> float:
    left = computation.instructions[instruction.operands[0]].arrays[0]
    axes = [int(axis) for axis in re.findall(r"\d+", instruction.attribute("lhs_contracting_dims"))]
    return 2.0 * instruction.arrays[0].elements * math.prod(left.dims[axis] for axis in axes)


def _convolution_flops(instruction: Instruction, computation: Computation) -> float:
    """A TPU multiplies matrices by convolution, with batch axes as windows: taps on padding do not count."""
    left, right = (computation.instructions[name].arrays[0] for name in instruction.operands[:2])
    result = instruction.arrays[0]
    left_labels, right_labels, result_labels = re.split("_|->", instruction.attribute("dim_labels"))
    window = dict(re.findall(r"(\w+)=(\S+)", instruction.attribute("window")[1:-1]))

    def setting(name: str, axis: int, default: str) -> str:
        return window[name].split("x")[axis] if name in window else default

    taps = 1
    for axis in range(len(left_labels) - 2):
        size, stop = left.dims[left_labels.index(str(axis))], result.dims[result_labels.index(str(axis))]
        offsets = np.arange(int(setting("size", axis, "1"))) * int(setting("rhs_dilate", axis, "1"))
        starts = np.arange(stop) * int(setting("stride", axis, "1")) - int(setting("pad", axis, "0_0").split("_")[0])
        places, spread = starts[None, :] + offsets[:, None], int(setting("lhs_dilate", axis, "1"))
        taps *= np.count_nonzero((places >= 0) & (places % spread == 0) & (places // spread < size))
    outputs = result.dims[result_labels.index("b")] * result.dims[result_labels.index("f")]
    return 2.0 * outputs * right.dims[right_labels.index("i")] * float(taps)


def kernels(module: Module, instruction: Instruction, computation: Computation) -> list[tuple[float, float]]:
    """(FLOPs, HBM bytes) of each Pallas kernel in one run of an instruction; one may be fused with an exchange that it
    hides."""
    if instruction.target == MOSAIC:
        # By its author's estimate.
        return [(_estimated(instruction, "flops") or 0.0, hbm_bytes(module, instruction, computation))]
    if instruction.opcode in ("fusion", "async-start"):
        inner = module.computations[instruction.called["calls"]]
        return [kernel for one in inner.instructions.values() for kernel in kernels(module, one, inner)]
    return []


def _estimated(instruction: Instruction, what: str) -> float | None:
    """What a Pallas kernel's author says of it. Fused with an exchange, its text has other spaces and quotes."""
    found = re.search(rf'"cost_estimate":\s*\{{[^}}]*"{what}":\s*"?(\d+)', instruction.attributes)
    return float(found[1]) if found else None


# HBM traffic


def hbm_bytes(module: Module, instruction: Instruction, computation: Computation) -> float:
    """Bytes that one run of an instruction reads from and writes to HBM.

    An operand or result counts in full, tile padding included, unless it lies in another memory space or the
    instruction touches a part alone: slices, gathers and in-place updates count what they touch. DMAs count at their
    start, Pallas kernels with their author's estimate where the call has one.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done") or instruction.target in _FREE_CUSTOM_CALLS:
        return 0.0
    if (estimate := _estimated(instruction, "bytes_accessed")) is not None:
        return estimate
    if opcode in ("fusion", "async-start"):
        return _fused_bytes(module, module.computations[instruction.called["calls"]])
    if opcode.endswith("-start"):
        # (destination, source, context) of a copy; (operand, result, context) of a collective.
        return sum(array.hbm_bytes for array in instruction.arrays if array.elements > 1)
    read = 0.0
    for place, name in enumerate(instruction.operands):
        arrays = computation.instructions[name].arrays
        read += sum(array.hbm_bytes for array in arrays) * _share(module, instruction, place, computation)
    return read + _written(instruction, computation)


def _fused_bytes(module: Module, fused: Computation) -> float:
    read = sum(_share_inside(module, fused, one) * one.arrays[0].hbm_bytes for one in fused.parameters if one.arrays)
    roots = fused.root.operands if fused.root.opcode == "tuple" else (fused.root.name,)
    return read + sum(_written(fused.instructions[name], fused) for name in roots)


def _share(module: Module, user: Instruction, place: int, computation: Computation) -> float:
    """The share of its `place`-th operand's elements that an instruction reads."""
    operand = computation.instructions[user.operands[place]].arrays
    if user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
        return min(1.0, user.arrays[0].elements / max(1, operand[0].elements))
    if user.opcode in ("dynamic-update-slice", "scatter") and place == 0:
        return 0.0
    if user.opcode == "fusion":
        inner = module.computations[user.called["calls"]]
        return _share_inside(module, inner, inner.parameters[place])
    return 1.0


def _share_inside(module: Module, fused: Computation, value: Instruction) -> float:
    """The share of a value's elements that the instructions of a fused computation read."""
    share = 0.0
    for user in fused.users[value.name]:
        if user.opcode in ("tuple", "bitcast") and user is fused.root or _continues(fused, user):
            continue  # handed on untouched
        if user.opcode in _ELEMENTWISE and user is not fused.root:
            share += _share_inside(module, fused, user)
        else:
            places = [place for place, name in enumerate(user.operands) if name == value.name]
            share += sum(_share(module, user, place, fused) for place in places)
    return min(1.0, share)


def _written(instruction: Instruction, computation: Computation) -> float:
    """HBM bytes that an instruction's result takes to write; 0 for what is handed on."""
    source = instruction
    while source.opcode == "bitcast":
        source = computation.instructions[source.operands[0]]
    handed_on = source.opcode in ("parameter", "get-tuple-element") or source.target in _FREE_CUSTOM_CALLS
    if handed_on or source.target == "AsyncCollectiveStart" or _continues(computation, source):
        return 0.0
    if source.opcode in ("dynamic-update-slice", "scatter"):
        update = computation.instructions[source.operands[1 if source.opcode == "dynamic-update-slice" else -1]]
        return 0.0 if source.arrays[0].space else update.arrays[0].bytes
    return sum(array.hbm_bytes for array in instruction.arrays)


# Traffic between chips


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between chips.

    Attributes:
        kind: one of COLLECTIVES.
        arrays: the whole: the result of an all-gather, the operand of the others.
        groups: partition ids that exchange with each other; pairs of source and target for a collective-permute.
        is_async: it runs beside what is scheduled between its start and its end.
        ends: what names its end: the start's own name, or the channel of a chain of fusions.
    """

    kind: str
    arrays: tuple[Array, ...]
    groups: tuple[tuple[int, ...], ...]
    is_async: bool
    ends: str

    @property
    def bytes(self) -> float:
        return sum(array.elements * array.bits / 8 for array in self.arrays)

    @property
    def wire_bytes(self) -> float:
        """Bytes that a chip sends, with ring algorithms: (n - 1) / n of the whole, twice that for an all-reduce."""
        if self.kind == "collective-permute":
            return self.bytes
        n = max((len(group) for group in self.groups), default=1)
        return self.bytes * (n - 1) / n * (2 if self.kind == "all-reduce" else 1)


def collective(module: Module, instruction: Instruction, computation: Computation) -> Collective | None:
    """The exchange that an instruction is, starts or has fused into it; None for all others, and for an exchange that
    an earlier instruction has started."""
    kind = instruction.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
        return _collective(instruction, computation, kind, kind != instruction.opcode, instruction.name)
    if instruction.opcode not in ("fusion", "async-start"):
        return None
    found = _find_collective(module, instruction)
    if found is None:
        return None
    one, inner = found
    chain = _chain(one)
    if chain and not _starts(inner):
        return None
    # libtpu's reduce-scatter is a fusion of this name around an all-reduce.
    kind = "reduce-scatter" if "all-reduce-scatter" in inner.name else one.opcode
    is_async = instruction.opcode == "async-start" or bool(chain)
    return _collective(one, inner, kind, is_async, chain or instruction.name)


def _find_collective(module: Module, instruction: Instruction) -> tuple[Instruction, Computation] | None:
    """The first exchange in what a fusion, an asynchronous instruction or a call runs, with its computation. From
    libtpu 0.0.52 on, a SparseCore's is in a custom call."""
    for name in instruction.called.values():
        inner = module.computations[name]
        for one in inner.instructions.values():
            if one.opcode in COLLECTIVES:
                return one, inner
            if one.opcode in ("fusion", "call", "custom-call") and (found := _find_collective(module, one)):
                return found
    return None


def ended(module: Module, instruction: Instruction, computation: Computation) -> str:
    """The `ends` of the asynchronous exchange that an instruction waits for; "" if it waits for none."""
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called["calls"]]
        if any(one.target == "AsyncCollectiveDone" for one in inner.instructions.values()):
            return next((_chain(one) for one in inner.instructions.values() if one.opcode in COLLECTIVES), "")
    if not instruction.opcode.endswith("-done"):
        return ""
    start = computation.instructions[instruction.operands[0]]
    while start.opcode == "async-update":
        start = computation.instructions[start.operands[0]]
    return start.name


def _chain(instruction: Instruction) -> str:
    """libtpu spreads one exchange over a chain of fusions, each of which names the whole: what they have in common."""
    return f"channel {instruction.attribute('channel_id')}" if "chain_id=" in instruction.attributes else ""


def _starts(computation: Computation) -> bool:
    return any(one.target == "AsyncCollectiveStart" for one in computation.instructions.values())


def _continues(computation: Computation, instruction: Instruction) -> bool:
    return instruction.opcode in COLLECTIVES and bool(_chain(instruction)) and not _starts(computation)


def _collective(instruction: Instruction, computation: Computation, kind: str, is_async: bool, ends: str) -> Collective:
    arrays = tuple(array for name in instruction.operands for array in computation.instructions[name].arrays)
    if kind == "all-gather" and instruction.opcode == "all-gather-start":
        arrays = instruction.arrays[len(arrays) : 2 * len(arrays)]  # (operands, results, context)
    elif kind == "all-gather":
        arrays = instruction.arrays
    return Collective(kind, arrays, groups(instruction), is_async, ends)


def groups(instruction: Instruction) -> tuple[tuple[int, ...], ...]:
    """Partition ids that exchange with each other, from each of the ways in which HLO writes them: a list, a list by
    formula ([4,2]<=[2,4]T(1,0)), a mesh with the names of its axes (mesh['a'=2,'b'=4] {'b'})."""
    text = instruction.attribute("source_target_pairs") or instruction.attribute("replica_groups")
    if text.startswith("{"):
        return tuple(tuple(map(int, re.findall(r"\d+", group))) for group in re.findall(r"\{([\d,\s]+)\}", text))
    text = instruction.attributes.partition("replica_groups=")[2]
    if named := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))?\s*\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        ids = _ids(named[2] or f"[{math.prod(sizes.values())}]").reshape(*sizes.values())
        inside = [list(sizes).index(name) for name in re.findall(r"'([^']+)'", named[3])]
        outside = [axis for axis in range(len(sizes)) if axis not in inside]
        members = math.prod(ids.shape[axis] for axis in inside)
        return tuple(map(tuple, ids.transpose(outside + inside).reshape(-1, members).tolist()))
    if formula := re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return tuple(map(tuple, _ids(formula[2]).reshape(_numbers(formula[1])).tolist()))
    return ()


def _ids(text: str) -> np.ndarray:
    """Partition ids as HLO writes their order: "[2,8]T(1,0)" is 0..15 as [2, 8], transposed; "0,2,1,3" is itself."""
    if not (formula := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)):
        return np.array(_numbers(text))
    shape = _numbers(formula[1])
    return np.arange(math.prod(shape)).reshape(shape).transpose(_numbers(formula[2]) if formula[2] else None)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", text)]
