"""Reads the text of a compiled program (HLO): what its devices send each other in one run of it.

    for collective in collectives(jax.jit(step).lower(state, batch).compile().as_text()):
        print(collective.op, collective.bytes, collective.executions, collective.wire_bytes)

A collective inside of loops counts with the product of their trip counts. These are the compiler's own where it notes them,
else what comes of running the loop's counter alone; that needs its first value, its step and its bound to be constants. Of a
conditional every branch counts.
"""

import math
import operator
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

OPS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
MOST_TRIPS = 100_000  # of a loop's counter before its trip count counts as unknown

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.+)$")
_OPCODE = re.compile(r"\s*([a-z][a-z\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+(\d*)\w*)\[([\d,<=]*)\]")
_CALLS = "calls|to_apply|body|condition|branch_computations|true_computation|false_computation"
_CALLED = re.compile(rf"\b({_CALLS})=(\{{.*?\}}|%?[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_NAME = re.compile(r"%?([\w.\-]+)$")


class Collective(NamedTuple):
    """One collective instruction of a program.

    Attributes:
        op: one of OPS, also of the form in two parts (-start, -done).
        bytes: of the whole arrays that one device holds: results of an all-gather, operands of a reduce-scatter, of the others
            either, which have one size.
        shapes: of the results on one device.
        group_size: devices that take part together.
        executions: in one run of the program; None inside of a loop whose trip count is not known.
    """

    op: str
    bytes: int
    shapes: tuple[tuple[int, ...], ...]
    group_size: int
    executions: int | None

    @property
    def wire_bytes(self) -> float:
        """Bytes that one device sends in one run of the program, by ring algorithms.

        Raises:
            ValueError: the number of executions is not known.
        """
        if self.executions is None:
            raise ValueError(f"{self.op} of {self.shapes} is in a loop of unknown trip count; give the loop a constant bound")
        others = (self.group_size - 1) / self.group_size
        share = {"all-reduce": 2 * others, "collective-permute": 1.0, "collective-broadcast": 1.0}.get(self.op, others)
        return share * self.bytes * self.executions


def collectives(hlo_text: str) -> list[Collective]:
    """Every collective of a compiled program; a computation called from two places comes twice.

    Args:
        hlo_text: `Compiled.as_text()`, of CPUs, GPUs or TPUs.

    Raises:
        ValueError: the text has no entry computation.
    """
    program = _Program(hlo_text)
    found = []
    for computation, instruction, executions in program.walk():
        op = instruction.op.removesuffix("-start")
        if op in OPS and not instruction.called and program.starts(computation, instruction):
            found.append(program.collective(op, instruction, executions))
    return found


class _Instruction(NamedTuple):
    """`name = result op(argument), attributes`."""

    name: str
    result: str
    op: str
    argument: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """Names; older texts have types before them."""
        return [match[1] for part in _split(self.argument) if (match := _NAME.search(part))]

    @property
    def called(self) -> list[str]:
        """Computations that this runs; the scalar functions of reductions are none."""
        runs = [(key, value) for key, value in _CALLED.findall(self.attributes) if key != "to_apply" or self.op == "call"]
        return [name.strip("% ") for _, value in runs for name in value.strip("{}").split(",")]

    @property
    def trips(self) -> int | None:
        """The compiler's note on a loop."""
        match = _TRIPS.search(self.attributes)
        return int(match[1]) if match else None

    def part(self, key: str) -> str:
        """The computation of an attribute."""
        return next(value.strip("%") for name, value in _CALLED.findall(self.attributes) if name == key)


class _Program:
    """Computations by name, each a dict of instructions in order; its last is its root if none is marked."""

    def __init__(self, hlo_text: str) -> None:
        self.computations: dict[str, dict[str, _Instruction]] = {}
        self.roots: dict[str, str] = {}
        self.entry = ""
        name = ""
        for line in hlo_text.splitlines():
            if header := _HEADER.match(line):
                name = header[2]
                self.computations[name] = {}
                self.entry = name if header[1] else self.entry
            elif name and (match := _INSTRUCTION.match(line)) and (instruction := _instruction(match[2], match[3])):
                self.computations[name][instruction.name] = instruction
                if match[1]:
                    self.roots[name] = instruction.name
        if not self.entry:
            raise ValueError(f"no ENTRY computation in {len(hlo_text)} characters of text; pass Compiled.as_text()")
        counts = re.search(r"num_partitions=(\d+)", hlo_text), re.search(r"replica_count=(\d+)", hlo_text)
        self.devices = math.prod(int(count[1]) for count in counts if count)

    def collective(self, op: str, instruction: _Instruction, executions: int | None) -> Collective:
        arrays = _arrays(instruction.result)
        if instruction.op == "collective-permute-start":
            arrays = arrays[1:2]  # (operand, result, contexts)
        elif instruction.op.endswith("-start") and instruction.op != "all-reduce-start":
            # ((operands), (results), contexts)
            count = len(instruction.operands)
            arrays = arrays[count : 2 * count]
        size = self.group_size(op, instruction.attributes)
        whole = sum(bits * math.prod(shape) for bits, shape in arrays) // 8 * (size if op == "reduce-scatter" else 1)
        return Collective(op, whole, tuple(shape for _, shape in arrays), size, executions)

    def group_size(self, op: str, attributes: str) -> int:
        if op == "collective-permute":
            pairs = dict(re.findall(r"\{(\d+),(\d+)\}", attributes))
            return max((len(_ring(start, pairs)) for start in pairs), default=1)
        if mesh := re.search(r"replica_groups=mesh\[(.*?)\] *\{(.*?)\}", attributes):
            sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
            return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]))
        if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
            return int(iota[1])
        if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
            return listed[1].count(",") + 1
        return self.devices  # replica_groups={}

    def starts(self, computation: str, instruction: _Instruction) -> bool:
        """False for all but the first of the fusions by which a TPU runs one collective beside other work."""
        if "async_collective_fusion_config" not in instruction.attributes:
            return True
        return any('"AsyncCollectiveStart"' in beside.attributes for beside in self.computations[computation].values())

    def walk(self) -> Iterator[tuple[str, _Instruction, int | None]]:
        """Every instruction that runs, with its computation and how often; None where that is not known."""
        yield from self._walk(self.entry, 1, [])

    def _walk(self, name: str, executions: int | None, given: list) -> Iterator[tuple[str, _Instruction, int | None]]:
        seen: dict[str, Any] = {}
        for instruction in self.computations[name].values():
            yield name, instruction, executions
            if instruction.op == "while":
                start = self._value(name, instruction.operands[0], given, seen)
                trips = instruction.trips
                if trips is None:
                    trips = self._count(instruction, start)
                inside = None if executions is None or trips is None else executions * trips
                lasting = [self._lasting(instruction, start)]
                yield from self._walk(instruction.part("body"), inside, lasting)
                yield from self._walk(instruction.part("condition"), inside, lasting)
            else:
                passed = instruction.operands if instruction.op == "call" else []
                values = [self._value(name, operand, given, seen) for operand in passed]
                for called in instruction.called:
                    yield from self._walk(called, executions, values)

    def _count(self, loop: _Instruction, state: Any) -> int | None:
        """How often a loop's body runs from a state of which only whole numbers are known."""
        body, condition = loop.part("body"), loop.part("condition")
        for trip in range(MOST_TRIPS):
            goes_on = self._value(condition, self.roots[condition], [state], {})
            if goes_on is None:
                return None
            if not goes_on:
                return trip
            state = self._value(body, self.roots[body], [state], {})
        return None

    def _lasting(self, loop: _Instruction, start: Any) -> Any:
        """The state of a loop without what its body changes."""
        body, state = loop.part("body"), start
        while isinstance(state, list):
            after = self._value(body, self.roots[body], [state], {})
            if not isinstance(after, list):
                return None
            kept = [value if value == next_ else None for value, next_ in zip(state, after, strict=True)]
            if kept == state:
                return state
            state = kept
        return None

    def _value(self, computation: str, name: str, given: list, seen: dict[str, Any]) -> Any:
        """A whole number or truth value, a list of such for a tuple, or None where it is not known.

        Args:
            computation: that holds the instruction.
            name: of the instruction.
            given: values of the computation's parameters.
            seen: values so far.
        """
        if name not in seen:
            instruction = self.computations[computation][name]
            known = instruction.result.startswith(("(", "pred[]", "s32[]", "u32[]", "s64[]", "u64[]"))
            seen[name] = self._compute(computation, instruction, given, seen) if known else None
        return seen[name]

    def _compute(self, computation: str, instruction: _Instruction, given: list, seen: dict[str, Any]) -> Any:
        op, attributes = instruction.op, instruction.attributes
        if op == "constant":
            return _whole(instruction.argument)
        if op == "parameter":
            number = int(instruction.argument)
            return given[number] if number < len(given) else None
        if op in ("rng-bit-generator", "custom-call", "conditional"):
            return None
        values = [self._value(computation, operand, given, seen) for operand in instruction.operands]
        if op == "tuple":
            return values
        if op == "get-tuple-element":
            return values[0][int(re.search(r"index=(\d+)", attributes)[1])] if isinstance(values[0], list) else None
        if op in ("copy", "bitcast", "convert", "opt-barrier"):
            return values[0]
        if op == "while":
            return self._lasting(instruction, values[0])
        if op in ("fusion", "call"):
            called = instruction.called[0]
            return self._value(called, self.roots[called], values, {})
        if None in values:
            return None
        if op == "compare":
            return _COMPARE[re.search(r"direction=(\w+)", attributes)[1]](*values)
        return _ARITHMETIC[op](*values) if op in _ARITHMETIC else None


