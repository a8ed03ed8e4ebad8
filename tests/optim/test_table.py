"""Table 1 of arXiv:2510.10777: every row is a class, and the rows without matrices are the rules written here.

fp64 throughout. The rows with bases and K-FAC have their own modules, Scion and the trust region too: here is only
which norm, preconditioner and step they are made of.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.matrices import Piece
from steepest.optimizer import MatrixOptimizer
from steepest.parts import Columns, Diagonal, Frobenius, Hyper, Identity, Rotated, Rows, Schatten, Sides, Sign, Spectral
from steepest.recipe import step_one
from steepest.zoo.scion import Scion
from steepest.zoo.vector import MADGRAD, SGD, AdaGrad, Adam, AdamSANIA, NormalizedSGD, SignSGD
from support.problems import RECIPES, Change, Network, gap, gaussian, polar_by_svd, uniform

LR, WD, B1, B2, EPS = 0.02, 0.1, 0.9, 0.95, 1e-6
SHAPES = ((), (5,), (4, 6), (7, 3), (2, 3, 4), (3, 2, 2, 2), (1, 6))
VECTOR = (NormalizedSGD, SignSGD, AdaGrad, Adam, MADGRAD, AdamSANIA)
every_vector_method = pytest.mark.parametrize("cls", VECTOR)


# ---- the table -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """norm: the direction's type, or those of several layers. inner: the exponent of a side in the update, where the
    preconditioner's own is half of it, or the power of v in D, with how v is averaged; None: no preconditioner.
    """

    cls: type[MatrixOptimizer]
    norm: tuple[type, ...]
    step: str
    inner: tuple[str, float] | None = None
    bases: bool = False


TABLE = {
    "SGD": Row(SGD, (Frobenius,), "dual"),
    "Normalized SGD": Row(NormalizedSGD, (Frobenius,), "lmo"),
    "SignSGD": Row(SignSGD, (Sign,), "lmo"),
    "Muon": Row(steepest.Muon, (Spectral,), "lmo"),
    "Scion": Row(Scion, (Spectral, Sign, Rows, Columns), "lmo"),
    "K-FAC": Row(steepest.KFAC, (Frobenius,), "dual", ("sides", 1.0), bases=True),
    "Shampoo": Row(steepest.Shampoo, (Frobenius,), "dual", ("sides", 1 / 4), bases=True),
    "One-sided Shampoo": Row(steepest.OneSidedShampoo, (Frobenius,), "dual", ("sides", 1 / 2), bases=True),
    "KL-Shampoo": Row(steepest.KLShampoo, (Frobenius,), "dual", ("sides", 1 / 2), bases=True),
    "AdaGrad": Row(AdaGrad, (Frobenius,), "dual", ("sum", 1 / 4)),
    "Adam": Row(Adam, (Frobenius,), "dual", ("ema", 1 / 4)),
    "MADGRAD": Row(MADGRAD, (Frobenius,), "dual", ("ema", 1 / 6)),
    "Adam-SANIA": Row(AdamSANIA, (Frobenius,), "dual", ("ema", 1 / 2)),
    "SOAP": Row(steepest.SOAP, (Frobenius,), "dual", ("ema", 1 / 4), bases=True),
    "SPlus": Row(steepest.SPlus, (Sign,), "lmo", bases=True),
    "MuAdam": Row(steepest.MuAdam, (Spectral,), "lmo", ("ema", 1 / 4)),
    "MuAdam-SANIA": Row(steepest.MuAdamSANIA, (Spectral,), "lmo", ("ema", 1 / 2)),
}


class Language(nn.Module):
    """A hidden layer, an embedding and a head: what a method with a norm for every layer sees."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 7, bias=False)


def test_every_class_that_says_to_be_a_row_is_here() -> None:
    assert len({row.cls for row in TABLE.values()}) == len(TABLE)
    said = {}
    for cls in (getattr(steepest, name) for name in steepest.zoo.__all__):
        for row in re.findall(r"\brow\s+([\w\s-]+?)\s+of\s+Table\s+1\b", vars(cls).get("__doc__") or ""):
            said[" ".join(row.split())] = cls
    assert len(said) > 5
    assert {name: TABLE[name].cls for name in said} == said


