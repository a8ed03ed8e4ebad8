"""Named models as lists of parameters: which matrices, how many, and everything else.

A model is a tuple of (count, shape, kind).  Kind "matrix" goes to the matrix method, of a shape (experts, m, n) each
expert's; "other" (embeddings, heads, norms, biases) to AdamW.  `parse` also reads a plain shape, "24x1024x4096" for 24
matrices of 1024 x 4096 or "1024x4096" for one, and several joined by "+".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Parameters:
    count: int
    shape: tuple[int, ...]
    kind: Literal["matrix", "other"]
    #: the dimension that tensor parallelism cuts, None where it leaves it whole
    cut: int | None = None
    #: the part of it that a token meets
    used: float = 1.0


Model = tuple[Parameters, ...]
Stack = tuple[int, int, int]  # matrices, rows, columns


def gpt2(layers: int, width: int, vocabulary: int = 50257, context: int = 1024) -> Model:
    """GPT-2: fused QKV, biases on every linear layer, two layer norms a block, tied head."""
    return (
        Parameters(layers, (3 * width, width), "matrix", cut=0),
        Parameters(layers, (width, width), "matrix", cut=1),
        Parameters(layers, (4 * width, width), "matrix", cut=0),
        Parameters(layers, (width, 4 * width), "matrix", cut=1),
        Parameters(1, (vocabulary, width), "other"),
        Parameters(1, (context, width), "other"),
        Parameters(layers, (3 * width,), "other"),
        Parameters(layers, (4 * width,), "other"),
        Parameters(6 * layers + 2, (width,), "other"),
    )


def llama(layers: int, width: int, hidden: int, key_value: int, vocabulary: int, *, tied: bool) -> Model:
    """Llama: separate Q, K, V, O and gated MLP, no biases, two RMS norms a block."""
    return (
        Parameters(2 * layers, (width, width), "matrix", cut=0),  # O by columns, but it is square
        Parameters(2 * layers, (key_value, width), "matrix", cut=0),
        Parameters(2 * layers, (hidden, width), "matrix", cut=0),
        Parameters(layers, (width, hidden), "matrix", cut=1),
        Parameters(1 if tied else 2, (vocabulary, width), "other"),
        Parameters(2 * layers + 1, (width,), "other"),
    )


def experts(count: int, width: int, hidden: int, layers: int = 1) -> Model:
    """The gated MLPs of a mixture of experts, each matrix apart, and its router."""
    return (
        Parameters(2 * count * layers, (hidden, width), "matrix"),
        Parameters(count * layers, (width, hidden), "matrix"),
        Parameters(layers, (count, width), "other"),
    )


def latent_attention_experts(
    *,
    layers: int,
    width: int,
    vocabulary: int,
    dense: int,
    dense_hidden: int,
    experts: int,
    met: int,
    hidden: int,
    heads: int,
    query_rank: int,
    key_value_rank: int,
    nope: int,
    rope: int,
    value: int,
) -> Model:
    """DeepSeek-V3 and its kind: latent attention, the first layers ``dense``, the others with a router and experts.

    experts: stacked in one parameter for each of gate, up and down; a token meets ``met`` of them and a shared one.
    """
    moe = layers - dense
    return (
        Parameters(layers, (query_rank, width), "matrix"),
        Parameters(layers, (heads * (nope + rope), query_rank), "matrix", cut=0),
        Parameters(layers, (key_value_rank + rope, width), "matrix"),
        Parameters(layers, (heads * (nope + value), key_value_rank), "matrix", cut=0),
        Parameters(layers, (width, heads * value), "matrix", cut=1),
        Parameters(2 * dense, (dense_hidden, width), "matrix", cut=0),
        Parameters(dense, (width, dense_hidden), "matrix", cut=1),
        Parameters(2 * moe, (hidden, width), "matrix", cut=0),
        Parameters(moe, (width, hidden), "matrix", cut=1),
        Parameters(2 * moe, (experts, hidden, width), "matrix", used=met / experts),
        Parameters(moe, (experts, width, hidden), "matrix", used=met / experts),
        Parameters(moe, (experts, width), "other"),
        Parameters(2, (vocabulary, width), "other"),
        Parameters(2 * layers + 1, (width,), "other"),
        Parameters(layers, (query_rank,), "other"),
        Parameters(layers, (key_value_rank,), "other"),
        Parameters(moe, (experts,), "other"),
    )


def lora(layers: int, width: int, rank: int, projections: int = 4) -> Model:
    """Adapters B A on so many square projections a layer."""
    return (
        Parameters(layers * projections, (rank, width), "matrix"),
        Parameters(layers * projections, (width, rank), "matrix"),
    )


def per_head(layers: int, width: int, heads: int, key_value_heads: int, head: int) -> Model:
    """The attention of a Llama with every head a matrix of its own."""
    return (
        Parameters(layers * (heads + 2 * key_value_heads), (head, width), "matrix"),
        Parameters(layers * heads, (width, head), "matrix"),
    )


MODELS: dict[str, Model] = {
    "tiny": gpt2(2, 64, vocabulary=256, context=64),
    "small": gpt2(4, 256, vocabulary=1024, context=256),
    "gpt2-124m": gpt2(12, 768),
    "llama-1b": llama(16, 2048, 8192, 512, 128256, tied=True),  # Llama 3.2 1B
    "llama-7b": llama(32, 4096, 11008, 4096, 32000, tied=False),  # Llama 2 7B
    "llama-7b-layers": llama(4, 4096, 11008, 4096, 32000, tied=False)[:4],  # four of its layers
    "llama-70b": llama(80, 8192, 28672, 1024, 32000, tied=False),  # Llama 2 70B
    "kimi-k2": experts(24, 7168, 2048),  # Kimi K2 has 384 experts a layer: what one of 16 GPUs keeps of a layer
    "kimi-k2-1t": latent_attention_experts(  # all of Kimi K2
        layers=61,
        width=7168,
        vocabulary=163840,
        dense=1,
        dense_hidden=18432,
        experts=384,
        met=8,
        hidden=2048,
        heads=64,
        query_rank=1536,
        key_value_rank=512,
        nope=128,
        rope=64,
        value=128,
    ),
    "moe-64": experts(64, 2048, 1408),  # a layer of Moonlight 16B
    "lora-16": lora(32, 4096, 16),  # on Llama 2 7B
    "per-head": per_head(16, 2048, 32, 8, 64),  # of Llama 3.2 1B
    # What a CPU trains, or tunes: small matrices and many of them.
    "vit-tiny": (
        Parameters(12, (576, 192), "matrix", cut=0),
        Parameters(12, (192, 192), "matrix", cut=1),
        Parameters(12, (768, 192), "matrix", cut=0),
        Parameters(12, (192, 768), "matrix", cut=1),
        Parameters(1, (192, 768), "other"),  # patches
        Parameters(1, (197, 192), "other"),
        Parameters(1, (1000, 192), "other"),
        Parameters(12, (576,), "other"),
        Parameters(12, (768,), "other"),
        Parameters(50, (192,), "other"),
    ),
    "resnet-18": (  # its convolutions as matrices
        Parameters(4, (64, 576), "matrix"),
        Parameters(1, (128, 576), "matrix"),
        Parameters(3, (128, 1152), "matrix"),
        Parameters(1, (128, 64), "matrix"),
        Parameters(1, (256, 1152), "matrix"),
        Parameters(3, (256, 2304), "matrix"),
        Parameters(1, (256, 128), "matrix"),
        Parameters(1, (512, 2304), "matrix"),
        Parameters(3, (512, 4608), "matrix"),
        Parameters(1, (512, 256), "matrix"),
        Parameters(1, (64, 147), "other"),
        Parameters(1, (1000, 512), "other"),
        Parameters(40, (256,), "other"),
    ),
    "lora-gpt2": lora(12, 768, 16),
    "heads-gpt2": per_head(12, 768, 12, 12, 64),
    "experts-small": experts(16, 256, 512),
    "ultralytics-126": (  # small matrices of three shapes, as a detector has them
        Parameters(42, (64, 64), "matrix"),
        Parameters(42, (128, 576), "matrix"),
        Parameters(42, (256, 256), "matrix"),
    ),
}


def parse(name: str) -> Model:
    """The model of that name, or the matrices that the name spells out; ValueError for neither."""
    if name in MODELS:
        return MODELS[name]
    return tuple(_spelled_out(part, name) for part in name.split("+"))


def _spelled_out(part: str, name: str) -> Parameters:
    try:
        *count, m, n = (int(number) for number in part.split("x"))
        (number,) = count or [1]
    except ValueError:
        raise ValueError(
            f"shapes {name!r} are not known; choose one of {', '.join(MODELS)} or write [COUNTx]ROWSxCOLUMNS"
        ) from None
    if min(number, m, n) < 1:
        raise ValueError(f"shapes {name!r}: numbers of 1 and more, as in 24x1024x4096")
    return Parameters(number, (m, n), "matrix")


def matrices(model: Model) -> list[Stack]:
    """(count, rows, columns) of the matrices of each kind of parameter for the matrix method."""
    return [(p.count * math.prod(p.shape[:-2]), p.shape[-2], p.shape[-1]) for p in model if p.kind == "matrix"]


def elements(model: Model, kind: str | None = None) -> int:
    """The number of elements of the parameters of a kind, or of all."""
    sizes = [(p.count * math.prod(p.shape), p.kind) for p in model]
    return sum(size for size, p_kind in sizes if kind in (None, p_kind))


def spelled(stacks: list[Stack]) -> list[str]:
    """Each stack as `parse` reads it."""
    return ["x".join(map(str, stack)) for stack in stacks]
