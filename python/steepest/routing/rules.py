"""The rules of routing: what a parameter is, from its module, its name and its shape.

`send_to_adamw` asks the rules below in this order, of every place a (possibly tied) parameter has in the model; the
first that answers gives the reason. A parameter that none of them claims is read as matrices, as `layout` says.

    1. fewer than two dimensions                                  biases, gains, scalars
    2. the module is an embedding                                 nn.Embedding, nn.EmbeddingBag, *Embedding
    3. the module is a normalization layer                        nn.LayerNorm, *Norm, *Norm2d
    4. the name is a head's                                       HEADS, HEAD_PATHS, TOP_LEVEL_HEADS
    5. the name is an embedding's, a position's or a token's      EMBEDDINGS, LEARNED_INPUTS, POSITION_WORDS,
                                                                  TOP_LEVEL_EMBEDDINGS
    6. the model says what the module is                          get_output_embeddings, get_classifier; `known`
    7. the name is that of a bias or of another table             BIAS_WORDS, ELEMENTWISE, NORM_WORDS
    8. the convolution is depthwise                               one small filter per channel, no matrix
    9. a leading 1 in three dimensions                            a table for all samples: (1, tokens, width)
    10. a side of 1                                               a vector in disguise: (1, n), (n, 1, 1)

Names are those of `architectures`.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase, translate
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ..matrices import LAYOUT_KEYS, Piece, pieces
from .architectures import (
    BIAS_WORDS,
    CONVOLUTIONS,
    ELEMENTWISE,
    ELEMENTWISE_OF_CLASSES,
    EMBEDDINGS,
    FLATTENED,
    GROUPED,
    HEAD_DEPTH,
    HEAD_PATHS,
    HEADS,
    LEARNED_INPUTS,
    NO_HEADS,
    NORM_WORDS,
    POSITION_WORDS,
    PROJECTION_WORDS,
    TOP_LEVEL_EMBEDDINGS,
    TOP_LEVEL_HEADS,
    TRANSPOSED,
    TRANSPOSED_NAMES,
    TRANSPOSED_OF_CLASSES,
)
from .einsums import einmix_layout
from .known import class_name, class_names, is_a
from .places import Place

_EMBEDDING_CLASS = re.compile(r"Embed(ding)?s?(Bag)?$")
_NORM_CLASS = re.compile(r"Norm(\dd)?$")
_ATTENTION_CLASS = re.compile(r"(Attention|Attn)(\dd)?$")
_HEAD_ENDS = tuple(f"*{end}" for end in HEAD_PATHS)
_FUSED = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


def send_to_adamw(place: Place) -> str | None:
    """The reason why this place's parameter is no hidden matrix, or None."""
    return next((reason for rule in _RULES if (reason := rule(place)) is not None), None)


def role(place: Place) -> str:
    """What a parameter is to its layer: "vector", "embedding", "normalization", "head", "table", or else "matrix"."""
    if place.role is not None and place.param.ndim >= 2:
        return place.role.role
    return next((name for rule, name in _ROLES.items() if rule(place) is not None), "matrix")


def layout(place: Place) -> dict[str, Any]:
    """Group values with which `pieces` reads a parameter of two dimensions or more."""
    if (splits := _fused_rows(place)) is not None:
        return {"split_sizes": splits}
    shape = place.param.shape
    if is_convolution(place):
        # The groups of a convolution are rows over inputs of their own: as many matrices, one under the other.
        groups = _number(place, "groups")
        groups = groups if shape[0] % groups == 0 else 1
        return _one_under_the_other(groups, _is_transposed_conv(place))
    if place.module is not None and "EinMix" in _classes(place) and (axes := einmix_layout(place.module)) is not None:
        return axes
    for name in _classes(place):
        if name in GROUPED:
            return _one_under_the_other(_number(place, GROUPED[name]), _is_transposed(place))
    values: dict[str, Any] = {"batch_dims": 1} if _is_stack(place) else {}
    return {**values, "transposed": True} if _is_transposed(place) and len(shape) in (2, 3) else values


def _one_under_the_other(count: int, transposed: bool) -> dict[str, Any]:
    """The layout of so many matrices in one tensor; in x out, their rows are columns."""
    if not transposed:
        return {"num_heads": count} if count > 1 else {}
    return {"transposed": True, **({"num_heads": count, "split_columns": True} if count > 1 else {})}


def is_convolution(place: Place) -> bool:
    """Whether the module is a convolution, or was one before it was scripted."""
    return is_a(place.module, _ConvNd) or not CONVOLUTIONS.isdisjoint(_classes(place))


