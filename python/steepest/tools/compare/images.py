"""Made-up images: ten shapes, each turned, scaled and shifted, on a background of any brightness, under noise.

No data set comes with torch, and none is fetched: these are drawn from a seed, the same every time. A small
convolutional net tells them apart, though not at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SIDE = 16  # pixels
NOISE = 0.1  # standard deviation; a shape differs from its background by .4 to 1
SHARPNESS = 12.0  # of the edge of a shape, whose half width is about 1


def _limited(band: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return torch.minimum(band, 0.7 - torch.maximum(u.abs(), v.abs()))


#: Positive inside, negative outside, at the coordinates (u, v).
SHAPES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda u, v: 0.6 - torch.hypot(u, v),  # disc
    lambda u, v: 0.15 - (torch.hypot(u, v) - 0.5).abs(),  # ring
    lambda u, v: 0.5 - torch.maximum(u.abs(), v.abs()),  # square
    lambda u, v: 0.15 - (torch.maximum(u.abs(), v.abs()) - 0.5).abs(),  # frame
    lambda u, v: _limited(0.15 - torch.minimum(u.abs(), v.abs()), u, v),  # plus
    lambda u, v: _limited(0.2 - torch.minimum((u + v).abs(), (u - v).abs()), u, v),  # cross
    lambda u, v: torch.minimum(v + 0.5, 0.5 - v - 2 * u.abs() + 0.3),  # triangle
    lambda u, v: _limited(0.15 - (v.abs() - 0.4).abs(), u, v),  # two bars, lying
    lambda u, v: _limited(0.15 - (u.abs() - 0.4).abs(), u, v),  # two bars, standing
    lambda u, v: torch.minimum(0.6 - torch.hypot(u, v), v),  # half a disc
)


@dataclass(frozen=True)
class Pictures:
    """x: (count, 1, SIDE, SIDE) fp32; y: (count,) int64, the shape's number."""

    x: Tensor
    y: Tensor

    def __str__(self) -> str:
        return f"{len(self.x):,} made-up images of {SIDE} x {SIDE}, {len(SHAPES)} shapes"


def made_up(count: int, seed: int = 0) -> Pictures:
    """Made-up images; turned by at most .35 radians, scaled by .6 to 1.1, shifted by at most a fifth of the image."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(len(SHAPES), (count,), generator=generator)
    turn, scale, across, down = (
        _uniform(count, generator, *bounds) for bounds in ((-0.35, 0.35), (0.6, 1.1), (-0.4, 0.4), (-0.4, 0.4))
    )
    line = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    rows, columns = line[:, None] - down, line[None, :] - across
    u = (columns * turn.cos() + rows * turn.sin()) / scale
    v = (rows * turn.cos() - columns * turn.sin()) / scale
    inside = torch.stack([shape(u, v) for shape in SHAPES])[y, torch.arange(count)].mul(SHARPNESS).sigmoid()
    contrast = _uniform(count, generator, 0.4, 1.0) * (2 * torch.randint(2, (count, 1, 1), generator=generator) - 1)
    x = _uniform(count, generator, -0.5, 0.5) + contrast * inside
    return Pictures((x + NOISE * torch.randn(x.shape, generator=generator)).unsqueeze(1), y)


def _uniform(count: int, generator: torch.Generator, low: float, high: float) -> Tensor:
    """(count, 1, 1) numbers between low and high."""
    return low + (high - low) * torch.rand(count, 1, 1, generator=generator)


class ConvNet(nn.Module):
    """Three convolutions of 3 x 3 with GroupNorm and ReLU and a linear head.

    x: (batch, 1, SIDE, SIDE); -> logits (batch, len(SHAPES)). `create(width, seed)` leaves the global generator alone.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(((1, width), (width, 2 * width), (2 * width, 4 * width))):
            convolution = nn.Conv2d(before, after, 3, stride=2 if number else 1, padding=1, bias=False)
            layers += [convolution, nn.GroupNorm(4, after), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(4 * width * (SIDE // 4) ** 2, len(SHAPES))

    @classmethod
    def create(cls, width: int, seed: int) -> ConvNet:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))
