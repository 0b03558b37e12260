"""Cost of an optimised HLO program: collectives, their bytes, estimated cycles.

Reads the text of a compiled program (`compiled.as_text()`): computations, one instruction a line.
"""

import dataclasses
import math
import re
from collections import Counter

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "collective_permute",
)
_BITS = {"pred": 8, "bf16": 16, "token": 0}  # the others carry their width in their name
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)")
_ARRAY = re.compile(r"\b(token|pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")


@dataclasses.dataclass
class Cost:
    """What one execution of a program costs one device."""

    cycles: int = 0
    bytes: Counter = dataclasses.field(default_factory=Counter)  # by kind, one of COLLECTIVES
    counts: Counter = dataclasses.field(default_factory=Counter)  # collectives run, by kind
    custom_calls: int = 0  # kernels without an estimate of cycles
    unknown_loops: int = 0  # loops whose trip count is not known: their body counts once
    messages: list = dataclasses.field(default_factory=list)  # (kind, shape, bytes, times)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.rest.partition(")")[0])

    @property
    def called(self) -> list[str]:
        names = _CALLED.findall(self.rest)
        for group in _BRANCHES.findall(self.rest):
            names += [name.strip().lstrip("%") for name in group.split(",")]
        return names


def cost(text: str) -> Cost:
    """Return the cost of a program, the bodies of loops counted as often as they run."""
    computations, entry = _parse(text)
    total, seen = Cost(), set()

    def visit(name: str, times: int, fused: bool) -> None:
        instructions = computations.get(name, [])
        shapes = {i.name: i.shape for i in instructions}
        for i in instructions:
            if not fused and (cycles := _CYCLES.search(i.rest)):
                total.cycles += times * int(cycles[1])
            kind = i.opcode.removesuffix("-start").replace("-", "_")
            if kind in COLLECTIVES:
                _add_collective(total, i, name, shapes, times, seen if fused else None)
            elif i.opcode == "custom-call" and not _CYCLES.search(i.rest):
                total.custom_calls += times * ("tpu_custom_call" in i.rest)
            elif i.opcode == "fusion":
                for called in i.called:
                    visit(called, times, True)
            elif i.opcode == "while":
                trips = _trip_count(i, instructions, computations)
                total.unknown_loops += trips is None
                for called in i.called:
                    visit(called, times * (1 if trips is None else trips), fused)
            elif i.opcode in ("call", "conditional", "async-start"):
                for called in i.called:
                    visit(called, times, fused)

    visit(entry, 1, False)
    return total


def peak_bytes(compiled) -> int | None:
    """Return the bytes that one execution takes on a device, its arguments and results included.

    None where the backend does not say.
    """
    found = compiled.memory_analysis()
    if found is None:
        return None
    # The new state takes the place of the old: only what has no place among the arguments adds.
    added = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + found.temp_size_in_bytes + added


def shape_bytes(shape: str) -> int:
    """Return the bytes of an array's shape, or of all in a tuple's, without padding."""
    total = 0
    for dtype, dims in _ARRAY.findall(shape):
        bits = _BITS.get(dtype)
        if bits is None:
            width = re.search(r"\d+", dtype)
            assert width is not None  # _ARRAY asks for digits in it
            bits = int(width[0])
        total += math.prod(int(n) for n in dims.split(",") if n) * bits // 8
    return total


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations, entry, current = {}, "", []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif match := _INSTRUCTION.match(line):
            current.append(_Instruction(*match.groups()))
    return computations, entry


def _trip_count(loop: _Instruction, around, computations) -> int | None:
    """Return how often a loop runs: as noted, or by its counter's start, step and bound."""
    if noted := _TRIP_COUNT.search(loop.rest):
        return int(noted[1])
    called = dict(re.findall(r"(body|condition)=%?([\w.-]+)", loop.rest))
    body, condition = (
        {i.name: i for i in computations.get(called.get(k), [])} for k in ("body", "condition")
    )
    ends = [i for i in condition.values() if i.opcode == "compare" and "direction=LT" in i.rest]
    if len(ends) != 1 or not body:
        return None
    counter, bound = (condition.get(name) for name in ends[0].operands[:2])
    index = counter and re.search(r"index=(\d+)", counter.rest)
    if not index or (stop := _constant(bound, condition)) is None:
        return None
    position, before = int(index[1]), {i.name: i for i in around}
    last = list(body.values())[-1]
    initial = before.get(loop.operands[0]) if loop.operands else None
    after = last if last.opcode == "tuple" else None
    if not initial or initial.opcode != "tuple" or not after:
        return None
    start = _constant(before.get(initial.operands[position]), before)
    added = body.get(after.operands[position])
    steps = [_constant(body.get(n), body) for n in added.operands] if added else []
    step = next((s for s in steps if s), None)
    if start is None or step is None or added is None or added.opcode != "add":
        return None
    return max(0, -(-(stop - start) // step))


def _constant(i: _Instruction | None, computation: dict[str, _Instruction]) -> int | None:
    """Return the integer that an instruction holds, seen through copies; None if it is computed."""
    while i is not None and i.opcode in ("copy", "bitcast", "convert") and i.operands:
        i = computation.get(i.operands[0])
    value = re.match(r"(-?\d+)\)", i.rest) if i is not None and i.opcode == "constant" else None
    return int(value[1]) if value else None


def _add_collective(total: Cost, i: _Instruction, computation: str, shapes, times, seen) -> None:
    """Count a collective by its whole array: what is reduced, gathered together or moved."""
    kind = i.opcode.removesuffix("-start").replace("-", "_")
    # A TPU spreads one asynchronous collective over several fusions, each of which repeats it.
    if seen is not None and (channel := _CHANNEL.search(i.rest)):
        if (kind, channel[1], i.shape.split("{")[0]) in seen:
            return
        seen.add((kind, channel[1], i.shape.split("{")[0]))
    if computation.startswith("all-reduce-scatter"):  # a fused all-reduce of which a slice is kept
        kind = "reduce_scatter"
    given = sum(shape_bytes(shapes.get(name, "")) for name in i.operands)
    result = shape_bytes(i.shape)
    if i.opcode.endswith("-start") and kind == "all_gather":
        result -= given  # (operand, result)
    elif i.opcode.endswith("-start") and kind == "collective_permute":
        result = given  # (operand, result, two flags)
    size = max(given, result)
    total.bytes[kind] += times * size
    total.counts[kind] += times
    total.messages.append((kind, i.shape, size, times))