@pytest.mark.parametrize("name", TABLE)
def test_a_row_is_made_of_its_norm_its_preconditioner_and_its_step(name: str) -> None:
    row = TABLE[name]
    optimizer = row.cls(Language())
    recipes = [optimizer.recipe(group) for group in optimizer.param_groups if group["use_muon"]]
    assert {type(recipe.direction) for recipe in recipes} == set(row.norm)
    for recipe in recipes:
        assert recipe.scale == row.step
        assert isinstance(recipe.precondition, Rotated) == row.bases
        inner = recipe.precondition.inner if isinstance(recipe.precondition, Rotated) else recipe.precondition
        assert isinstance(inner, Identity) == (row.inner is None)
        if isinstance(inner, Sides):
            assert row.inner == ("sides", inner.exponent)
        if isinstance(inner, Diagonal):
            assert row.inner == (inner.average, inner.power)


# ---- the rows without matrices --------------------------------------------------------------------------------------

Rule = Callable[[int, Tensor, dict[str, Tensor]], Tensor]


def averages(t: int, g: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Adam's m and v after gradient t, corrected."""
    state["m"] = B1 * state.get("m", 0 * g) + (1 - B1) * g
    state["v"] = B2 * state.get("v", 0 * g) + (1 - B2) * g * g
    return state["m"] / (1 - B1**t), state["v"] / (1 - B2**t)


def heavy(g: Tensor, state: dict[str, Tensor]) -> Tensor:
    """A momentum whose scale does not matter."""
    state["m"] = B1 * state.get("m", 0 * g) + g
    return state["m"]


def normalized(t: int, g: Tensor, state: dict[str, Tensor]) -> Tensor:
    m = heavy(g, state)
    return m / (m * m).sum().sqrt()


def signs(t: int, g: Tensor, state: dict[str, Tensor]) -> Tensor:
    return torch.sgn(heavy(g, state))


def adagrad(t: int, g: Tensor, state: dict[str, Tensor]) -> Tensor:
    state["v"] = state.get("v", 0 * g) + g * g
    return g / (torch.sqrt(state["v"]) + EPS)


def adaptive(root: float) -> Rule:
    def rule(t: int, g: Tensor, state: dict[str, Tensor]) -> Tensor:
        m, v = averages(t, g, state)
        return m / (v**root + EPS)

    return rule


RULES: dict[str, tuple[type[MatrixOptimizer], dict[str, Any], Rule]] = {
    "Normalized SGD": (NormalizedSGD, {"momentum": B1}, normalized),
    "SignSGD": (SignSGD, {"momentum": B1}, signs),
    "AdaGrad": (AdaGrad, {"eps": EPS}, adagrad),
    "Adam": (Adam, {"betas": (B1, B2), "eps": EPS}, adaptive(1 / 2)),
    "MADGRAD": (MADGRAD, {"betas": (B1, B2), "eps": EPS}, adaptive(1 / 3)),
    "Adam-SANIA": (AdamSANIA, {"betas": (B1, B2), "eps": EPS}, adaptive(1.0)),
}


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", RULES)
def test_a_method_is_its_rule_for_every_shape(name: str, backend: str) -> None:
    """Scalars, vectors, matrices and kernels, with weight decay and a learning rate that changes."""
    cls, options, rule = RULES[name]
    params = [nn.Parameter(gaussian(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    wanted: list[Tensor] = [p.detach().clone() for p in params]
    states: list[dict[str, Tensor]] = [{} for _ in params]
    optimizer = cls(params, lr=LR, weight_decay=WD, backend=backend, **options)
    for t in range(1, 26):
        lr = LR / math.sqrt(t)
        optimizer.param_groups[0]["lr"] = lr
        for i, p in enumerate(params):
            p.grad = gaussian(*p.shape, seed=100 * t + i)
            wanted[i] = (1 - lr * WD) * wanted[i] - lr * rule(t, p.grad, states[i])
        optimizer.step()
    assert max(gap(p.detach(), w) for p, w in zip(params, wanted)) < 1e-10


def trained(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], steps: int = 25) -> list[Tensor]:
    params = [nn.Parameter(gaussian(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    optimizer = make(params)
    for t in range(steps):
        for i, p in enumerate(params):
            p.grad = gaussian(*p.shape, seed=100 * t + i)
        optimizer.step()
    return [p.detach() for p in params]


def worst(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(map(gap, found, wanted))


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decay", [0.0, WD])
def test_adam_is_that_of_torch(decay: float, maximize: bool) -> None:
    ours = trained(lambda p: Adam(p, LR, decay, (B1, B2), EPS, maximize=maximize))
    theirs = trained(lambda p: torch.optim.AdamW(p, LR, betas=(B1, B2), eps=EPS, weight_decay=decay, maximize=maximize))
    assert worst(ours, theirs) < 1e-12


def test_adagrad_is_that_of_torch() -> None:
    ours = trained(lambda p: AdaGrad(p, LR, eps=EPS))
    assert worst(ours, trained(lambda p: torch.optim.Adagrad(p, LR, eps=EPS))) < 1e-12


def test_sign_sgd_is_signum() -> None:
    """The sign of the buffer of torch's SGD with momentum."""
    buffers = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    wanted = [gaussian(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    for t in range(25):
        for i, w in enumerate(wanted):
            buffers[i] = B1 * buffers[i] + gaussian(*w.shape, seed=100 * t + i)
            wanted[i] = w - LR * buffers[i].sign()
    assert worst(trained(lambda p: SignSGD(p, LR)), wanted) < 1e-12


def test_a_checkpoint_of_adamw_goes_on_as_adam() -> None:
    params = [nn.Parameter(gaussian(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    theirs = torch.optim.AdamW(params, LR, betas=(B1, B2), eps=EPS, weight_decay=WD)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    ours = Adam(twins)
    for t in range(20):
        if t == 10:
            ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
            for p, twin in zip(params, twins):
                twin.data.copy_(p.detach())
        for i, (p, twin) in enumerate(zip(params, twins)):
            p.grad = gaussian(*p.shape, seed=100 * t + i)
            twin.grad = p.grad.clone()
        theirs.step()
        if t >= 10:
            ours.step()
    assert worst([p.detach() for p in twins], [p.detach() for p in params]) < 1e-12


def test_normalized_sgd_is_the_schatten_norm_two() -> None:
    """Its singular values say the same length as its entries."""
    p = nn.Parameter(gaussian(6, 4))
    optimizer, recipe = NormalizedSGD([p], LR), replace(RECIPES["normalized_sgd"], direction=Schatten(2.0, "eigh"))
    w, state = p.detach().clone(), recipe.init(p.detach())
    for t in range(20):
        p.grad = gaussian(6, 4, seed=t)
        w, state = step_one(recipe, w, p.grad, state, Hyper(LR))
        optimizer.step()
    assert gap(p.detach(), w) < 1e-12


def test_normalized_sgd_measures_each_matrix_where_a_group_says_so() -> None:
    p = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    optimizer = NormalizedSGD([{"params": [p], "num_heads": 3}], lr=1.0)
    p.grad = gaussian(6, 4) * torch.tensor([1.0, 1, 9, 9, 1e-5, 1e-5], dtype=torch.float64)[:, None]
    optimizer.step()
    assert gap(p.detach().reshape(3, 8).norm(dim=1), torch.ones(3)) < 1e-14


def test_muon_muadam_and_muadam_sania_share_one_rule() -> None:
    """U = polar(M / D) / D with D = 1, v^1/4 and v^1/2: the named classes on a matrix, written out once."""
    ratio = math.sqrt(7 / 4)
    made = {
        0.0: (steepest.Muon, {"momentum": B1, "nesterov": False}),
        0.25: (steepest.MuAdam, {"betas": (B1, B2), "eps": 0.0}),
        0.5: (steepest.MuAdamSANIA, {"betas": (B1, B2), "eps": 0.0}),
    }
    for power, (cls, options) in made.items():
        p = nn.Parameter(gaussian(7, 4))
        w, state = p.detach().clone(), {}  # type: ignore[var-annotated]
        optimizer = cls([p], lr=LR, weight_decay=WD, polar="svd", **options)  # type: ignore[operator]
        for t in range(1, 21):
            p.grad = gaussian(7, 4, seed=t)
            m, v = averages(t, p.grad, state)
            w = (1 - LR * WD) * w - LR * ratio * polar_by_svd(m / v**power) / v**power
            optimizer.step()
        assert gap(p.detach(), w) < 1e-10


# ---- which parameters -----------------------------------------------------------------------------------------------


@every_vector_method
def test_a_model_goes_whole_by_the_rule(cls: type[MatrixOptimizer]) -> None:
    model = Language()
    model.hidden.bias.requires_grad_(False)
    for params in (model, dict(model.named_parameters()), model.named_parameters()):
        (group,) = cls(params).param_groups
        assert group["use_muon"]
        assert group["param_names"] == ["embedding.weight", "hidden.weight", "lm_head.weight"]
    assert f"{cls.__name__} takes every shape" in cls(model).describe()
    (group,) = cls(list(model.parameters())).param_groups
    assert len(group["params"]) == 4


@every_vector_method
def test_routed_groups_send_the_rest_to_adamw(cls: type[MatrixOptimizer]) -> None:
    optimizer = cls(steepest.param_groups(Language()))
    assert [group["use_muon"] for group in optimizer.param_groups] == [True, False]
    assert optimizer.param_groups[0]["param_names"] == ["hidden.weight"]


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="all are frozen"):
        SignSGD(Language().requires_grad_(False))


@every_vector_method
def test_a_vector_is_one_column(cls: type[MatrixOptimizer]) -> None:
    optimizer = cls([nn.Parameter(torch.zeros(5))])
    (p,) = optimizer.param_groups[0]["params"]
    assert optimizer._pieces(p, optimizer.param_groups[0]) == (Piece(0, 5, 1, 5, 1),)


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda p: SignSGD(p, momentum=-1.0), r"momentum should be in \[0, 1\) but is: -1.0"),
        (lambda p: NormalizedSGD(p, lr=-1.0), "Learning rate should be >= 0"),
        (lambda p: AdaGrad(p, eps=-1.0), "eps should be >= 0 but is: -1.0"),
        (lambda p: Adam(p, betas=(0.9, 1.0)), "betas should be two numbers"),
        (lambda p: MADGRAD(p, eps=-1.0), "eps should be >= 0"),
        (lambda p: AdamSANIA(p, weight_decay=-1.0), "weight decay should be >= 0"),
    ],
)
def test_bad_values_are_named(make: Callable[[list[nn.Parameter]], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make([nn.Parameter(torch.zeros(3))])


# ---- invariances ----------------------------------------------------------------------------------------------------

NET = Network()
SCALES = [uniform(*w.shape, low=0.0, high=10.0, seed=30 + i).exp() for i, w in enumerate(NET.start())]
TURNS = [[torch.linalg.qr(gaussian(n, n, seed=50 + i)).Q for n in w.shape] for i, w in enumerate(NET.start())]


def missed(make: Callable[[list[Tensor]], torch.optim.Optimizer], read: Change, write: Change) -> float:
    return worst(NET.train(make, read=read, write=write), NET.train(make))


@pytest.mark.parametrize("cls, noticed", [(AdamSANIA, False), (Adam, True), (MADGRAD, True), (AdaGrad, True)])
def test_elementwise_rescaling(cls: type[Adam], noticed: bool) -> None:
    lr = 1e-5 if cls is AdamSANIA else 0.01
    found = missed(lambda p: cls(p, lr=lr, eps=0.0), lambda w, i: w * SCALES[i], lambda w, i: w / SCALES[i])
    assert (found > 1e-2) if noticed else (found < 1e-12)


@pytest.mark.parametrize("cls, noticed", [(NormalizedSGD, False), (SignSGD, True), (Adam, True)])
def test_orthogonal_changes_of_basis(cls: type[MatrixOptimizer], noticed: bool) -> None:
    def turned(w: Tensor, i: int) -> Tensor:
        return TURNS[i][0] @ w @ TURNS[i][1]

    def back(w: Tensor, i: int) -> Tensor:
        return TURNS[i][0].mT @ w @ TURNS[i][1].mT

    found = missed(lambda p: cls(p, lr=0.01), turned, back)
    assert (found > 1e-2) if noticed else (found < 1e-12)
