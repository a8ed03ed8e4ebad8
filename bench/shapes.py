"""Named models as lists of parameters: which matrices, how many, and everything else.

A model is a tuple of (count, shape, kind).  Kind "matrix" goes to the matrix method; "other" (embeddings, heads, norms,
biases) to AdamW.  `parse` also reads a plain shape, "24x1024x4096" for 24 matrices of 1024 x 4096 or "1024x4096" for
one.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Parameters(NamedTuple):
    count: int
    shape: tuple[int, ...]
    kind: Literal["matrix", "other"]


Model = tuple[Parameters, ...]


def gpt2(layers: int, width: int, vocabulary: int = 50257, context: int = 1024) -> Model:
    """GPT-2: fused QKV, biases on every linear layer, two layer norms a block, tied head."""
    return (
        Parameters(layers, (3 * width, width), "matrix"),
        Parameters(layers, (width, width), "matrix"),
        Parameters(layers, (4 * width, width), "matrix"),
        Parameters(layers, (width, 4 * width), "matrix"),
        Parameters(1, (vocabulary, width), "other"),
        Parameters(1, (context, width), "other"),
        Parameters(layers, (3 * width,), "other"),
        Parameters(layers, (4 * width,), "other"),
        Parameters(6 * layers + 2, (width,), "other"),
    )


def llama(layers: int, width: int, hidden: int, key_value: int, vocabulary: int, *, tied: bool) -> Model:
    """Llama: separate Q, K, V, O and gated MLP, no biases, two RMS norms a block."""
    return (
        Parameters(2 * layers, (width, width), "matrix"),
        Parameters(2 * layers, (key_value, width), "matrix"),
        Parameters(2 * layers, (hidden, width), "matrix"),
        Parameters(layers, (width, hidden), "matrix"),
        Parameters(1 if tied else 2, (vocabulary, width), "other"),
        Parameters(2 * layers + 1, (width,), "other"),
    )


MODELS: dict[str, Model] = {
    "tiny": gpt2(2, 64, vocabulary=256, context=64),
    "small": gpt2(4, 256, vocabulary=1024, context=256),
    "gpt2-124m": gpt2(12, 768),
    "llama-1b": llama(16, 2048, 8192, 512, 128256, tied=True),  # Llama 3.2 1B
    "llama-7b": llama(32, 4096, 11008, 4096, 32000, tied=False),  # Llama 2 7B
}


def parse(name: str) -> Model:
    """The model of that name, or the matrices that the name spells out."""
    if name in MODELS:
        return MODELS[name]
    try:
        *count, m, n = (int(part) for part in name.split("x"))
        (number,) = count or [1]
    except ValueError:
        raise ValueError(
            f"shapes {name!r} are not known; choose one of {', '.join(MODELS)} or write [COUNTx]ROWSxCOLUMNS"
        ) from None
    return (Parameters(number, (m, n), "matrix"),)


def matrices(model: Model) -> list[tuple[int, int, int]]:
    """(count, rows, columns) of the parameters for the matrix method."""
    return [(p.count, p.shape[0], p.shape[1]) for p in model if p.kind == "matrix"]
