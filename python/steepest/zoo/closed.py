"""Which models are closed: the Taylor series of their gradient in the step is summed by finitely many numbers.

Every tensor of a forward pass is one of these functions of the free parameters:

    constant          whatever made it: a frozen backbone, its ReLUs
    polynomial        sums, products and linear maps of polynomials: a finite series
    exponential       sums and products of polynomials and of exp, sin and cos of polynomials: exp((z + d) x) is
                      exp(z x) exp(d x), and derivatives stay sums of such products

An operation that leads out of them (ReLU, a division by a parameter, exp of exp) ends it. The forward pass is run once
and its operations are looked at as they come, so that what a `forward` does counts, not what a class is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CONSTANT, POLYNOMIAL, EXPONENTIAL = 0, 1, 2

_SUMS_AND_PRODUCTS = (
    "_adaptive_avg_pool2d _adaptive_avg_pool3d _reshape_alias _to_copy _trilinear _unsafe_view add addbmm addcmul "
    "addmm addmv addr alias as_strided avg_pool2d avg_pool3d baddbmm bmm cat clone constant_pad_nd convolution "
    "cumsum diagonal dot embedding expand flip gather index index_select lift_fresh linear masked_fill mean "
    "mkldnn_convolution mm mul mv neg permute positive prod repeat reshape roll rsub select slice split "
    "split_with_sizes squeeze stack sub sum t trace transpose tril triu unbind unfold unsqueeze vdot view where"
)
#: Sums, and maps that are linear in each of their tensors: the result is what the highest of them is.
MULTILINEAR = frozenset(_SUMS_AND_PRODUCTS.split())
EXPONENTIALS = frozenset({"exp", "exp2", "sin", "cos", "sinh", "cosh"})
ACCEPTED = (
    "Accepted are sums, products, integer powers and linear maps (Linear, Conv, Bilinear, average pooling) of what "
    "depends on free parameters, and exp, sin and cos of their polynomials (AION)"
)
WAY_OUT = "Freeze the parameters before it (requires_grad=False), or train the model with an optimizer"


@dataclass(frozen=True)
class Call:
    """A module's call: its name in the model, its one argument (None if it has others) and what it returned."""

    name: str
    module: nn.Module
    argument: Tensor | None
    output: Any
    constant: bool  # the argument does not depend on free parameters


@dataclass(eq=False)
class Closure(TorchDispatchMode):
    """Looks at every operation; `kinds` says what each tensor that depends on free parameters is.

    `alive` keeps the tensors, so that an id is a tensor's for as long as this lives.
    """

    free: list[Tensor]
    names: dict[nn.Module, str]
    kinds: dict[int, int] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)
    inside: list[nn.Module] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        for parameter in self.free:
            self._remember(parameter, POLYNOMIAL)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        kinds = [self.kind(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        before = self._generators() if torch.Tag.nondeterministic_seeded in func.tags else []
        out = func(*args, **kwargs)
        if not all(map(torch.equal, before, self._generators())):  # attention may be random, and need not be
            raise ValueError(f"{self._layer()} is random ({name}): call model.eval(), the loss should be deterministic")
        if not any(kinds) or name.endswith("_like"):
            return out
        if func._schema.is_mutable:
            raise ValueError(f"{self._layer()} changes a tensor in place ({name}): give its result a tensor of its own")
        leaves, kind = tree_leaves(out), _result(func, args, kinds, self.kind)
        if kind is None or not all(leaf.is_floating_point() or leaf.is_complex() for leaf in leaves):
            raise ValueError(
                f"{self._layer()} is not closed: no finite number of terms sums the Taylor series through its {name}. "
                f"{ACCEPTED}. {WAY_OUT}"
            )
        if any(leaf.dtype.itemsize < 8 for leaf in leaves):
            raise ValueError(f"{self._layer()} rounds what depends on free parameters ({name}): leave it in fp64")
        for leaf in leaves:
            self._remember(leaf, kind)
        return out

    def kind(self, tensor: Any) -> int:
        return self.kinds.get(id(tensor), CONSTANT)

    def _remember(self, tensor: Tensor, kind: int) -> None:
        self.kinds[id(tensor)] = kind
        self.alive.append(tensor)

    def _generators(self) -> list[Tensor]:
        """The states of the generators that an operation may draw from."""
        device = self.free[0].device
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]

    def _layer(self) -> str:
        module = self.inside[-1]
        name, kind = self.names[module], type(module).__name__
        return f"layer {name!r} ({kind})" if name else f"the model ({kind})"

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Knows which layer is running, and keeps every call; the generators are afterwards where they were."""
        handles = []
        for module in self.names:
            handles += [
                module.register_forward_pre_hook(lambda module, _: self.inside.append(module), prepend=True),
                module.register_forward_hook(self._returned, with_kwargs=True),
            ]
        try:
            device = self.free[0].device
            with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad(), self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _returned(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.inside.pop()
        one = args[0] if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) else None
        self.calls.append(Call(self.names[module], module, one, output, one is not None and not self.kind(one)))


def _result(func: Any, args: Any, kinds: list[int], kind: Any) -> int | None:
    """What an operation makes of its tensors; None if it is not closed."""
    name, highest = func.overloadpacket.__name__, max(kinds)
    if name in MULTILINEAR:
        return highest
    if name == "div" and not func._overloadname.endswith("mode") and not (len(args) > 1 and kind(args[1])):
        return highest
    if name == "pow" and isinstance(args[1], (int, float)) and args[1] >= 0 and args[1] == int(args[1]):
        return highest
    if name in EXPONENTIALS and highest == POLYNOMIAL:
        return EXPONENTIAL
    return None
