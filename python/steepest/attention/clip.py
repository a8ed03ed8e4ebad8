"""QK-clip: attention logits stay below a threshold, by the weights of queries and keys."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..optimizer import MatrixOptimizer, unwrap
from ..optimizer.option_types import REAL, check_option
from ..optimizer.weights import Weights
from ..sharding.local import local_tensor, whole_tensor
from .discovery import attention_layers
from .layers import AttentionLayer
from .watching import Watching

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..sharding.ranks import Ranks

__all__ = ["QKClip"]

_THRESHOLD = replace(REAL, limits="> 0 and finite", fits=lambda value: 0 < value < math.inf)
_BALANCE = replace(REAL, limits="in [0, 1]", fits=lambda value: 0 <= value <= 1)


class QKClip:
    """Scales the query and key weights of heads whose largest logit is above a threshold, after every step.

        gamma_h = min(1, threshold / S_h)       S_h: largest logit of head h since the last step
        W_q of h  <-  gamma_h / beta W_q        beta = (largest gamma of the heads of a key head)^(1 - balance)
        W_k       <-  beta W_k                  biases likewise

    With the inputs of before, the largest logit of every head is then min(S_h, threshold), and a head that was below
    is what it was: where heads share a key and one of them is below, the queries of the others take all of gamma_h.
    One key head for each query head makes it gamma^balance and gamma^(1 - balance), as in the paper. Rotated queries
    beside a shared rotated key (`AttentionLayer.latent`) take gamma_h, and that key stays.

    optimizer: any of this package but NIGT, in whatever wrapper `unwrap` knows; its step clips from now on, its state
        is not touched (SPlus's average takes the clipped weights).
    layers: a model, whose `attention_layers` are taken and watched (`watch`); or a mapping of names to layers, whose
        maxima you hand over (`observe`) or have watched.
    threshold: > 0.   balance: in [0, 1], the share of the queries.
    group: the ranks among which maxima are reduced, all that have these layers; by default all there are. They make
        QKClip together, and step together.

    A layer is clipped in a step that moves all of its parameters, and its maxima begin anew; one that is left out,
    for a gradient that is not finite, leaves weights and maxima as they are. Everything is done on the device, without
    waiting, inside a captured or a compiled step too. Weights are scaled by their true value, kept mantissas included.
    `remove()` ends it. TypeError or ValueError, which name the value, before anything is changed.

    Source: arXiv:2507.20534, section 2.1 and Algorithm 1 (MuonClip).
    """

    def __init__(
        self,
        optimizer: Any,
        layers: nn.Module | Mapping[str, AttentionLayer],
        threshold: float = 100.0,
        balance: float = 0.5,
        *,
        group: ProcessGroup | None = None,
    ) -> None:
        optimizer = unwrap(optimizer)
        if not isinstance(optimizer, MatrixOptimizer):
            raise TypeError(f"QKClip takes an optimizer of steepest but got {type(optimizer).__name__}")
        if optimizer.extrapolates:
            raise TypeError(
                f"QKClip does not take {type(optimizer).__name__}, which would go on in the direction of a clip as in "
                "that of a step: use another optimizer"
            )
        self.threshold = float(check_option("threshold", threshold, _THRESHOLD))
        self.balance = float(check_option("balance", balance, _BALANCE))
        self.layers = dict(attention_layers(layers) if isinstance(layers, nn.Module) else _checked(layers))
        _check_parameters(optimizer, self.layers)
        self._buffers = [_Buffer(device, some) for device, some in _by_device(self.layers).items()]
        self._clipped = {name: part for buffer in self._buffers for name, part in buffer.parts.items()}
        self._ranks = [_ranks(group, buffer.maxima.device) for buffer in self._buffers]
        self._check_agreement()
        self._watching, self._has_seen = Watching(self.observe), False
        if isinstance(layers, nn.Module):
            self.watch(layers)
        self._hook = optimizer.register_weight_hook(self._clip)

    @torch.no_grad()
    def observe(self, layer: str, maxima: Tensor, first_head: int | None = None) -> None:
        """Takes the largest logits of a layer's heads into the running maximum since the last step.

        layer: its name.   maxima: (num_heads,), on the device, a DTensor too; `max_logits` computes them. -inf says
        nothing; NaN and inf say nothing either, and are counted (`metrics`).   first_head: of fewer heads, those of a
        tensor parallel rank: the number of the first one.   ValueError for names and shapes that do not fit.
        """
        part, self._has_seen = self._part(layer), True
        maxima = whole_tensor(maxima.detach())
        wanted = part.maxima if first_head is None else part.maxima[first_head : first_head + maxima.numel()]
        if maxima.ndim != 1 or maxima.shape != wanted.shape:
            raise ValueError(
                f"layer {layer!r} has {len(part.maxima)} heads but maxima of shape {tuple(maxima.shape)} were handed "
                f"over{'' if first_head is None else f' from first_head={first_head}'}: one number a head, and "
                "first_head=... where a rank has some of the heads"
            )
        maxima = maxima.to(wanted.device, wanted.dtype)
        said = maxima < torch.inf
        part.nonfinite.add_((~said).sum())
        torch.maximum(wanted, torch.where(said, maxima, -torch.inf), out=wanted)

    def watch(self, model: nn.Module) -> None:
        """Observes every call of torch's scaled_dot_product_attention inside the layers' modules, from now on.

        model: names of layers are paths of its modules.   In training mode and with gradients alone, also where
        checkpointing computes a layer anew; it costs the products of queries and keys once more. ValueError for a path
        that is not there, and for a Hugging Face model whose attention makes no such call.
        """
        kind = getattr(getattr(model, "config", None), "_attn_implementation", "sdpa")
        if kind not in ("sdpa", None):
            raise ValueError(
                f"attention of this model is {kind!r}, which does not call scaled_dot_product_attention: use "
                "model.set_attn_implementation('sdpa'), or hand maxima over by observe()"
            )
        modules = dict(model.named_modules())
        for name in self.layers:
            if name not in modules:
                close = difflib.get_close_matches(name, modules, 3, cutoff=0.3)
                raise ValueError(f"there is no module {name!r} in {type(model).__name__}; close names: {close}")
        for name in self.layers:
            self._watching.add(name, modules[name])

    def metrics(self) -> dict[str, Tensor]:
        """What the last steps that clipped saw, on the device: nothing waits for it until a value is read.

        max_logit       the largest of all layers, before clipping; -inf where nothing was observed
        clipped_heads   int64, how many heads were above the threshold
        nonfinite       int64, maxima that were NaN or inf so far, on this rank
        """
        device = self._buffers[0].last.device
        last = torch.cat([buffer.last.to(device) for buffer in self._buffers])
        nonfinite = torch.stack([buffer.nonfinite.to(device) for buffer in self._buffers])
        return {
            "max_logit": last.max(),
            "clipped_heads": (last > self.threshold).sum(),
            "nonfinite": nonfinite.sum(),
        }

    def remove(self) -> None:
        """Ends clipping and watching."""
        self._hook.remove()
        self._watching.remove()

    def __repr__(self) -> str:
        return f"QKClip({len(self.layers)} layers, threshold={self.threshold}, balance={self.balance})"

    def _part(self, layer: str) -> _Part:
        if layer not in self._clipped:
            close = difflib.get_close_matches(str(layer), self._clipped, 3, cutoff=0.3)
            raise ValueError(f"there is no layer {layer!r}; close names: {close}")
        return self._clipped[layer]

    def _check_agreement(self) -> None:
        said = [(name, layer.num_heads) for name, layer in self.layers.items()], self.threshold, self.balance
        for ranks in self._ranks:
            if ranks is not None and not ranks.agree(said):
                raise RuntimeError(
                    f"ranks {ranks.world} are about to clip different layers, or by other numbers: this one has "
                    f"{said}; pass group=, the ranks that have the same layers"
                )

    # ---- after a step -----------------------------------------------------------------------------------------------

    def _clip(self, weights: Weights) -> None:
        if self._watching and not self._has_seen and not torch.compiler.is_compiling():
            self._has_seen = True
            warnings.warn(
                "QKClip saw no call of scaled_dot_product_attention before this step: if the model computes attention "
                "in another way, hand maxima over by observe()",
                stacklevel=2,
            )
        for buffer, ranks in zip(self._buffers, self._ranks, strict=True):
            if ranks is not None:
                ranks.all_reduce(buffer.maxima, "max", "the largest attention logits")
        for part in self._clipped.values():
            if all(rows.parameter in weights for rows in part.layer.rows):
                self._clip_layer(part, weights)

    def _clip_layer(self, part: _Part, weights: Weights) -> None:
        maxima, taken = part.maxima, _all_stepped(part.layer, weights)
        gamma = torch.where(taken & (maxima > self.threshold), self.threshold / maxima, 1)
        factors = self._factors(gamma, part.layer.num_kv_heads)
        for rows, number in zip(part.layer.rows, part.numbers, strict=True):
            shape = [1] * rows.parameter.ndim
            shape[rows.dim] = -1
            weights.multiply(rows.parameter, factors[number].view(shape))
        part.last.copy_(torch.where(taken, maxima, part.last))
        maxima.copy_(torch.where(taken, -torch.inf, maxima))

    def _factors(self, gamma: Tensor, groups: int) -> Tensor:
        """The factors that `AttentionLayer` counts, of queries, keys, rotated queries, and 1."""
        of_group = gamma.view(groups, -1)
        keys = of_group.amax(1, keepdim=True) ** (1 - self.balance)
        return torch.cat([(of_group / keys).flatten(), keys.flatten(), gamma, gamma.new_ones(1)])


class _Buffer:
    """The numbers of all layers on one device, in memory that stays where it is.

    maxima: since the last step, of all heads.   last: what the last step saw.   nonfinite: 0-d.
    """

    def __init__(self, device: torch.device, layers: Mapping[str, AttentionLayer]) -> None:
        dtypes = [rows.parameter.dtype for layer in layers.values() for rows in layer.rows]
        dtype = reduce(torch.promote_types, dtypes, torch.float32)
        counts = [layer.num_heads for layer in layers.values()]
        self.maxima = torch.full((sum(counts),), -torch.inf, dtype=dtype, device=device)
        self.last = self.maxima.clone()
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        views = zip(self.maxima.split(counts), self.last.split(counts), strict=True)
        self.parts = {
            name: _Part(layer, maxima, last, self.nonfinite)
            for (name, layer), (maxima, last) in zip(layers.items(), views, strict=True)
        }


class _Part:
    """What of a buffer is one layer's, and the numbers of its rows' factors on the device."""

    def __init__(self, layer: AttentionLayer, maxima: Tensor, last: Tensor, nonfinite: Tensor) -> None:
        self.layer, self.maxima, self.last, self.nonfinite = layer, maxima, last, nonfinite
        self.numbers = [rows.factor.to(maxima.device) for rows in layer.rows]


def _all_stepped(layer: AttentionLayer, weights: Weights) -> Tensor:
    return torch.stack([weights.stepped(rows.parameter) for rows in layer.rows]).all()


def _by_device(layers: Mapping[str, AttentionLayer]) -> dict[torch.device, dict[str, AttentionLayer]]:
    devices: dict[torch.device, dict[str, AttentionLayer]] = {}
    for name, layer in layers.items():
        devices.setdefault(local_tensor(layer.rows[0].parameter).device, {})[name] = layer
    return devices


def _checked(layers: Any) -> Mapping[str, AttentionLayer]:
    if not isinstance(layers, Mapping) or not all(isinstance(layer, AttentionLayer) for layer in layers.values()):
        raise TypeError(
            "layers should be a model or a mapping of names to AttentionLayer, as attention_layers(model) gives, but "
            f"is: {layers!r}"
        )
    if not layers:
        raise ValueError("QKClip got no layers: leave it out, or give some")
    return layers


def _check_parameters(optimizer: MatrixOptimizer, layers: Mapping[str, AttentionLayer]) -> None:
    stepped = {p for group in optimizer.param_groups for p in group["params"]}
    others = {p for hook in optimizer._weight_hooks.values() for p in _clipped_by(hook)}
    of_layer: dict[Tensor, str] = {}
    for name, layer in layers.items():
        devices = {local_tensor(rows.parameter).device for rows in layer.rows}
        if len(devices) > 1:
            raise ValueError(f"the parameters of layer {name!r} are on several devices: {sorted(map(str, devices))}")
        for p in (rows.parameter for rows in layer.rows):
            if p not in stepped:
                raise ValueError(
                    f"a parameter of layer {name!r} (shape {tuple(p.shape)}) is not in the optimizer: it is frozen, "
                    "of another model, or was read before the model was sharded or replaced"
                )
            if p in others:
                raise ValueError(f"layer {name!r} is clipped by another QKClip of this optimizer: call its remove()")
            if p in of_layer:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is in layer {of_layer[p]!r} and again in layer {name!r}: "
                    "what is shared has no factor of its own; give one of them"
                )
            of_layer[p] = name


def _clipped_by(hook: Any) -> list[Tensor]:
    """The parameters that a weight hook clips."""
    clip = getattr(hook, "__self__", None)
    layers = clip.layers.values() if isinstance(clip, QKClip) else ()
    return [rows.parameter for layer in layers for rows in layer.rows]


def _ranks(group: ProcessGroup | None, device: torch.device) -> Ranks | None:
    """The ranks among which maxima are reduced; None where there are no others."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return None
    from ..sharding.ranks import Ranks

    group = dist.group.WORLD if group is None else group
    size = dist.get_world_size(group)
    return Ranks(group, range(size), device) if size > 1 else None
