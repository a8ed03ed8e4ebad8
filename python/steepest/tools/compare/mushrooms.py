"""A classification problem of sparse binary features: LIBSVM's mushrooms, or a made-up one of the same size.

mushrooms has 8124 rows, 112 features in {0, 1} and two classes; a row says which value a mushroom has of each of 21
properties. The file is at https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary.html#mushrooms.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROWS = 8124
FEATURES = 112
#: Values of each made-up property; they sum to FEATURES.
VALUES = (6, 4, 10, 2, 9, 2, 2, 2, 10, 2, 4, 4, 4, 9, 9, 4, 3, 5, 9, 6, 6)


@dataclass(frozen=True)
class Table:
    """x: (rows, FEATURES) fp64; y: (rows,) int64 in {0, 1}; source says where they come from."""

    source: str
    x: Tensor
    y: Tensor

    def __str__(self) -> str:
        return f"{self.source}: {len(self.x):,} rows of {self.x.shape[1]} binary features"


def load(path: Path | None) -> Table:
    """The table in a LIBSVM file, or the made-up one; ValueError says what is wrong with a file."""
    return made_up() if path is None else read(path)


def read(path: Path) -> Table:
    """Lines "label index:value ...", indices from 1; the larger label is class 1."""
    if not path.is_file():
        raise ValueError(f"--mushrooms {path}: there is no such file; download mushrooms from LIBSVM, or leave it out")
    rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
    x = torch.zeros(len(rows), FEATURES, dtype=torch.float64)
    try:
        labels = torch.tensor([float(row[0]) for row in rows])
        for i, row in enumerate(rows):
            for entry in row[1:]:
                index, value = entry.split(":")
                x[i, int(index) - 1] = float(value)
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"--mushrooms {path}: not a LIBSVM file of at most {FEATURES} features ({error}); see {__name__}"
        ) from error
    if len(labels.unique()) != 2:
        raise ValueError(f"--mushrooms {path}: {len(labels.unique())} classes; two are needed")
    return Table(str(path), x, (labels == labels.max()).long())


def made_up(seed: int = 0) -> Table:
    """One value of each property a row, frequencies as 1 / rank^2; the class by a random quadratic rule, without noise.

    The rule, a sum over properties and over pairs of neighbouring ones, cuts at its median.
    """
    generator = torch.Generator().manual_seed(seed)
    columns, chosen, first = [], [], 0
    for count in VALUES:
        frequency = 1 / torch.arange(1, count + 1, dtype=torch.float64) ** 2
        chosen.append(torch.multinomial(frequency, ROWS, replacement=True, generator=generator))
        columns.append(first + chosen[-1])
        first += count
    x = torch.zeros(ROWS, FEATURES, dtype=torch.float64).scatter_(1, torch.stack(columns, dim=1), 1.0)
    score = x @ torch.randn(FEATURES, generator=generator, dtype=torch.float64)
    for one, other in zip(chosen, chosen[1:], strict=False):
        weights = torch.randn(max(VALUES), max(VALUES), generator=generator, dtype=torch.float64)
        score += weights[one, other]
    return Table("made-up mushrooms", x, (score > score.median()).long())