_ARITHMETIC = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "and": operator.and_}
_COMPARE = {name.upper(): getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")}


def _instruction(name: str, text: str) -> _Instruction | None:
    """Reads what stands behind `name = `; None for a line that is no instruction."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    match = _OPCODE.match(text, end)
    if end <= 0 or not match:
        return None
    close = _closing(text, match.end() - 1)
    return _Instruction(name, text[:end], match[1], text[match.end() : close], text[close + 1 :])


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    return len(text)


def _split(text: str) -> list[str]:
    """Parts between the commas outside of all brackets."""
    parts, depth = [""], 0
    for character in re.sub(r"/\*.*?\*/", "", text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _arrays(result: str) -> list[tuple[int, tuple[int, ...]]]:
    """(bits of an element, shape) of every array in a type."""
    bits = lambda dtype, digits: 8 if dtype == "pred" else int(digits or 0)
    shape = lambda sizes: tuple(int(size.removeprefix("<=")) for size in sizes.split(",") if size)
    return [(bits(dtype, digits), shape(sizes)) for dtype, digits, sizes in _ARRAY.findall(result)]


def _ring(start: str, pairs: dict[str, str]) -> list[str]:
    """Devices that a permutation joins, from one on."""
    joined = [start]
    while pairs.get(joined[-1], start) not in joined:
        joined.append(pairs[joined[-1]])
    return joined


def _whole(text: str) -> int | None:
    return int({"true": "1", "false": "0"}.get(text, text)) if re.fullmatch(r"-?\d+|true|false", text) else None
