"""K-FAC: the Fisher matrix of a layer as a Kronecker product of what goes in and of what comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import unfold
from torch.nn.parallel import DistributedDataParallel

from ..linalg.basis import symmetrize
from ..matrices import LAYOUT_KEYS
from ..ops.multi_tensor import Scaling
from ..optimizer.checkpoint_state import Kept
from ..optimizer.group_options import Group, adam_hyper, number
from ..optimizer.wrappers import asking_scaler
from ..parts import Hyper, Momentum, Number, Sides
from ..parts.precondition.kronecker import FACTORS
from ..sharding.local import is_sharded
from ..step.modes import in_default_modes
from .kronecker import BasesAndExtras, KroneckerOptimizer
from .shared import EXTRAS

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Of a parameter's state: the terms that its factors are averages of.
PASSES = "backward_passes"
# Arguments of the other methods, and why not.
WHOLE_LAYERS = "its factors are those of whole layers as they are called"
NOT_TAKEN = {
    **dict.fromkeys(LAYOUT_KEYS, WHOLE_LAYERS),
    "shampoo_beta": "the decay rate of its factors is betas[1]",
    "factor_dtype": "its factors are averaged as they are collected, in fp32",
    "block_preconditioner": "a layer's sides have one factor or none",
}


class KFAC(KroneckerOptimizer):
    """Natural gradient descent for linear layers and convolutions, with the Fisher matrix as S (x) A.

        A <- beta2 A + (1 - beta2) E[a a^T]       a: inputs of the layer
        S <- beta2 S + (1 - beta2) E[d d^T]       d: gradients of a sample's loss by the layer's outputs
        m <- beta1 m + (1 - beta1) g;   pi^2 = mean eigenvalue of A / mean eigenvalue of S
        W <- (1 - lr weight_decay) W - lr (S + sqrt(damping) / pi I)^-1 m (A + pi sqrt(damping) I)^-1

    A and S, with Adam's bias correction, come from hooks that see every forward pass in training mode and the backward
    pass after it. All backward passes between two steps are one batch, one term of the averages: the loss is the mean
    over the rows (Linear) or images (Conv2d) of them all, as it is for loss / k of k equal micro-batches. A term that
    is not finite is left out. Where no step follows, zero_grad() forgets what was collected. With the labels of the
    data these are the factors of the empirical Fisher matrix, with labels sampled from the model those of the true
    one. A convolution's A sums over positions and its S averages over them (arXiv:1602.01407). The inverses are of the
    factors' diagonals in the bases of the last refresh, which comes before its own step; of directions that no sample
    had until then rounding chooses the basis, and runs agree there with precondition_frequency=1 alone.

    model: its Linear and Conv2d weights (groups=1) are stepped by this rule, everything else by AdamW. A bias is not
        part of its layer's matrix. The ranks of a DistributedDataParallel model share their factors before every step.
    lr, weight_decay: numbers >= 0.   betas: of m, and of A and S.   damping: > 0, in units of the Fisher matrix.
    loss_scale: what that mean is multiplied by, "sum" for the number of rows: a loss with reduction="sum". The factors
        are those of the mean whatever it is, and under a torch.amp.GradScaler; the gradient is not touched.

    `remove_hooks()` ends the collecting. A copy of model and optimizer made at once collects for itself. With
    precondition_frequency=1 and refresh="eigh" steps are invariant to invertible linear changes of a layer's inputs and
    outputs, but for the damping. Source: arXiv:1503.05671.
    """

    carried: ClassVar[tuple[str, ...]] = ("_handles", "_batches")
    refused_options = tuple(NOT_TAKEN)
    _ranks: Any = None
    #: of this step
    _scaler: torch.amp.GradScaler | None = None
    argument_lines: ClassVar[dict[str, str]] = {
        "model": "a module, whose Linear and Conv2d layers are watched",
        "damping": "added to the Fisher matrix",
        "loss_scale": 'what the mean of the samples\' losses is multiplied by; "sum": their number',
    }

    def __init__(
        self,
        model: nn.Module,
        lr: Number = 1e-2,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        damping: float = 1e-3,
        loss_scale: Number | Literal["sum"] = 1.0,
        **extra: Unpack[BasesAndExtras],
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"KFAC takes a module, whose layers it watches, but is given: {type(model).__name__}")
        for name in self.refused_options:
            if name in extra:
                raise TypeError(f"KFAC does not take {name}: {NOT_TAKEN[name]}")
        layers = [layer for layer in model.modules() if _is_supported(layer)]
        if not layers:
            raise ValueError("KFAC found no Linear or Conv2d (groups=1, zero padding) to watch; use torch.optim.AdamW")
        options = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "damping": damping, "loss_scale": loss_scale}
        self._batches: dict[Tensor, _Batch] = {}
        super().__init__(list(_groups(model)), options, extra)
        self._handles = [layer.register_forward_hook(self._watch, with_kwargs=True) for layer in layers]
        if isinstance(model, DistributedDataParallel):
            self._ranks = model.process_group

    def check_values(self, group: Group) -> None:
        defaults: Mapping[str, Any] = EXTRAS
        cut = next((key for key in LAYOUT_KEYS if group[key] not in (defaults[key], 0)), None)
        if cut is not None:
            raise ValueError(f"KFAC does not take {cut}={group[cut]!r}: {WHOLE_LAYERS}; leave it out")
        super().check_values(group)

    def check_parameters(self, group: Group) -> None:
        """RuntimeError for sharded parameters: a layer's factors are collected where its inputs are, on every rank."""
        if group["share_work"] or any(is_sharded(p) for p in group["params"]):
            what = "share_work" if group["share_work"] else "sharded parameters (DTensor)"
            raise RuntimeError(
                f"KFAC does not take {what}: its hooks average whole factors on every rank; use "
                "DistributedDataParallel, which keeps every matrix whole"
            )
        super().check_parameters(group)

    def kept_state(self, p: Tensor, group: Group) -> dict[str, Kept]:
        passes = {PASSES: Kept((), ">= 0", whole=True, missing="refuse", later=True)} if group["use_muon"] else {}
        return {**super().kept_state(p, group), **passes}

    def parts(self, group: Group) -> dict[str, Any]:
        sides = Sides(exponent=1.0, damping="factored")
        precondition = self.rotated(group, sides, external=True, update_first=True)
        return {"momentum": Momentum(dtype=group["momentum_dtype"]), "precondition": precondition}

    def hyper(self, group: Group) -> Hyper:
        return adam_hyper({**group, "eps": group["damping"]})

    @property
    def _step_supports_amp_scaling(self) -> bool:
        self._scaler = asking_scaler()
        return self._scaler is not None

    def remove_hooks(self) -> None:
        """Stops looking at the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Gradients are cleared as by torch; what hooks have collected since the last step goes with the gradients."""
        self._batches.clear()
        super().zero_grad(set_to_none)

    def take_step(self, scaling: Scaling, loss: Number | None) -> None:
        """RuntimeError for a weight whose layer was not watched, before anything moves."""
        matrices = [(p, group) for group in self.param_groups if group["use_muon"] for p in group["params"]]
        stepping = [(p, group) for p, group in matrices if p.grad is not None]
        for p, _ in stepping:
            if p not in self._batches and PASSES not in self.state.get(p, {}):
                raise RuntimeError(
                    f"a weight of shape {tuple(p.shape)} has a gradient and no factors: no backward pass went through "
                    "its layer in training mode since the hooks were set"
                )
        self.ready_plan()  # whose checks come before the averages take anything
        for p, group in stepping:
            self._average(p, group, scaling)
        self._batches.clear()
        self._scaler = None
        super().take_step(scaling, loss)

    def _average(self, p: Tensor, group: Group, scaling: Scaling) -> None:
        """The averages of p take what was collected since the last step, and are shared among ranks."""
        batch = self._batches.get(p)
        if batch is not None:
            self._fold(p, group, batch, scaling)
        state = self.state[p]
        for key in FACTORS if self._ranks is not None else ():
            if state[key].numel():
                dist.all_reduce(state[key], group=self._ranks)
                state[key].div_(dist.get_world_size(self._ranks))

    def _fold(self, p: Tensor, group: Group, batch: _Batch, scaling: Scaling) -> None:
        loss_scale: Number = batch.rows if group["loss_scale"] == "sum" else number(group["loss_scale"])
        if scaling.grad_scale is not None:
            loss_scale = scaling.grad_scale.to(p.device, torch.float64).reshape(()) * loss_scale
        elif self._scaler is not None and group["loss_scale"] != self._scaler.get_scale():
            loss_scale = self._scaler.get_scale() * loss_scale  # the hooks saw what unscale_ has divided since
        if PASSES not in self.state[p]:
            self.init_state_of(p, group)
            self.state[p][PASSES] = torch.zeros((), dtype=torch.float64, device=p.device)
        state = self.state[p]
        passes, uses = state[PASSES], max(1, batch.uses)
        # d is that of the loss's mean over all rows, times the scale.
        outputs = batch.outputs / loss_scale * (batch.rows**2 / uses) / loss_scale
        # A product is symmetric up to rounding, and which refresh takes a factor must not depend on that.
        both = (symmetrize(outputs), symmetrize(batch.inputs / uses))
        products = [t.to(state[key].dtype) for t, key in zip(both, FACTORS, strict=True)]
        finite = torch.stack([torch.isfinite(product).all() for product in products]).all()
        if scaling.found_inf is not None:
            finite = finite & (scaling.found_inf.to(p.device).reshape(()) == 0)
        passes.add_(finite)
        beta = group["betas"][1]
        share = torch.where(finite, (1 - beta) / (1 - beta**passes), 0)
        for key, product in zip(FACTORS, products, strict=True):
            if state[key].numel():
                state[key].lerp_(torch.where(finite, product, 0)[None], share.to(state[key].dtype))

    def _watch(self, layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if layer.training and torch.is_grad_enabled() and weight.requires_grad:
            a = (inputs[0] if inputs else named["input"]).detach()
            output.register_hook(lambda d: self._collect(layer, a, d.detach()))

    @in_default_modes
    def _collect(self, layer: nn.Module, a: Tensor, d: Tensor) -> None:
        """Adds the products of one use of a layer. A weight without a gradient begins a batch."""
        weight, _ = self._group_of(layer)
        batch, pass_ = self._batches.get(weight), torch._C._current_graph_task_id()
        if batch is None or (weight.grad is None and batch.last != pass_):
            batch = None
        dtype = torch.promote_types(weight.dtype, torch.float32)
        outputs, inputs, rows = _products(layer, a.to(dtype), d.to(dtype))
        if batch is None:
            batch = self._batches[weight] = _Batch(torch.zeros_like(outputs), torch.zeros_like(inputs))
        batch.add(outputs, inputs, rows, pass_)

    def _group_of(self, layer: nn.Module) -> tuple[Tensor, Group]:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        for group in self.param_groups:
            if any(p is weight for p in group["params"]):
                return weight, group
        raise RuntimeError(
            f"the weight of {layer} is not among the optimizer's parameters any more, as after fully_shard, which KFAC "
            "does not take: call remove_hooks"
        )


def _is_supported(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and not isinstance(layer.padding, str) and layer.padding_mode == "zeros"
    return isinstance(layer, nn.Linear)


def _groups(model: nn.Module) -> Iterator[Group]:
    """Watched weights, other tensors, and those of fewer than two dimensions, which are not decayed; each once."""
    taken = {layer.weight for layer in model.modules() if _is_supported(layer)}
    named = list(model.named_parameters())
    kinds: tuple[tuple[Group, Callable[[Tensor], bool]], ...] = (
        ({"use_muon": True, "batch_dims": 0}, lambda p: p in taken),
        ({"use_muon": False}, lambda p: p not in taken and p.ndim >= 2),
        ({"use_muon": False, "weight_decay": 0.0}, lambda p: p not in taken and p.ndim < 2),
    )
    for values, belongs in kinds:
        members = [(name, p) for name, p in named if belongs(p)]
        if members:
            yield {"params": members, **values}


@dataclass
class _Batch:
    """What hooks have collected since the last step, of one weight: sums of products, unscaled and not divided.

    rows: of the losses; uses: of the layer, which a model may use more than once; last: the backward pass that was last
    added.
    """

    outputs: Tensor
    inputs: Tensor
    rows: int = 0
    uses: int = 0
    last: int = -1
    _of_pass: int = 0

    def add(self, outputs: Tensor, inputs: Tensor, rows: int, pass_: int) -> None:
        self.outputs, self.inputs = self.outputs + outputs, self.inputs + inputs
        self.uses += rows
        known = self._of_pass if pass_ == self.last else 0
        self.rows += max(0, rows - known)
        self.last, self._of_pass = pass_, max(rows, known)


def _products(layer: nn.Module, a: Tensor, d: Tensor) -> tuple[Tensor, Tensor, int]:
    """(sum of d d^T, sum of a a^T, rows or images) of one use of a layer; d d^T is averaged over positions."""
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        batch = (a, d) if a.ndim == 4 else (a[None], d[None])
        rows = unfold(batch[0], layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2)
        images, positions = rows.shape[:2]
        a, d = rows.flatten(0, 1), batch[1].flatten(2).transpose(1, 2).flatten(0, 1)
        return (d.mT @ d) / max(1, positions), a.mT @ a, images
    a, d = (t[None] if t.ndim < 2 else t.flatten(0, -2) for t in (a, d))
    return d.mT @ d, a.mT @ a, len(a)
