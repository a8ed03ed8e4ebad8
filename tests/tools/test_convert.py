"""`steepest convert`: what it makes of another optimizer's checkpoint goes on as that optimizer would have."""

from __future__ import annotations

import contextlib
import copy
import math
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.tools import cli
from steepest.tools.convert import convert
from support.training import copies, noise, parameters, relative, train

SHAPES, VECTORS = [(8, 5), (5, 8)], [(7,), (4,)]
NAMES = ["a.weight", "b.weight", "a.bias", "b.bias"]


class Other(torch.optim.Optimizer):
    """Muon and AdamW as another library has them; `heavy`: the momentum is a sum, `ratio`: of a matrix' shape.

    Group and state have that library's keys: `keys` says which. orthogonalized with `steepest.polar`, as they all do by
    five steps of Newton and Schulz.
    """

    def __init__(
        self,
        groups: Any,
        keys: dict[str, str],
        heavy: bool,
        ratio: Callable[[int, int], float],
        uncorrected: bool = False,
    ) -> None:
        super().__init__(groups, {})
        self.keys, self.heavy, self.ratio, self.uncorrected = keys, heavy, ratio, uncorrected

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if "step" in group:
                group["step"] += 1
            for p in group["params"]:
                matrix = self.is_matrix(p, group)
                (self.by_muon if matrix else self.by_adamw)(p, group, self.state[p])

    def is_matrix(self, p: Tensor, group: dict[str, Any]) -> bool:
        return p.ndim == 2

    def key(self, name: str) -> str:
        return self.keys.get(name, name)

    def by_muon(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        assert p.grad is not None
        m = state.setdefault(self.key("momentum_buffer"), torch.zeros_like(p))
        mu, lr = group[self.key("momentum")], group["lr"]
        nesterov = group.get(self.key("nesterov"), True)
        if self.heavy:
            m.mul_(mu).add_(p.grad)
            u = p.grad + mu * m if nesterov else m
        else:
            m.lerp_(p.grad, 1 - mu)
            u = p.grad.lerp(m, mu) if nesterov else m
        p.mul_(1 - lr * group[self.key("weight_decay")])
        p.sub_(steepest.polar(u, "jordan") * (lr * self.ratio(*p.shape)))

    def by_adamw(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        assert p.grad is not None
        m = state.setdefault(self.key("exp_avg"), torch.zeros_like(p))
        v = state.setdefault(self.key("exp_avg_sq"), torch.zeros_like(p))
        if "step" in group:
            t = group["step"]
        else:
            t = state["step"] = state.get("step", 0) + 1
        b1, b2 = (group["beta1"], group["beta2"]) if "beta1" in group else group[self.key("betas")]
        m.lerp_(p.grad, 1 - b1)
        v.lerp_(p.grad.square(), 1 - b2)
        p.mul_(1 - group["lr"] * group[self.key("weight_decay")])
        eps, root = group[self.key("eps")], math.sqrt(1 - b2**t)
        denominator = (v.sqrt() + eps) / root if self.uncorrected else v.sqrt() / root + eps
        p.sub_(group["lr"] / (1 - b1**t) * m / denominator)


def keller_jordan(params: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    n = len(SHAPES)
    groups = [
        {"params": params[:n], "lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "use_muon": True},
        {"params": params[n:], "lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0, "use_muon": False},
    ]
    return [Other(groups, {}, heavy=False, ratio=lambda m, n: max(1, m / n) ** 0.5)]


def moonlight(params: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    values = {"lr": 0.01, "wd": 0.1, "momentum": 0.95, "nesterov": True, "ns_steps": 5}
    group = {"params": params, **values, "adamw_betas": (0.9, 0.95), "adamw_eps": 1e-8}
    keys = {
        "weight_decay": "wd",
        "exp_avg": "moment1",
        "exp_avg_sq": "moment2",
        "betas": "adamw_betas",
        "eps": "adamw_eps",
    }
    optimizer = Other([group], keys, heavy=True, ratio=lambda m, n: 0.2 * math.sqrt(max(m, n)), uncorrected=True)
    for p in params:
        optimizer.state[p]["use_muon"] = p.ndim == 2
    return [optimizer]


def dion(params: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    n = len(SHAPES)
    values = {"lr": 0.02, "mu": 0.9, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.01, "step": 0, "epsilon": 1e-8}
    more = {"nesterov": False, "flatten": False, "adjust_lr": "spectral_norm"}
    groups = [
        {"params": params[:n], "algorithm": "muon", **values, **more},
        {"params": params[n:], "algorithm": "adamw", **values, **more},
    ]
    keys = {
        "momentum": "mu",
        "momentum_buffer": "momentum",
        "exp_avg": "momentum",
        "exp_avg_sq": "variance",
        "eps": "epsilon",
    }
    return [Other(groups, keys, heavy=True, ratio=lambda m, n: math.sqrt(m / n))]


def emerging(params: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    values = {"lr": 0.02, "momentum_beta": 0.9, "use_nesterov": True, "weight_decay": 0.01, "use_decoupled_wd": True}
    group = {"params": params[: len(SHAPES)], **values, "use_independent_wd": False}
    keys = {"momentum": "momentum_beta", "nesterov": "use_nesterov"}
    return [Other([group], keys, heavy=False, ratio=lambda m, n: math.sqrt(m / n))]


@pytest.mark.parametrize(
    ("decoupled", "independent", "method"),
    [(True, False, "decoupled"), (True, True, "independent"), (False, True, "independent"), (False, False, "l2")],
)
def test_the_weight_decay_of_emerging_optimizers(decoupled: bool, independent: bool, method: str) -> None:
    params = [nn.Parameter(torch.ones(3, 2))]
    values = {"lr": 0.02, "momentum_beta": 0.9, "use_nesterov": True, "weight_decay": 0.01}
    group = {"params": params, **values, "use_decoupled_wd": decoupled, "use_independent_wd": independent}
    saved = torch.optim.SGD(params).state_dict()
    saved["param_groups"][0] = {**group, "params": [0]}
    assert convert("emerging-optimizers", saved)["param_groups"][0]["weight_decay_method"] == method


def of_torch(params: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    n = len(SHAPES)
    return [torch.optim.Muon(params[:n], lr=0.02), torch.optim.AdamW(params[n:], lr=0.01, weight_decay=0.1)]


class HeavyBallSOAP(torch.optim.Optimizer):
    """SOAP of HeavyBall 3.2 (heavyball/chainable.py, scale_by_soap; utils.py), with its layout of a state_dict.

    Averages are divided by their weights as they are kept, those of matrices in the eigenbases. The first gradient
    makes the bases, every other one goes into the factors after its step.
    """

    def __init__(self, params: list[nn.Parameter], every: int = 2) -> None:
        values = {"lr": 0.01, "base_lr": 0.01, "betas": (0.9, 0.95), "shampoo_beta": 0.8, "eps": 1e-12}
        more = {"weight_decay": 0.1, "cautious_weight_decay": False, "max_precond_dim": 7, "merge_dims": True}
        switches = {"caution": False, "mars": False, "split": False, "precondition_1d": False, "warmup_steps": 0}
        counts = {"step_count": torch.tensor(0), "storage_dtype": "float32", "ecc": None, "param_ecc": None}
        super().__init__([{"params": params, **values, **more, **switches, **counts}], {})
        self.every, self.total = every, 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        group = self.param_groups[0]
        group["step_count"] += 1
        n, before = int(group["step_count"]), self.total
        self.total += 1 / self.every
        for p in group["params"]:
            assert p.grad is not None
            self.by_soap(p, p.grad[None], self.state[p], group, n, int(self.total) > int(before))

    def by_soap(self, p: Tensor, g: Tensor, all_views: dict[Any, Any], group: Any, n: int, refreshes: bool) -> None:
        if n == 1:
            sides = [s if p.ndim > 1 and s <= group["max_precond_dim"] else 0 for s in p.shape] if p.ndim > 1 else [0]
            gg = [self.product(g, side) if s else None for side, s in enumerate(sides)]
            q = [None if m is None else torch.linalg.eigh(m)[1].flip(-1) for m in gg]
            zeros = {f"scale_by_soap_{key}_2": torch.zeros_like(g) for key in ("exp_avg", "exp_avg_sq")}
            all_views[0] = {**zeros, "is_initialized": {0, 2, 3}, "scale_by_soap_Q_3": q, "scale_by_soap_GG_3": gg}
            return
        state = all_views[0]
        m, v = (state[f"scale_by_soap_{key}_2"] for key in ("exp_avg", "exp_avg_sq"))
        gg, q = state["scale_by_soap_GG_3"], state["scale_by_soap_Q_3"]
        weights = [(1 - beta) / (1 - beta ** (n - 1)) for beta in group["betas"]]
        x = self.turned(g, q)
        m.lerp_(x, weights[0])
        v.lerp_(x.square(), weights[1])
        u = self.turned(m / v.sqrt().clamp(min=group["eps"]), [None if t is None else t.mT for t in q])
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * u[0])
        beta = group["shampoo_beta"]
        for side, factor in enumerate(gg):
            if factor is not None:
                factor.lerp_(self.product(g, side), (1 - beta) / (1 - beta**n))
        if refreshes:
            fresh = [None if t is None else self.iterated(factor, t) for factor, t in zip(gg, q, strict=True)]
            m.copy_(self.turned(self.turned(m, [None if t is None else t.mT for t in q]), fresh))
            state["scale_by_soap_Q_3"] = fresh

    @staticmethod
    def product(g: Tensor, side: int) -> Tensor:
        return g @ g.mT if side == 0 else g.mT @ g

    @staticmethod
    def turned(x: Tensor, q: list[Tensor | None]) -> Tensor:
        for side, basis in enumerate(q):
            if basis is not None:
                x = basis.mT @ x if side == 0 else x @ basis
        return x

    @staticmethod
    def iterated(factor: Tensor, q: Tensor) -> Tensor:
        """One step of orthogonal iteration from the largest value down, with columns that stay in their places."""
        image = factor @ q
        order = (q * image).sum(-2).argsort(descending=True)[0]
        basis, triangle = torch.linalg.qr(image[..., order])
        found = torch.empty_like(q)
        found[..., order] = basis * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
        return found

    def state_dict(self) -> dict[str, Any]:
        counts = {"cumulative_prob_prob_step": int(self.param_groups[0]["step_count"]), "cumulative_prob": self.total}
        return {**super().state_dict(), "heavyball": {"inner_group": counts, "use_ema": False}}


def heavyball(params: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [HeavyBallSOAP(params)]


MAKERS: dict[str, Callable[[list[nn.Parameter]], list[torch.optim.Optimizer]]] = {
    "torch": of_torch,
    "kellerjordan": keller_jordan,
    "moonlight": moonlight,
    "dion": dion,
    "emerging-optimizers": emerging,
    "heavyball": heavyball,
}
#: How far a run may be from what it would have been, by its own steps: torch iterates in bf16; HeavyBall decays by
#: lr weight_decay = 1e-3 before its update, not after it.
APART = {"torch": 3e-2, "heavyball": 2e-3}


def trained(source: str) -> tuple[list[nn.Parameter], list[torch.optim.Optimizer]]:
    shapes = SHAPES if source == "emerging-optimizers" else [*SHAPES, *VECTORS]
    params = parameters(shapes, torch.float64)  # which are iterated in fp64, but for torch's
    optimizers = MAKERS[source](params)
    together(optimizers, params, range(5))
    return params, optimizers


def together(optimizers: list[torch.optim.Optimizer], params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for i, p in enumerate(params):
            p.grad = noise(p.shape, 100 * step + i, p.dtype)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("named", [False, True], ids=["by order", "by name"])
@pytest.mark.parametrize("source", MAKERS)
def test_training_goes_on_as_it_would_have(source: str, named: bool) -> None:
    params, optimizers = trained(source)
    ours = [nn.Parameter(t) for t in copies(params)]
    names = NAMES[: len(params)]
    given = dict(zip(names, ours, strict=True))
    kind: Any = partial(steepest.Muon, adjust_lr_fn="spectral_unclamped") if source != "heavyball" else steepest.SOAP
    if named:  # in another order, and in as many groups as there are decays
        optimizer = kind(dict(reversed(given.items())), lr=1.0)
    else:
        groups = [{"params": ours[:2]}, {"params": ours[2:], "use_muon": False}][: 1 if len(ours) == 2 else 2]
        optimizer = kind(groups, lr=1.0)
    saved = [copy.deepcopy(each.state_dict()) for each in optimizers]
    optimizer.load_state_dict(convert(source, *saved, names=names if named else None))
    start = copies(params)
    together(optimizers, params, range(5, 10))
    together([optimizer], ours, range(5, 10))
    for p, q, s in zip(params, ours, start, strict=True):
        assert relative(q.detach() - s, p.detach() - s) < (APART.get(source, 1e-6) if p.ndim == 2 else 1e-6)


def test_a_parameter_without_state_begins_anew() -> None:
    params = parameters([*SHAPES, *VECTORS])
    optimizer = steepest.Muon([{"params": params[:2]}, {"params": params[2:], "use_muon": False}])
    for source, make in MAKERS.items():
        if source not in ("moonlight", "emerging-optimizers", "heavyball"):
            optimizer.load_state_dict(convert(source, *(each.state_dict() for each in make(params))))
            assert not optimizer.state


@pytest.mark.parametrize("source", MAKERS)
def test_what_the_source_does_not_write_is_refused(source: str) -> None:
    params = parameters(SHAPES)
    other = torch.optim.RMSprop(params)
    train(other, params, range(1))
    with pytest.raises(ValueError, match="a group lacks .* of another version of it|state lacks 'momentum_buffer'"):
        convert(source, other.state_dict())


@pytest.mark.parametrize("source", ["moonlight", "heavyball"])
def test_names_are_in_the_order_of_the_checkpoint_where_one_group_becomes_two(source: str) -> None:
    params = parameters([(7,), (8, 5), (4,), (5, 8)], torch.float64)
    optimizers = MAKERS[source](params)
    together(optimizers, params, range(3))
    names = ["a.bias", "a.weight", "b.bias", "b.weight"]
    found = convert(source, *(each.state_dict() for each in optimizers), names=names)
    assert [group["param_names"] for group in found["param_groups"]] == [names[1::2], names[::2]]
    buffers = [state.get("momentum_buffer", state.get("exp_avg")) for state in found["state"].values()]
    assert [t.shape for t in buffers] == [(8, 5), (5, 8), (7,), (4,)]


def change_group(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved["param_groups"][0].update(values)


def change_state(change: Callable[[dict[Any, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda saved: change(saved["state"][0]) and None


#: What HeavyBall's SOAP may be or have that ours is and has not.
NO_SOAP: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "caution": (change_group(caution=True), "has caution=True: there is no such rule"),
    "mars": (change_group(mars=True), "has mars=True: there is no such rule"),
    "16 bits": (change_group(storage_dtype="bfloat16"), "has storage_dtype='bfloat16': there is no such rule"),
    "error correction": (change_group(ecc="bf16+8"), r"has ecc='bf16\+8': there is no such rule"),
    "warm-up": (change_group(warmup_steps=100), "warm-up of 100 steps is not over after 5: load a later"),
    "no step": (change_group(step_count=torch.tensor(0)), "no step has been taken.*: begin steepest.SOAP anew"),
    "averages": (lambda saved: saved["heavyball"].update(use_ema=True), r"averages of the weights \(use_ema\)"),
    "schedule": (
        lambda saved: saved["heavyball"]["inner_group"].update(cumulative_prob=1.7),
        "refreshed 1.7 times in 5 steps: a schedule of refreshes has no counterpart",
    ),
    "pieces": (change_state(lambda views: views.update({1: views[0]})), r"state is in pieces \(split\)"),
    "NAdam": (
        change_state(lambda views: views[0].update(scale_by_soap_nadam_mu_product_2=torch.ones(()))),
        "state has 'scale_by_soap_nadam_mu_product_2', which SOAP of HeavyBall 3 does not write",
    ),
    "incomplete": (change_state(lambda views: views[0].pop("scale_by_soap_Q_3")), "state lacks 'Q'"),
    "convolution": (
        change_state(lambda views: views[0].update(scale_by_soap_exp_avg_2=torch.zeros(1, 2, 3, 4))),
        r"averages have the shape \(1, 2, 3, 4\): of more than two dimensions",
    ),
    "a row": (
        change_state(
            lambda views: views[0].update(
                scale_by_soap_exp_avg_2=torch.zeros(1, 1, 4), scale_by_soap_exp_avg_sq_2=torch.zeros(1, 1, 4)
            )
        ),
        r"a matrix of shape \(1, 4\) has no factor for a side of length 1 there",
    ),
    "another optimizer": (lambda saved: saved.pop("heavyball"), "a group lacks heavyball and has"),
}


@pytest.mark.parametrize(("spoil", "text"), NO_SOAP.values(), ids=NO_SOAP)
def test_what_soap_cannot_continue_is_refused(spoil: Callable[[dict[str, Any]], Any], text: str) -> None:
    _, (optimizer,) = trained("heavyball")
    saved = copy.deepcopy(optimizer.state_dict())
    spoil(saved)
    with pytest.raises(ValueError, match=text):
        convert("heavyball", saved)


class EmergingSOAP(torch.optim.Optimizer):
    """SOAP of Emerging-Optimizers (legacy_soap/soap.py at fd77292), with its state; coupled: with use_kl_shampoo.

    A gradient is in the factors before the bases are refreshed, which is before its step. Averages are kept as they
    are and corrected where they are read; the second moment stays in its places.
    """

    def __init__(self, params: list[nn.Parameter], *, coupled: bool = False, corrected: bool = True, **values: Any):
        defaults = {"lr": 0.01, "betas": (0.9, 0.95), "shampoo_beta": 0.95, "eps": 1e-8, "weight_decay": 0.1}
        super().__init__(params, defaults | values)
        self.coupled, self.corrected = coupled, corrected

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.by_soap(p, p.grad, self.state[p], group)

    def by_soap(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            for side, n in zip("LR", p.shape, strict=True):
                state |= {side: p.new_zeros(n, n), f"Q_{side}": torch.eye(n, dtype=p.dtype)}
                state[f"eigvals_{side}"] = p.new_zeros(n)
        t, beta = state["step"] + 1, group["shampoo_beta"]
        weight = (1 - beta) / (1 - beta**t if self.corrected else 1)
        m = state["Q_L"] @ state["exp_avg"] @ state["Q_R"].mT
        products = self.products(g, state, group["eps"])
        for side, product in zip("LR", products, strict=True):
            factor = state[side].lerp_(product, weight)
            q = torch.linalg.eigh(factor)[1] if t == 1 else torch.linalg.qr(factor @ state[f"Q_{side}"])[0]
            values = (factor @ q * q).sum(0)
            order = values.argsort(descending=True)
            state[f"Q_{side}"], state[f"eigvals_{side}"] = q[:, order], values[order]
        left, right = state["Q_L"], state["Q_R"]
        p.mul_(1 - group["lr"] * group["weight_decay"])
        x, (b1, b2) = left.mT @ g @ right, group["betas"]
        m = state["exp_avg"] = (left.mT @ m @ right).lerp_(x, 1 - b1)
        v = state["exp_avg_sq"].lerp_(x.square(), 1 - b2)
        u = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + group["eps"])
        p.sub_(group["lr"] * left @ u @ right.mT)
        state["step"] = t

    def products(self, g: Tensor, state: dict[str, Any], eps: float) -> tuple[Tensor, Tensor]:
        if not self.coupled:
            return g @ g.mT, g.mT @ g
        left, right = (
            state[f"Q_{side}"] / state[f"eigvals_{side}"].clamp(min=eps) @ state[f"Q_{side}"].mT for side in "LR"
        )
        return g @ right @ g.mT / g.shape[1], g.mT @ left @ g / g.shape[0]


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("named", [False, True], ids=["by order", "by name"])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.8, 0.9)], ids=str)
def test_soap_of_emerging_optimizers_goes_on(betas: tuple[float, float], named: bool, steps: int) -> None:
    params = parameters([*SHAPES, (6, 6), (1, 4)], torch.float64)
    names = ["a", "b", "c", "d"]
    theirs = EmergingSOAP(params, betas=betas)
    together([theirs], params, range(steps))
    ours = [nn.Parameter(t) for t in copies(params)]
    given: Any = dict(reversed(list(zip(names, ours, strict=True)))) if named else ours
    optimizer = steepest.SOAP([{"params": list(given.items()) if named else ours, "use_muon": True}], lr=1.0)
    saved = convert("emerging-optimizers", copy.deepcopy(theirs.state_dict()), names=names if named else None)
    assert saved["optimizer"] == "SOAP"
    optimizer.load_state_dict(saved)
    start = copies(params)
    together([theirs], params, range(steps, steps + 6))
    together([optimizer], ours, range(steps, steps + 6))
    for p, q, s in zip(params, ours, start, strict=True):
        assert relative(q.detach() - s, p.detach() - s) < 1e-7


def test_a_matrix_that_soap_of_emerging_optimizers_has_not_stepped_begins_anew() -> None:
    """Megatron makes its state of zeros before the first gradient; another has no state yet."""
    params = parameters(SHAPES, torch.float64)
    theirs = EmergingSOAP(params)
    params[0].grad = noise(SHAPES[0], 0, torch.float64)
    theirs.step()
    theirs.state[params[1]] = {key: value * 0 for key, value in theirs.state[params[0]].items()}
    assert list(convert("emerging-optimizers", theirs.state_dict())["state"]) == [0]
    del theirs.state[params[1]]
    assert list(convert("emerging-optimizers", theirs.state_dict())["state"]) == [0]


@pytest.mark.parametrize("shape", [(8, 5), (6, 6)], ids=str)
@pytest.mark.parametrize("kind", [{"coupled": True}, {"corrected": False}], ids=str)
def test_factors_that_are_no_averages_of_products_are_refused(kind: dict[str, bool], shape: tuple[int, int]) -> None:
    """KL-Shampoo's of a square matrix have equal traces for long: its first gradient is divided by eps."""
    for steps in (1, 2, 5):
        params = parameters([shape], torch.float64)
        theirs = EmergingSOAP(params, **kind)
        together([theirs], params, range(steps))
        with pytest.raises(ValueError, match="should be one average .*use_kl_shampoo.* begin steepest.SOAP or"):
            convert("emerging-optimizers", theirs.state_dict())


def test_what_else_emerging_optimizers_calls_soap_is_refused() -> None:
    params = parameters(SHAPES, torch.float64)
    theirs = EmergingSOAP(params)
    together([theirs], params, range(2))
    saved = theirs.state_dict()
    for key in ("eps", "betas"):  # SOAP v3, MOSO
        group = {name: value for name, value in saved["param_groups"][0].items() if name != key}
        with pytest.raises(ValueError, match=f"a group lacks {key} and has"):
            convert("emerging-optimizers", {**saved, "param_groups": [group]})
    for key in ("step", "exp_avg", "L", "Q_R"):
        state = {name: value for name, value in saved["state"][0].items() if name != key}
        with pytest.raises(ValueError, match=f"state lacks '{key}'"):
            convert("emerging-optimizers", {**saved, "state": {**saved["state"], 0: state}})
    sharded = {**saved["state"][0], "exp_avg": torch.zeros(4, 5)}
    with pytest.raises(ValueError, match=r"averages have the shapes \(4, 5\) and \(8, 5\), and its factors \(8, 8\)"):
        convert("emerging-optimizers", {**saved, "state": {**saved["state"], 0: sharded}})
    (of_muon,) = emerging(params)
    together([of_muon], params, range(1))
    with pytest.raises(ValueError, match="some groups are Muon's and some are SOAP's: convert each"):
        convert("emerging-optimizers", saved, of_muon.state_dict())


@pytest.mark.parametrize("every", [1, 2, 4, 3, 10])
def test_the_next_refresh_is_in_the_step_that_heavyball_would_have_made_it(every: int) -> None:
    """HeavyBall adds 1 / every in floating point, where a third and a tenth are now and then a step late."""
    p = nn.Parameter(noise((4, 3), 0, torch.float64))
    for steps in range(1, 2 * every + 2):
        theirs = HeavyBallSOAP([p], every)
        together([theirs], [p], range(steps))
        (q,) = parameters([(4, 3)], torch.float64)
        ours = steepest.SOAP([q])
        ours.load_state_dict(convert("heavyball", copy.deepcopy(theirs.state_dict())))
        refreshes: dict[str, int] = {}
        for step in range(steps, steps + every + 1):
            before = theirs.state[p][0]["scale_by_soap_Q_3"], ours.state[q]["left_basis"].clone()
            together([theirs], [p], range(step, step + 1))
            together([ours], [q], range(step, step + 1))
            if theirs.state[p][0]["scale_by_soap_Q_3"] is not before[0]:
                refreshes.setdefault("theirs", step)
            if not torch.equal(ours.state[q]["left_basis"], before[1]):
                refreshes.setdefault("ours", step)
        late = refreshes["theirs"] - refreshes["ours"]
        assert late == 0 or (every in (3, 10) and late == 1 and refreshes["theirs"] == steps + every)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything that a checkpoint holds, the containers included."""
    yield path
    if isinstance(value, dict | list | tuple):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*path, key))


def changed(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    """A copy in which something else is at the end of the way."""
    if not path:
        return other
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = changed(value[path[0]], path[1:], other)
    return copied


ANYTHING = (
    None,
    "text",
    -1,
    2.5,
    math.nan,
    [],
    {},
    (1, 2, 3),
    True,
    torch.ones(()),
    torch.ones(2, 2, 2),
    torch.ones(0),
)


def of_emerging_soap(params: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    theirs = EmergingSOAP(params[: len(SHAPES)])
    together([theirs], params[: len(SHAPES)], range(2))
    return [theirs]


class RefusedError(Exception):
    """An error that this package raises, and not something that it calls."""


def converted(source: str, saved: list[Any]) -> dict[str, Any]:
    """What comes of it; a TypeError or ValueError of the package's becomes a `RefusedError`, any other stays."""
    try:
        return convert(source, *saved)
    except (TypeError, ValueError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if "steepest" in last.filename and (last.line or "").startswith("raise"):
            raise RefusedError from error
        raise


@pytest.mark.parametrize("source", [*MAKERS, "soap of emerging-optimizers"])
def test_whatever_a_checkpoint_holds_is_taken_or_refused_in_words(source: str) -> None:
    if source in MAKERS:
        _, optimizers = trained(source)
    else:
        source, optimizers = "emerging-optimizers", of_emerging_soap(parameters(SHAPES, torch.float64))
    saved = [optimizer.state_dict() for optimizer in optimizers]
    refused = 0
    for number, one in enumerate(saved):
        for path in leaves(one):
            for other in ANYTHING:
                given = [*saved[:number], changed(one, path, other), *saved[number + 1 :]]
                with contextlib.suppress(RefusedError):
                    refused += 1
                    converted(source, given)
                    refused -= 1
    assert refused > 20 * len(saved)


def test_other_errors() -> None:
    params, optimizers = trained("torch")
    saved = [optimizer.state_dict() for optimizer in optimizers]
    with pytest.raises(ValueError, match="source 'lion' is not known; use one of torch, kellerjordan"):
        convert("lion", *saved)
    with pytest.raises(ValueError, match="3 names for 4 parameters"):
        convert("torch", *saved, names=NAMES[:3])
    amsgrad = torch.optim.AdamW(params, amsgrad=True)
    with pytest.raises(ValueError, match="a group has amsgrad"):
        convert("torch", amsgrad.state_dict())
    old = copy.deepcopy(saved[0])
    old["param_groups"][0]["nesterov"] = True
    with pytest.raises(ValueError, match="it is of another version"):
        convert("kellerjordan", old)
    _, (of_dion,) = trained("dion")
    lion = copy.deepcopy(of_dion.state_dict())
    lion["param_groups"][1]["algorithm"] = "lion"
    with pytest.raises(ValueError, match="group algorithm 'lion' is not known"):
        convert("dion", lion)
    for state in saved[0]["state"].values():
        state["velocity"] = state.pop("momentum_buffer")
    with pytest.raises(ValueError, match="state lacks 'momentum_buffer' and has velocity"):
        convert("torch", *saved)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params, optimizers = trained("torch")
    files = [tmp_path / "muon.pt", tmp_path / "adamw.pt"]
    for file, optimizer in zip(files, optimizers, strict=True):
        torch.save({"trainer": {"optimizer": optimizer.state_dict()}}, file)
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    command = ["convert", *map(str, files), "--source", "torch", "--out", str(tmp_path / "out.pt")]
    assert cli.main([*command, "--key", "trainer.optimizer", "--names", str(tmp_path / "names.txt")]) == 0
    assert "out.pt written: 2 by Muon, 2 by AdamW" in capsys.readouterr().out
    optimizer = steepest.Muon(dict(zip(NAMES, params, strict=True)))
    optimizer.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
    assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], optimizers[0].state[params[0]]["momentum_buffer"])
    with pytest.raises(SystemExit):
        cli.main([*command, "--key", "optimizer"])
    assert "has no 'optimizer': pass --key" in capsys.readouterr().err


def test_the_command_says_what_is_wrong_with_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, (optimizer, _) = trained("torch")
    good = tmp_path / "good.pt"
    torch.save(optimizer.state_dict(), good)
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:700])
    (tmp_path / "folder").mkdir()
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe\x00")
    torch.save({"model": Path("elsewhere")}, tmp_path / "objects.pt")
    torch.save({"state": {}, "param_groups": "none"}, tmp_path / "groups.pt")
    torch.save({}, tmp_path / "nothing.pt")

    def told(file: str, *more: str, out: str = "out.pt") -> str:
        options = ["--source", "torch", "--out", str(tmp_path / out), *more]
        with pytest.raises(SystemExit):
            cli.main(["convert", str(tmp_path / file), *options])
        return capsys.readouterr().err

    assert "missing.pt cannot be read: No such file" in told("missing.pt")
    assert "folder is a folder, as torch.distributed.checkpoint writes them" in told("folder")
    for file in ("text.pt", "empty.pt", "cut.pt", "objects.pt"):
        assert f"{file} is no file of torch.save, is cut off, or holds objects of other classes" in told(file)
    assert "'param_groups' should be a list of dictionaries but is: 'none'" in told("groups.pt")
    assert "has no 'state', only nothing: give what state_dict() gives" in told("nothing.pt")
    assert "gone.txt cannot be read as names" in told("good.pt", "--names", str(tmp_path / "gone.txt"))
    assert "names.txt cannot be read as names" in told("good.pt", "--names", str(tmp_path / "names.txt"))
    assert "out.pt cannot be written: pass --out with a file in a folder" in told("good.pt", out="gone/out.pt")
    assert "folder cannot be written: pass --out with a file" in told("good.pt", out="folder")
    assert sorted(tmp_path.glob("*.new")) == []
    assert cli.main(["convert", str(good), "--source", "torch", "--out", str(good)]) == 0
    assert torch.load(good, weights_only=True)["optimizer"] == "Muon"


def test_names_of_the_command_may_have_spaces(tmp_path: Path) -> None:
    _, (optimizer, _) = trained("torch")
    torch.save(optimizer.state_dict(), tmp_path / "muon.pt")
    (tmp_path / "names.txt").write_text("first layer.weight\n\nsecond layer.weight\n")
    command = ["convert", str(tmp_path / "muon.pt"), "--source", "torch", "--names", str(tmp_path / "names.txt")]
    assert cli.main([*command, "--out", str(tmp_path / "out.pt")]) == 0
    (group,) = torch.load(tmp_path / "out.pt", weights_only=True)["param_groups"]
    assert group["param_names"] == ["first layer.weight", "second layer.weight"]