def _is_stack(place: Place) -> bool:
    """Whether it is a stack of matrices: of three dimensions, and of no module that says otherwise."""
    return place.param.ndim == 3 and not is_convolution(place) and FLATTENED.isdisjoint(_classes(place))


def _classes(place: Place) -> tuple[str, ...]:
    """The class of the module and those that it derives from; none where it is not known."""
    return () if place.module is None else class_names(place.module)


def _is_transposed_conv(place: Place) -> bool:
    """Whether it is a weight of a transposed convolution, (in, out / groups, *kernel), and no matrix that makes one."""
    is_transposed = is_a(place.module, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return is_transposed and place.param.ndim > 2


def _number(place: Place, name: str) -> int:
    """A number of the module; 1 of one that was traced, which has none."""
    return int(getattr(place.module, name, 1))


def _is_transposed(place: Place) -> bool:
    """Whether the matrix is stored in x out."""
    module = place.module
    if getattr(module, "is_transposed", False) is True or not TRANSPOSED.isdisjoint(_classes(place)):
        return True
    if place.path[-1] in _of_class(TRANSPOSED_OF_CLASSES, place):
        return True
    return place.param.ndim == 2 and _any_of(TRANSPOSED_NAMES).match(place.path[-1]) is not None


def reading(param: Tensor, values: Mapping[str, Any]) -> str:
    """How the parameter is read, as in " read as 8 matrices (64, 32)"; nothing to say of a plain matrix."""
    counts: Counter[tuple[int, int]] = Counter()
    read = read_pieces(param, values)
    for piece in read:
        counts[piece.rows, piece.cols] += piece.batch
    if param.ndim == 2 and not read[0].transposed and read[0].shape == (1, *param.shape):
        return ""
    matrices = " and ".join(f"{n} matrices {shape}" if n > 1 else f"{shape}" for shape, n in counts.items())
    return f" read as {matrices}" + (", transposed" if read[0].transposed else "")


def read_pieces(param: Tensor, values: Mapping[str, Any]) -> tuple[Piece, ...]:
    """The pieces of a parameter under the layout values among a group's values."""
    return pieces(tuple(param.shape), **{key: values[key] for key in LAYOUT_KEYS if key in values})


def _fused_rows(place: Place) -> tuple[int, ...] | None:
    """Rows of each matrix in the fused weights of torch's own layers: q, k, v; the gates of a recurrent layer."""
    rows, leaf = place.param.shape[0], place.path[-1]
    if is_a(place.module, nn.MultiheadAttention) and leaf.startswith("in_proj") and rows % 3 == 0:
        return (rows // 3,) * 3
    if is_a(place.module, nn.RNNBase, nn.RNNCellBase) and leaf.startswith(("weight_ih", "weight_hh")):
        hidden = int(getattr(place.module, "hidden_size", rows))
        return (hidden,) * (rows // hidden) if rows > hidden and rows % hidden == 0 else None
    return None


def _vector(place: Place) -> str | None:
    if place.param.ndim >= 2:
        return None
    return f"{place.param.ndim}-D" if place.module is None else f"{place.param.ndim}-D of {place.kind}"


def _embedding_module(place: Place) -> str | None:
    is_embedding = is_a(place.module, nn.Embedding, nn.EmbeddingBag) or _class_matches(place, _EMBEDDING_CLASS)
    return place.kind if is_embedding else None


def _normalization(place: Place) -> str | None:
    is_normalization = is_a(place.module, _NormBase) or _class_matches(place, _NORM_CLASS)
    return f"normalization ({place.kind})" if is_normalization else None


def _class_matches(place: Place, pattern: re.Pattern[str]) -> bool:
    return place.module is not None and pattern.search(class_name(place.module)) is not None


def _known_role(place: Place) -> str | None:
    return None if place.role is None else f"{place.role.role}, by {place.role.source}"


def _head_name(place: Place) -> str | None:
    if is_a(place.module, *_FUSED) or is_a(place.parent, nn.MultiheadAttention):
        return None  # a layer called multi_head holds hidden matrices
    path = place.path
    if path[-2:-1] and path[-2] in NO_HEADS:
        return None
    layer = ".".join(path[:-1])
    if _any_of(_HEAD_ENDS).match(layer):
        end = next(end for end in HEAD_PATHS if fnmatchcase(layer, f"*{end}"))
        return f"head, by the name {end!r}"
    top = path[:1] if len(path) <= 2 else []
    first = path[:1] if len(path) <= HEAD_DEPTH and path[0] not in NO_HEADS else []
    is_in_list = "".join(path[-2:-1]).isdigit() and place.module is not None and not is_a(place.parent, nn.Sequential)
    of_list = path[-3:-2] if is_in_list else []
    return _named("head", [*path[-2:], *of_list, *first], HEADS) or _named("head", top, TOP_LEVEL_HEADS)


def _embedding_name(place: Place) -> str | None:
    if is_convolution(place):
        return None  # a patch embedding is a linear map of pixels
    path = place.path
    top = path[:1] if len(path) <= 2 and place.module is None else []
    patterns = tuple(p for p in EMBEDDINGS if not is_a(place.module, nn.Linear) or "*" not in p)
    named = _named("embedding", path[-2:], patterns) or _named("embedding", top, TOP_LEVEL_EMBEDDINGS)
    if not _is_attention(place):
        named = named or _named("learned input", path[-1:], LEARNED_INPUTS)
    words = POSITION_WORDS & _words(path[-1])
    layer = "_".join(path[-2:-1])
    if place.module is None:  # a module known by its name alone
        words |= (POSITION_WORDS - PROJECTION_WORDS) & _words(layer)
    if layer.split("_")[-1] in BIAS_WORDS and (place.module is None or is_a(place.module, nn.Linear)):
        words |= POSITION_WORDS & _words(layer)
    return named or (f"embedding, by the word {min(words)!r}" if words else None)


def _is_attention(place: Place) -> bool:
    """Whether a parameter is attention's own, by the module's class, or by its name where that is all."""
    if place.module is None:
        return bool({"attn", "attention"} & _words("_".join(place.path[-2:-1])))
    return _class_matches(place, _ATTENTION_CLASS)


def _table_name(place: Place) -> str | None:
    last, layer = place.path[-1], place.path[-2:-1]
    if words := BIAS_WORDS & _words(last):
        return f"bias, by the word {min(words)!r}"
    is_map = is_a(place.module, nn.Linear) or is_convolution(place)
    if not is_map and (words := NORM_WORDS & _words("_".join(layer))):
        return f"normalization, by the word {min(words)!r}"
    of_class = _of_class(ELEMENTWISE_OF_CLASSES, place)
    return _named("elementwise table", [last], (*ELEMENTWISE, *of_class))


def _of_class(names: Mapping[str, tuple[str, ...]], place: Place) -> tuple[str, ...]:
    """What a table by classes says of the module's; nothing where it has none of them."""
    return next((names[each] for each in _classes(place) if each in names), ())


def _words(name: str) -> set[str]:
    """The words of a name in small letters, between underscores and digits."""
    return set(re.findall("[a-z]+", name))


def _named(what: str, names: list[str], patterns: tuple[str, ...]) -> str | None:
    matches = _any_of(patterns).match  # most names match none, and are looked at once
    names = [name for name in names if matches(name)]
    for pattern in patterns if names else ():
        if any(fnmatchcase(name, pattern) for name in names):
            return f"{what}, by the name pattern {pattern!r}"
    return None


@functools.cache
def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, patterns)) or r"(?!)")


