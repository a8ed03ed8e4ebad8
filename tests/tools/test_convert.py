"""`steepest convert`: what it makes of another optimizer's checkpoint goes on as that optimizer would have."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
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


def of_torch(params: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    n = len(SHAPES)
    return [torch.optim.Muon(params[:n], lr=0.02), torch.optim.AdamW(params[n:], lr=0.01, weight_decay=0.1)]


MAKERS: dict[str, Callable[[list[nn.Parameter]], list[torch.optim.Optimizer]]] = {
    "torch": of_torch,
    "kellerjordan": keller_jordan,
    "moonlight": moonlight,
    "dion": dion,
    "emerging-optimizers": emerging,
}


def trained(source: str) -> tuple[list[nn.Parameter], list[torch.optim.Optimizer]]:
    shapes = SHAPES if source == "emerging-optimizers" else [*SHAPES, *VECTORS]
    params = parameters(shapes, torch.float64)  # which are iterated in fp64, but for torch's
    optimizers = MAKERS[source](params)
    together(optimizers, params, range(3))
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
    if named:  # in another order, and in as many groups as there are decays
        optimizer = steepest.Muon(dict(reversed(given.items())), lr=1.0, adjust_lr_fn="spectral_unclamped")
    else:
        groups = [{"params": ours[:2]}, {"params": ours[2:], "use_muon": False}][: 1 if len(ours) == 2 else 2]
        optimizer = steepest.Muon(groups, lr=1.0, adjust_lr_fn="spectral_unclamped")
    saved = [copy.deepcopy(each.state_dict()) for each in optimizers]
    optimizer.load_state_dict(convert(source, *saved, names=names if named else None))
    start = copies(params)
    together(optimizers, params, range(3, 6))
    together([optimizer], ours, range(3, 6))
    for p, q, s in zip(params, ours, start, strict=True):
        assert relative(q.detach() - s, p.detach() - s) < (3e-2 if source == "torch" and p.ndim == 2 else 1e-6)


def test_a_parameter_without_state_begins_anew() -> None:
    params = parameters([*SHAPES, *VECTORS])
    optimizer = steepest.Muon([{"params": params[:2]}, {"params": params[2:], "use_muon": False}])
    for source, make in MAKERS.items():
        if source not in ("moonlight", "emerging-optimizers"):
            optimizer.load_state_dict(convert(source, *(each.state_dict() for each in make(params))))
            assert not optimizer.state


@pytest.mark.parametrize("source", MAKERS)
def test_what_the_source_does_not_write_is_refused(source: str) -> None:
    params = parameters(SHAPES)
    other = torch.optim.RMSprop(params)
    train(other, params, range(1))
    with pytest.raises(ValueError, match="a group lacks .* of another version of it|state lacks 'momentum_buffer'"):
        convert(source, other.state_dict())


def test_other_errors() -> None:
    params, optimizers = trained("torch")
    saved = [optimizer.state_dict() for optimizer in optimizers]
    with pytest.raises(ValueError, match="source 'heavyball' is not known; use one of torch, kellerjordan"):
        convert("heavyball", *saved)
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
