"""`steepest convert`: what it makes of another optimizer's checkpoint goes on as that optimizer would have."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
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


def test_soap_of_emerging_optimizers_is_refused() -> None:
    """Its layout: emerging_optimizers/legacy_soap/soap.py."""
    m, n = SHAPES[0]
    shapes = {"exp_avg": (m, n), "exp_avg_sq": (m, n), "L": (m, m), "R": (n, n), "Q_L": (m, m), "Q_R": (n, n)}
    state = {"step": 3, **{key: torch.ones(shape) for key, shape in shapes.items()}}
    group = {"lr": 0.01, "betas": (0.9, 0.95), "shampoo_beta": 0.95, "eps": 1e-8, "weight_decay": 0.01, "params": [0]}
    with pytest.raises(ValueError, match="Emerging-Optimizers' SOAP, whose checkpoint .*: begin steepest.SOAP anew"):
        convert("emerging-optimizers", {"state": {0: state}, "param_groups": [group]})


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
    for path, text in ((tmp_path, "is a folder, as torch.distributed.checkpoint"), (tmp_path / "no.pt", "no file")):
        with pytest.raises(SystemExit):
            cli.main(["convert", str(path), "--source", "torch", "--out", str(tmp_path / "out.pt")])
        assert text in capsys.readouterr().err