def _depthwise(place: Place) -> str | None:
    shape = tuple(place.param.shape)
    if is_convolution(place) and hasattr(place.module, "in_channels"):
        depthwise = 1 < _number(place, "in_channels") == _number(place, "groups")
        return f"depthwise {place.kind}" if depthwise else None
    return f"depthwise by its shape {shape}" if len(shape) > 3 and shape[1] == 1 else None


def _leading_one(place: Place) -> str | None:
    shape = tuple(place.param.shape)
    return f"a table, by the leading 1 of its shape {shape}" if shape[0] == 1 and _is_stack(place) else None


def _side_of_one(place: Place) -> str | None:
    is_vector = any(min(piece.rows, piece.cols) <= 1 for piece in read_pieces(place.param, layout(place)))
    return f"a vector in disguise, shape {tuple(place.param.shape)}" if is_vector else None


_RULES: tuple[Callable[[Place], str | None], ...] = (
    _vector,
    _embedding_module,
    _normalization,
    _head_name,
    _embedding_name,
    _known_role,
    _table_name,
    _depthwise,
    _leading_one,
    _side_of_one,
)

_ROLES: dict[Callable[[Place], str | None], str] = {
    _vector: "vector",
    _embedding_module: "embedding",
    _normalization: "normalization",
    _head_name: "head",
    _embedding_name: "embedding",
    _table_name: "table",
    _leading_one: "table",
}
