"""Reads from the text of a program compiled for CPUs (HLO) what its devices send each other.

    for collective in collectives(jax.jit(step).lower(state, batch).compile().as_text()):
        print(collective.op, collective.bytes, collective.executions, collective.wire_bytes)

A collective inside loops counts with the product of their trip counts, which the compiler notes. Of a conditional every branch
counts. A sum that the program has in bfloat16, and a CPU computes in float32, counts as bfloat16: the compiler notes that too.
Of sums that it has joined to one it keeps the first one's note, which then counts for all.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

OPS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (.+?) ([a-z][a-z\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+(\d*)\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation)=(\{.*?\}|%?[\w.\-]+)"
)
_PROMOTED = re.compile(r"\bto_apply=%?[\w.\-]*_promoted\b")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
    """One collective instruction of a program.

    Attributes:
        op: one of OPS.
        bytes: of the whole arrays that one device holds: results of an all-gather, operands of a reduce-scatter; of the other
            ops either, which have the same size.
        shapes: of the results on one device.
        group_size: devices that take part together.
        executions: in one run of the program; None inside a loop of unknown trip count.
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


class _Instruction(NamedTuple):
    """`result op(operands), attributes`; the last two as one text."""

    result: str
    op: str
    rest: str


def collectives(hlo_text: str) -> list[Collective]:
    """Every collective of a compiled program; a computation called from two places comes twice.

    Args:
        hlo_text: `Compiled.as_text()`.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations, entry = _computations(hlo_text)
    return [_collective(*found) for found in _walk(computations, entry, 1) if found[0].op in OPS]


def _computations(hlo_text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Instructions by computation, and the name of the entry computation."""
    computations: dict[str, list[_Instruction]] = {}
    name = entry = ""
    for line in hlo_text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif name and (match := _INSTRUCTION.match(line)):
            computations[name].append(_Instruction(*match.groups()))
    if not entry:
        raise ValueError(f"no ENTRY computation in {len(hlo_text)} characters of text; pass Compiled.as_text()")
    return computations, entry


def _walk(
    computations: dict[str, list[_Instruction]], name: str, executions: int | None
) -> Iterator[tuple[_Instruction, int | None]]:
    """Every instruction that runs, and how often."""
    for instruction in computations[name]:
        yield instruction, executions
        inside = executions
        if instruction.op == "while":
            trips = _TRIPS.search(instruction.rest)
            inside = executions * int(trips[1]) if executions is not None and trips else None
        for key, called in _CALLED.findall(instruction.rest):
            if key != "to_apply" or instruction.op == "call":  # else the scalar function of a reduction
                for computation in called.strip("{}").split(","):
                    yield from _walk(computations, computation.strip("% "), inside)


def _collective(instruction: _Instruction, executions: int | None) -> Collective:
    narrowed = 2 if _PROMOTED.search(instruction.rest) else 1
    arrays = [
        (8 if dtype == "pred" else int(bits) // narrowed, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, bits, sizes in _ARRAY.findall(instruction.result)
    ]
    size = _group_size(instruction)
    whole = sum(bits * math.prod(shape) for bits, shape in arrays) // 8 * (size if instruction.op == "reduce-scatter" else 1)
    return Collective(instruction.op, whole, tuple(shape for _, shape in arrays), size, executions)


def _group_size(instruction: _Instruction) -> int:
    if instruction.op == "collective-permute":
        pairs = dict(re.findall(r"\{(\d+),(\d+)\}", instruction.rest))
        return max((len(_ring(start, pairs)) for start in pairs), default=1)
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\] *\{(.*?)\}", instruction.rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", instruction.rest):
        return int(iota[1])
    return re.search(r"replica_groups=\{\{([\d,]+)\}", instruction.rest)[1].count(",") + 1


def _ring(start: str, pairs: dict[str, str]) -> list[str]:
    """Devices that a permutation connects with the first one."""
    connected = [start]
    while pairs.get(connected[-1], start) not in connected:
        connected.append(pairs[connected[-1]])
    return connected
