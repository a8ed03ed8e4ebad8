"""Optimizers, parameters and gradients for tests of the optimizer shell: the same ones every time, without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.optimizer import MatrixOptimizer
from steepest.zoo.product import ProductNormOptimizer
from support.slow import slow

OPTIMIZERS: tuple[type[MatrixOptimizer], ...] = (steepest.Muon, steepest.MuAdam, steepest.MuAdamSANIA)
#: Those with bases. SOAP and KL-Shampoo do not move in their first step.
KRONECKER: tuple[type[MatrixOptimizer], ...] = (
    steepest.Shampoo,
    steepest.OneSidedShampoo,
    steepest.KLShampoo,
    steepest.SOAP,
    steepest.KLSOAP,
    steepest.SPlus,
)
#: The rest of the zoo, less its functions, Momo (a part of one) and KFAC, which wants a module.
RELATIVES: tuple[type[MatrixOptimizer], ...] = tuple(
    cls
    for cls in map(vars(steepest.zoo).get, steepest.zoo.__all__)
    if isinstance(cls, type)
    and issubclass(cls, MatrixOptimizer)
    and cls not in (*OPTIMIZERS, *KRONECKER, steepest.Momo, steepest.KFAC)
)
#: Every class that takes groups and no module.
EVERY: tuple[type[MatrixOptimizer], ...] = (*OPTIMIZERS, *KRONECKER, *RELATIVES)
#: Those whose layers depend on one another.
COUPLED = (steepest.MuonMax, steepest.ProductNormDescent, steepest.ProdigyMuon)
#: A class for each way through a step: fused, after the direction, with factors, roots or bases, coupled, by some rows.
#: A test with a parameter `cls` that has classes of these and others is slow for the others (conftest.py).
KINDS: tuple[type[MatrixOptimizer], ...] = (
    *OPTIMIZERS[:2],
    *(steepest.Shampoo, steepest.KLShampoo, steepest.SOAP, steepest.SPlus),
    *(steepest.Lion, steepest.Scion, steepest.TrustRegion, steepest.NIGT),
    *(steepest.Schattor, steepest.MuonMax, steepest.NorMuon, steepest.Dion2),
)
both_backends = pytest.mark.parametrize("backend", ["auto", "torch"])


def on_backends(classes: Sequence[type[MatrixOptimizer]]) -> Any:
    """Every class on the backend that it gets and by torch's operations, of which two of three kinds are slow."""
    every = [(cls, "auto") for cls in classes]
    by_torch = [cls for cls in classes if cls in KINDS][::3]
    every += [(cls, "torch") if cls in by_torch else slow(cls, "torch") for cls in classes]
    return pytest.mark.parametrize("cls, backend", every)


MATRICES = ((8, 5), (5, 8), (6, 6), (8, 5))
VECTORS = ((7,), (4, 3))


def noise(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian numbers from a generator of their own."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(
    shapes: Iterable[Sequence[int]], dtype: torch.dtype = torch.float32, grad_dtype: torch.dtype | None = None
) -> list[nn.Parameter]:
    found = [nn.Parameter(noise(shape, seed, dtype)) for seed, shape in enumerate(shapes)]
    for p in found if grad_dtype else ():
        p.grad_dtype = grad_dtype
    return found


def give_gradients(params: Iterable[Tensor], step: int, dtype: torch.dtype | None = None) -> None:
    """The gradients of this step: a function of the step and of the parameter's place in the list."""
    for index, p in enumerate(params):
        p.grad = noise(p.shape, 1000 * (step + 1) + index, dtype or p.dtype)


def train(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: range, dtype: torch.dtype | None = None
) -> None:
    for step in steps:
        give_gradients(params, step, dtype)
        optimizer.step()


def both_kinds(
    cls: type[MatrixOptimizer],
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    **extra: Any,
) -> tuple[MatrixOptimizer, list[nn.Parameter]]:
    """An optimizer with a matrix group (two buckets and a lone shape) and an AdamW group, and its parameters."""
    params = parameters((*MATRICES, *VECTORS), dtype, grad_dtype)
    n = len(MATRICES)
    groups = [{"params": params[:n]}, {"params": params[n:], "use_muon": False}]
    values = {"lr": 0.02, "weight_decay": 0.1, "adamw_weight_decay": 0.1, "adamw_lr": 0.01, **extra}
    return made(cls, groups, **values), params


