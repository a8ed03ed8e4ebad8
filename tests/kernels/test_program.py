"""What the fused elementwise ops are told: stated in Python, from which Triton takes it, and the same in C++."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from steepest.ops import program
from steepest.ops.program import COLUMNS, FIELDS, HYPERS, LOWEST_BIT, SUMS, Program

HEADER = (Path(__file__).parents[2] / "csrc" / "multi_tensor" / "params.h").read_text()
ALTERNATIVES = [(name, value) for name, values in FIELDS.items() for value in values[1:]]


def unpacked(bits: int) -> dict[str, object]:
    """The fields, from the lowest on."""
    taken = {}
    for name, values in FIELDS.items():
        width = (len(values) - 1).bit_length()
        taken[name] = values[bits & ((1 << width) - 1)]
        bits >>= width
    assert bits == 0
    return taken


def test_the_fields_are_those_of_a_program() -> None:
    assert vars(Program()) == {name: values[0] for name, values in FIELDS.items()}
    assert Program().packed() == 0


@pytest.mark.parametrize("name,value", ALTERNATIVES)
def test_every_field_is_packed_for_itself(name: str, value: bool | str) -> None:
    """One field, and with every other that goes with it."""
    alone = Program(**{name: value})  # type: ignore[arg-type]
    assert unpacked(alone.packed()) == vars(alone)
    assert Program.unpacked(alone.packed()) == alone
    for other, chosen in ALTERNATIVES:
        if other != name and {name, other} not in ({"cautious", "decay_after"}, {"interpolated", "power"}):
            both = Program(**{name: value, other: chosen})  # type: ignore[arg-type]
            assert unpacked(both.packed()) == vars(both)


def test_triton_reads_two_bits_of_a_choice() -> None:
    assert all(2 <= len(values) <= 4 for values in FIELDS.values())


def test_cautious_decay_comes_before_the_update() -> None:
    with pytest.raises(ValueError, match="choose cautious or decay_after"):
        Program(cautious=True, decay_after=True)


def test_what_a_power_divides_has_no_reading_of_its_own() -> None:
    with pytest.raises(ValueError, match="choose interpolated or a power"):
        Program(nesterov=True, interpolated=True, power="half")


# ---- the header that the kernels are compiled from -----------------------------------------------------------------


def enumerators(name: str, prefix: str = "") -> list[str]:
    """Names in an enumeration of the header, kGradSq as grad_sq."""
    (body,) = re.findall(rf"enum {name} : \w+ \{{(.*?)\}}", HEADER, re.DOTALL)
    names = re.findall(rf"\bk{prefix}(\w+)", re.sub(r"//[^\n]*", "", body))
    return [re.sub(r"(?<=[a-z\d])(?=[A-Z])", "_", each).lower() for each in names]


@pytest.mark.parametrize(
    "name,prefix,wanted", [("Column", "", COLUMNS), ("Sum", "", SUMS), ("Hyper", "Hyper", HYPERS)], ids=str
)
def test_columns_are_those_of_the_header(name: str, prefix: str, wanted: tuple[str, ...]) -> None:
    *found, count = enumerators(name, prefix)
    assert found == list(wanted)
    assert count in ("columns", "sums", "s")


def test_fields_are_those_of_the_header() -> None:
    """Taken from the lowest bit on, in the order in which the constructor takes them."""
    taken = re.findall(r"\b(\w+) = (?:static_cast<\w+>\()?take\((\d)\)", HEADER)
    assert [(name, int(width)) for name, width in taken] == [
        (name, (len(values) - 1).bit_length()) for name, values in FIELDS.items()
    ]
    (bits,) = re.findall(r"kBits = (\d+);", HEADER)
    last = list(FIELDS)[-1]
    assert int(bits) == LOWEST_BIT[last] + (len(FIELDS[last]) - 1).bit_length()
    for name, enumeration in (("power", "Power"), ("direction", "Kind"), ("rounding", "Rounding")):
        assert enumerators(enumeration) == list(FIELDS[name])


def test_chunks_are_those_of_the_header() -> None:
    (chunk,) = re.findall(r"kChunk = (\d+);", HEADER)
    assert int(chunk) == program.CHUNK
