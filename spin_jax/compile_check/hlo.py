"""What a compiled TPU program does, read from the text of its schedule (XLA's dump `*.after_codegen.txt`).

XLA's own `cost_analysis` counts the body of a loop once, whatever its trips, and knows no traffic between chips. Here
every instruction is weighted by how often it runs: `parse` reads the text, `trips` says how often a loop goes round,
`hlo_cost` what one run of an instruction costs, and `estimate` adds up.

The text is version-dependent; it was read with libtpu 0.0.42 (jax 0.10.2), 0.0.44 (jax 0.11.0) and 0.0.52.
https://openxla.org/xla/operation_semantics
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

MOSAIC = "tpu_custom_call"  # the custom call of a Pallas kernel

_FORWARDING = frozenset("copy copy-start copy-done bitcast convert opt-barrier".split())
_BITS = {"pred": 8, "token": 0, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result.

    Attributes:
        minor_to_major: the axes, fastest first; () if the text gives no layout.
        tile: the first tile of the layout, () if it has none: the minor axes are padded to multiples of it.
        space: memory space; 0 is HBM, 1 is VMEM, 2 and above are scalars, semaphores and the host.
    """

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bits(self) -> int:
        """Bits of an element: "bf16" has 16, "pred" 8, "f8e4m3fn" 8."""
        return _BITS[self.dtype] if self.dtype in _BITS else int(_found(r"\d+", self.dtype)[0])

    @property
    def bytes(self) -> float:
        """Bytes that the array takes, padding of its tiles included."""
        physical = [self.dims[axis] for axis in reversed(self.minor_to_major)] or list(self.dims)
        for place, size in enumerate(reversed(self.tile), start=1):
            if place <= len(physical):
                physical[-place] = -(-physical[-place] // size) * size
        return math.prod(physical) * self.bits / 8

    @property
    def hbm_bytes(self) -> float:
        """Bytes that it takes in HBM: 0 for an array elsewhere."""
        return 0.0 if self.space else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        type: of the result, as it is written.
        operands: names of instructions in the same computation.
        attributes: the rest of the line, from the closing parenthesis on.
        literal: the text between the parentheses where it is not operands: a constant's value, a parameter's number.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    attributes: str
    literal: str
    is_root: bool

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of the result, those of nested tuples in order."""
        return _parse_arrays(self.type)

    @functools.cached_property
    def called(self) -> dict[str, str]:
        """Computations that the line names, by attribute: body, condition, calls, to_apply, ..."""
        found = dict(
            re.findall(
                r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%([\w.-]+)", self.attributes
            )
        )
        branches = re.search(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}", self.attributes)
        names = re.findall(r"%([\w.-]+)", branches[1]) if branches else []
        return found | {f"branch {i}": name for i, name in enumerate(names)}

    @property
    def op_name(self) -> str:
        """The path of scopes that JAX gave the operation."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """What a custom call calls."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def cycles(self) -> int:
        """The compiler's own estimate of one run; 0 where it makes none (DMAs, collectives, Mosaic kernels)."""
        found = re.search(r'"estimated_cycles":"(-?\d+)"', self.attributes)
        return max(0, int(found[1])) if found else 0

    def attribute(self, name: str) -> str:
        """The value of `name=...`, braces balanced; '' where it is not there."""
        start = self.attributes.find(f"{name}=")
        if start < 0:
            return ""
        start += len(name) + 1
        if self.attributes[start] == "{":
            return self.attributes[start : _closing(self.attributes, start) + 1]
        return _found(r"^[^,\s]*", self.attributes[start:])[0]


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in schedule order where the module is scheduled."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.is_root)

    @functools.cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return tuple(sorted(found, key=lambda i: int(i.literal)))

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return users


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, and the name of the one it starts with."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Reads the text of an HLO module.

    Raises:
        ValueError: there is no entry computation: the text is not an HLO module.
    """
    computations, entry, name, lines = {}, None, None, []
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line) if name is None else None
        if header:
            name, lines = header[2], []
            entry = name if header[1] else entry
        elif name is not None and re.fullmatch(r'}(, execution_thread="\w+")?', line):
            computations[name], name = Computation(name, _parse_instructions(lines)), None
        elif re.match(r"  (ROOT )?%[\w.-]+ = ", line):
            lines.append(line)
        elif name is not None and lines:
            lines[-1] += line  # the metadata of a Pallas kernel has line breaks in it
    if entry is None:
        raise ValueError("no ENTRY computation in the text")
    return Module(computations, entry)


def _parse_instructions(lines: list[str]) -> dict[str, Instruction]:
    """By name. An operand %t#1 is short for the get-tuple-element of index 1 of %t, and %t#1#0 for one of that: each
    becomes an instruction of its own before the first that uses it, as older compilers wrote it."""
    found: dict[str, Instruction] = {}

    def write_out(element: str) -> None:
        whole, _, index = element.rpartition("#")
        if whole and element not in found:
            write_out(whole)
            of = _element_types(found[whole].type)[int(index)]
            found[element] = _parse_instruction(f"%{element} = {of} get-tuple-element(%{whole}), index={index}")

    for line in lines:
        instruction = _parse_instruction(line)
        for operand in instruction.operands:
            write_out(operand)
        found[instruction.name] = instruction
    return found


def _element_types(text: str) -> list[str]:
    """Of "(s32[], (f32[8,2]{1,0}, u32[]))" the two elements, "s32[]" and "(f32[8,2]{1,0}, u32[])"."""
    text = re.sub(r"/\*.*?\*/", "", text)  # /*index=5*/ before every fifth
    elements, depth, start = [], 0, 1
    for place, character in enumerate(text):
        depth += (character in "({[") - (character in ")}]")
        if depth == 0 or depth == 1 and character == ",":
            elements.append(text[start:place].strip())
            start = place + 1
    return elements


def _parse_instruction(line: str) -> Instruction:
    head, rest = line.strip().split(" = ", 1)
    if rest[0] == "(":
        end = _closing(rest, 0) + 1
    else:
        end = rest.index(" ", rest.index("]"))
    opcode = _found(r"^\s*([\w-]+)\(", rest[end:])
    start = end + opcode.end() - 1
    close = _closing(rest, start)
    inside = rest[start + 1 : close]
    literal = opcode[1] in ("constant", "parameter")
    return Instruction(
        name=head.removeprefix("ROOT ").lstrip("%"),
        opcode=opcode[1],
        type=rest[:end],
        operands=() if literal else tuple(re.findall(r"%([\w.#-]+)", inside)),
        attributes=rest[close + 1 :],
        literal=inside if literal else "",
        is_root=head.startswith("ROOT "),
    )


_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([\d,]*)((?::[^{}]*)?)\})?")


@functools.lru_cache(maxsize=4096)
def _parse_arrays(text: str) -> tuple[Array, ...]:
    arrays = []
    for dtype, dims, order, layout in _ARRAY.findall(text):
        tile, space = re.search(r"T\(([\d,]+)\)", layout), re.search(r"S\((\d+)\)", layout)
        arrays.append(
            Array(dtype, _ints(dims.replace("<=", "")), _ints(order), _ints(tile[1]) if tile else (),
                  int(space[1]) if space else 0)
        )  # fmt: skip
    return tuple(arrays)


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _found(pattern: str, text: str) -> re.Match[str]:
    """What the text begins with, or has in it; a schedule always does."""
    match = re.search(pattern, text)
    assert match, f"no {pattern} in {text[:200]!r}"
    return match


def _closing(text: str, start: int) -> int:
    """The place of the bracket that closes the one at `start`; quoted text is passed over."""
    depth = 0
    for match in re.compile(r'"(?:[^"\\]|\\.)*"|[(){}\[\]]').finditer(text, start):
        if match[0] in "({[":
            depth += 1
        elif match[0] in ")}]":
            depth -= 1
            if depth == 0:
                return match.start()
    raise ValueError(f"unbalanced brackets in {text[:80]!r}")


def trips(module: Module, loop: Instruction, computation: Computation) -> int | None:
    """How often a `while` of `computation` runs its body: from the start, step and bound of the counter that its
    condition compares.

    Windowed einsums step by 2, `lax.scan` by 1. A loop that may end sooner (sampling, once all rows are done) gives its
    bound. None: no counter with a known bound was found.
    """
    condition, body = (module.computations[loop.called[part]] for part in ("condition", "body"))
    initial = computation.instructions[loop.operands[0]]

    def start(entry: int) -> int | None:
        found = _linear(module, computation, initial.operands[entry]) if initial.opcode == "tuple" else None
        return found.offset if found and found.entry is None else None

    def step(entry: int) -> int | None:
        found = _linear(module, body, body.root.operands[entry]) if body.root.opcode == "tuple" else None
        return found.offset if found and found.entry == entry else None

    for direction, left, right in _comparisons(module, condition):
        if left.entry is None or not step(left.entry):
            direction = direction.translate(str.maketrans("LG", "GL"))
            left, right = right, left
        if left.entry is None or not (stride := step(left.entry)) or (first := start(left.entry)) is None:
            continue
        bound = 0 if right.entry is None else start(right.entry) if step(right.entry) == 0 else None
        if bound is not None:
            bound += right.offset - left.offset + {"LE": 1, "GE": -1}.get(direction, 0)
            return max(0, math.ceil((bound - first) / stride))
    return None


@dataclasses.dataclass(frozen=True)
class _Linear:
    """An integer that is entry number `entry` of a loop's tuple plus `offset`, or a constant (entry None)."""

    entry: int | None
    offset: int


def _linear(
    module: Module, inside: Computation, name: str, arguments: list[_Linear | None] | None = None
) -> _Linear | None:
    """What an integer is in terms of the loop's tuple; None if it is anything else.

    Args:
        arguments: of a fused or called computation; None in a loop's own, whose parameter is the tuple.
    """
    instruction = inside.instructions[name]
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "constant":
        return _Linear(None, int(instruction.literal)) if re.fullmatch(r"-?\d+", instruction.literal) else None
    if opcode == "parameter":
        return arguments[int(instruction.literal)] if arguments is not None else None
    if opcode == "get-tuple-element" and inside.instructions[operands[0]].opcode == "parameter":
        return _Linear(int(instruction.attribute("index")), 0) if arguments is None else None
    if opcode in ("add", "subtract"):
        one, other = (_linear(module, inside, operand, arguments) for operand in operands)
        if one and other and (other.entry is None or (opcode == "add" and one.entry is None)):
            sign = 1 if opcode == "add" else -1
            return _Linear(other.entry if one.entry is None else one.entry, one.offset + sign * other.offset)
        return None
    if opcode in ("fusion", "call"):
        called = module.computations[next(iter(instruction.called.values()))]
        return _linear(module, called, called.root.name, _arguments(module, inside, instruction, arguments))
    return _linear(module, inside, operands[0], arguments) if opcode in _FORWARDING else None


def _arguments(module: Module, inside: Computation, call: Instruction, arguments: list | None) -> list[_Linear | None]:
    return [_linear(module, inside, operand, arguments) for operand in call.operands]


def _comparisons(
    module: Module, inside: Computation, arguments: list | None = None
) -> Iterator[tuple[str, _Linear, _Linear]]:
    """(direction, left, right) of the compares in a loop's condition, inside fusions too."""
    for instruction in inside.instructions.values():
        if instruction.opcode == "compare":
            left, right = (_linear(module, inside, operand, arguments) for operand in instruction.operands)
            if left and right:
                yield instruction.attribute("direction"), left, right
        elif instruction.opcode in ("fusion", "call"):
            called = module.computations[next(iter(instruction.called.values()))]
            yield from _comparisons(module, called, _arguments(module, inside, instruction, arguments))