def made(cls: type[MatrixOptimizer], params: Any, **values: Any) -> MatrixOptimizer:
    """cls(params, ...) without the arguments that it does not take: some have no decay, some no AdamW beside them."""
    refused = {"weight_decay"} if cls is steepest.Fromage else set()
    if issubclass(cls, ProductNormOptimizer):
        refused |= {"adamw_lr", "adamw_betas", "adamw_eps"}
    given = {key: value for key, value in values.items() if key not in refused}
    if cls is steepest.ProdigyMuon:
        given.setdefault("initial_step", 0.1)  # one that bf16 sees at once
    return cls(params, **given)


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def state_copies(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """The state of every parameter in group order; an empty dictionary where there is none yet."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [{key: value.detach().clone() for key, value in optimizer.state.get(p, {}).items()} for p in params]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits: NaN equals itself, -0 does not equal 0."""
    as_bytes = [t.detach().contiguous().flatten().view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


def all_same_bits(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def same_states(a: Sequence[dict[str, Tensor]], b: Sequence[dict[str, Tensor]]) -> bool:
    return all(x.keys() == y.keys() and all(same_bits(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True))


def moved(params: Iterable[Tensor], start: Iterable[Tensor]) -> Tensor:
    """How far all parameters together went from their start, as one fp64 vector."""
    return torch.cat([(p.detach().double() - s.double()).flatten() for p, s in zip(params, start, strict=True)])


def relative(found: Tensor, wanted: Tensor) -> float:
    """Frobenius distance relative to the wanted tensor."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def name_of(cls: type) -> str:
    """For the ids of parametrized tests."""
    return cls.__name__


def build(cls: type[MatrixOptimizer], **values: Any) -> MatrixOptimizer:
    """An optimizer of one matrix."""
    return made(cls, [{"params": parameters([(4, 3)])}], **values)


# ---- what many options are asked ------------------------------------------------------------------------------------

#: An optimizer and its parameters, new ones in every call.
Make = Callable[[], tuple[MatrixOptimizer, list[nn.Parameter]]]


def check_resume_and_bad_gradients(make: Make) -> None:
    """A resumed run is the run, to the bit, and a step without a good gradient leaves all but clocks as it was."""
    (optimizer, params), (second, others) = make(), make()
    train(optimizer, params, range(3))
    second.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p)
    for each, some in ((optimizer, params), (second, others)):
        train(each, some, range(3, 5))
        give_gradients(some, 5)
        for p in some:
            p.grad.view(-1)[0] = float("nan")  # type: ignore[union-attr]
        before, states = copies(some), state_copies(each)
        each.step()
        assert all_same_bits(some, before)
        for old, new in zip(states, state_copies(each), strict=True):
            assert old.keys() == new.keys()
            assert all(same_bits(old[key], new[key]) for key in old if key != "clock")
        train(each, some, range(6, 7))
    assert all_same_bits(params, others)
    assert same_states(state_copies(optimizer), state_copies(second))


def check_compiled_step(make: Make) -> tuple[MatrixOptimizer, MatrixOptimizer, Callable[[], object]]:
    """Three steps in one graph are near the eager ones; (that optimizer, the eager one, the compiled step)."""
    torch._dynamo.reset()
    (optimizer, params), (eager, others) = make(), make()
    step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    for i in range(3):
        give_gradients(params, i)
        give_gradients(others, i)
        step()
        eager.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    return optimizer, eager, step


def check_option_of_one_group(values: dict[str, Any], **options: Any) -> None:
    """Two equal matrices with equal gradients, of which one group has the values, go apart under Muon."""
    params = parameters([(6, 4), (6, 4)])
    params[1].data.copy_(params[0])
    optimizer = steepest.Muon([{"params": params[:1], **values}, {"params": params[1:]}], lr=0.1, **options)
    for p in params:
        p.grad = noise((6, 4), 9)
    optimizer.step()
    assert relative(params[0].detach(), params[1].detach()) > 1e-3
