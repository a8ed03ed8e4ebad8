"""The attention layers of a model, by the names of their projections."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..routing.architectures import (
    FUSED,
    HEAD_COUNTS,
    HEAD_SIZES,
    INTERLEAVED,
    KEY_VALUE_COUNTS,
    LATENT_KEYS,
    LATENT_QUERIES,
    NOPE_SIZES,
    OTHER_ORDER,
    QUERY_KEY,
    QUERY_KEY_NORMS,
    ROPE_SIZES,
)
from ..routing.known import class_name, class_names
from .layers import AttentionLayer, Rows, read_projection

__all__ = ["attention_layers"]


def attention_layers(model: nn.Module) -> dict[str, AttentionLayer]:
    """The attention layers of a model by the path of their module, as `QKClip` takes them.

    Known are nn.MultiheadAttention; modules with q_proj and k_proj, query and key, wq and wk, and the like; with q, k
    and v in one weight under the names that `steepest.routing.fused_layouts` knows; and latent attention (DeepSeek,
    Kimi). Numbers and sizes of heads are the module's own or its config's. Look at what was found: a weight named qkv
    may be laid out as nobody else's.

    ValueError where no layer is known, and where one normalizes its queries and keys (q_norm): a norm takes out what
    QK-clip scales.
    """
    layers = {}
    for name, module in model.named_modules():
        layer = _layer(module)
        if layer is not None:
            _refuse_norms(name, module)
            layers[name] = layer
    if not layers:
        raise ValueError(
            f"no attention layer is known in {class_name(model)}: give them to QKClip by hand, "
            "{'path.of.module': AttentionLayer.separate(q, k, num_heads)}, fused or latent"
        )
    return layers


def _layer(module: nn.Module) -> AttentionLayer | None:
    if isinstance(module, nn.MultiheadAttention):
        return _multihead(module)
    children = {name.lower(): child for name, child in module.named_children() if _is_matrix(child)}
    layer = _latent(module, children)
    if layer is not None:
        return layer
    for q, k in QUERY_KEY:
        if q in children and k in children:
            return _separate(module, children[q], children[k])
    for name, child in children.items():
        if FUSED.get(name) == ("q", "k", "v") or name in INTERLEAVED:
            return _fused(module, child, name in INTERLEAVED or getattr(module, "head_first", False) is True)
    return None


def _latent(module: nn.Module, children: Mapping[str, nn.Module]) -> AttentionLayer | None:
    query = next((children[name] for name in LATENT_QUERIES if name in children), None)
    key = next((children[name] for name in LATENT_KEYS if name in children), None)
    nope, rope = _number(module, NOPE_SIZES), _number(module, ROPE_SIZES)
    if query is None or key is None or nope is None or rope is None:
        return None
    return AttentionLayer.latent(query, key, _outputs(query) // (nope + rope), nope, rope)


def _separate(module: nn.Module, query: nn.Module, key: nn.Module) -> AttentionLayer | None:
    """The layer of two projections, by the size of a head where one is said: layers of one model may differ in the
    number of theirs.
    """
    size = _number(module, HEAD_SIZES)
    if size is not None and _outputs(query) % size == 0 and _outputs(key) % size == 0:
        return AttentionLayer.separate(query, key, _outputs(query) // size, _outputs(key) // size)
    heads = _number(module, HEAD_COUNTS)
    return None if heads is None else AttentionLayer.separate(query, key, heads, _number(module, KEY_VALUE_COUNTS))


def _fused(module: nn.Module, projection: nn.Module, interleaved: bool) -> AttentionLayer | None:
    heads = _number(module, HEAD_COUNTS)
    groups = _number(module, KEY_VALUE_COUNTS) or heads
    if not heads or not groups or _outputs(projection) % (heads + 2 * groups):
        return None
    if not OTHER_ORDER.keys().isdisjoint(class_names(module)):
        return None
    return AttentionLayer.fused(projection, heads, groups, interleaved=interleaved)


def _multihead(module: nn.MultiheadAttention) -> AttentionLayer:
    """torch's own, with the key that add_bias_kv adds to those of the input."""
    heads = module.num_heads
    q = torch.arange(heads).repeat_interleave(module.embed_dim // heads)
    k, fused = heads + q, torch.cat([q, heads + q, torch.full_like(q, 3 * heads)])
    if module.in_proj_weight is not None:
        rows = [Rows(module.in_proj_weight, 0, fused)]
    else:
        rows = [Rows(module.q_proj_weight, 0, q), Rows(module.k_proj_weight, 0, k)]
    if module.in_proj_bias is not None:
        rows.append(Rows(module.in_proj_bias, 0, fused))
    if module.bias_k is not None:
        rows.append(Rows(module.bias_k, 2, k))
    return AttentionLayer(heads, heads, tuple(rows))


def _refuse_norms(name: str, module: nn.Module) -> None:
    norms = [
        child
        for child, inner in module.named_children()
        if child.lower() in QUERY_KEY_NORMS and not isinstance(inner, nn.Identity)
    ]
    if norms:
        raise ValueError(
            f"{name or class_name(module)!r} normalizes its queries and keys ({', '.join(norms)}), so that their size "
            "does not depend on the weights that QK-clip scales: leave QKClip out, or give it other layers by hand"
        )


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def _outputs(projection: nn.Module) -> int:
    return read_projection("attention", projection).length


def _number(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first of these that the module has, or its config: a layer may differ from what its model says."""
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            value = holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None
