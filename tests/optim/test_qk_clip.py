"""QK-clip against the rule of arXiv:2507.20534, section 2.1, head by head in fp64, and what is around it."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import steepest
from steepest import attention
from steepest.attention import AttentionLayer, attention_layers, max_logits
from steepest.attention import maxima as maxima_module
from steepest.optimizer import MatrixOptimizer
from support.host_reads import no_host_reads
from support.references import gaussian
from support.training import EVERY, all_same_bits, copies, made, noise, same_states, state_copies

WIDTH, SIZE, TOKENS = 12, 4, 9
NOPE, ROPE, VALUE = 3, 2, 5
INPUTS = gaussian(TOKENS, WIDTH, seed=77)


def rotated(t: Tensor) -> Tensor:
    """Rotary positions, (tokens, even size): a linear map of each token."""
    angles = torch.arange(len(t), dtype=t.dtype)[:, None] * torch.tensor([0.3**i for i in range(t.shape[1] // 2)])
    a, b = t[:, ::2], t[:, 1::2]
    return torch.stack([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1).flatten(1)


@dataclass(frozen=True)
class Case:
    """Shapes of the parameters, the layer, and (queries, keys) of every head as the weights of its rows give them.

    rest: rows of a parameter, by number of the parameter, that are neither queries' nor keys'.
    """

    shapes: tuple[tuple[int, ...], ...]
    layer: Callable[[Sequence[Tensor]], AttentionLayer]
    heads: Callable[[Sequence[Tensor]], list[tuple[Tensor, Tensor]]]
    rest: tuple[tuple[int, int, list[int]], ...] = ()


def rows_of(w: Tensor, b: Tensor | None, first: int, x: Tensor = INPUTS) -> Tensor:
    """(tokens, SIZE), what the head whose rows begin here computes, rotated."""
    out = x.to(w.dtype) @ w[first : first + SIZE].T
    return rotated(out if b is None else out + b[first : first + SIZE])


def separate_heads(heads: int, groups: int) -> Callable[[Sequence[Tensor]], list[tuple[Tensor, Tensor]]]:
    def of(p: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        wq, bq, wk, bk = (p[0], None, p[1], None) if len(p) == 2 else p
        keys = [rows_of(wk, bk, SIZE * g) for g in range(groups)]
        return [(rows_of(wq, bq, SIZE * h), keys[h * groups // heads]) for h in range(heads)]

    return of


def fused_heads(firsts: Sequence[tuple[int, int]], transposed: bool = False) -> Any:
    """firsts: of every head the first row of its queries and of its keys, in units of a head."""

    def of(p: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        w, b = p[0].T if transposed else p[0], p[1] if len(p) > 1 else None
        return [(rows_of(w, b, SIZE * q), rows_of(w, b, SIZE * k)) for q, k in firsts]

    return of


def latent_heads(p: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """q = [q_c, q_r], k = [k_c of the head, k_r of all]; the shared rotated key has a weight outside of the layer."""
    shared = rotated(INPUTS @ gaussian(ROPE, WIDTH, seed=5).T)
    found = []
    for h in range(3):
        q = INPUTS @ p[0][h * (NOPE + ROPE) : (h + 1) * (NOPE + ROPE)].T
        k = INPUTS[:, :6] @ p[1][h * (NOPE + VALUE) : h * (NOPE + VALUE) + NOPE].T
        found.append((torch.cat([q[:, :NOPE], rotated(q[:, NOPE:])], 1), torch.cat([k, shared], 1)))
    return found


def span(first: int, last: int) -> list[int]:
    return list(range(SIZE * first, SIZE * last))


SHARED_KEYS = [(0, 4), (1, 4), (2, 5), (3, 5)]
INTERLEAVED = [(0, 2), (1, 2), (4, 6), (5, 6)]
CASES: dict[str, Case] = {
    "separate": Case(
        ((12, WIDTH), (12, WIDTH)), lambda p: AttentionLayer.separate(p[0], p[1], 3), separate_heads(3, 3)
    ),
    "grouped with biases": Case(
        ((16, WIDTH), (16,), (8, WIDTH), (8,)),
        lambda p: AttentionLayer.separate(p[:2], p[2:], 4, 2),
        separate_heads(4, 2),
    ),
    "one key head": Case(
        ((16, WIDTH), (4, WIDTH)), lambda p: AttentionLayer.separate(p[0], p[1], 4, 1), separate_heads(4, 1)
    ),
    "fused": Case(
        ((36, WIDTH), (36,)),
        lambda p: AttentionLayer.fused(p, 3),
        fused_heads([(0, 3), (1, 4), (2, 5)]),
        ((0, 0, span(6, 9)), (1, 0, span(6, 9))),
    ),
    "fused, grouped": Case(
        ((32, WIDTH),), lambda p: AttentionLayer.fused(p, 4, 2), fused_heads(SHARED_KEYS), ((0, 0, span(6, 8)),)
    ),
    "interleaved": Case(
        ((32, WIDTH), (32,)),
        lambda p: AttentionLayer.fused(p, 4, 2, interleaved=True),
        fused_heads(INTERLEAVED),
        ((0, 0, span(3, 4) + span(7, 8)), (1, 0, span(3, 4) + span(7, 8))),
    ),
    "transposed": Case(
        ((WIDTH, 36), (36,)),
        lambda p: AttentionLayer.fused(p, 3, transposed=True),
        fused_heads([(0, 3), (1, 4), (2, 5)], transposed=True),
        ((0, 1, span(6, 9)), (1, 0, span(6, 9))),
    ),
    "latent": Case(
        ((3 * (NOPE + ROPE), WIDTH), (3 * (NOPE + VALUE), 6)),
        lambda p: AttentionLayer.latent(p[0], p[1], 3, NOPE, ROPE),
        latent_heads,
        ((1, 0, [h * (NOPE + VALUE) + NOPE + i for h in range(3) for i in range(VALUE)]),),
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def largest(heads: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The largest causal logit of every head, by loops."""
    found = []
    for q, k in heads:
        scale = 1 / math.sqrt(q.shape[1])
        logits = [float(q[i].detach() @ k[j].detach()) for i in range(len(q)) for j in range(i + 1)]
        found.append(scale * max(logits))
    return torch.tensor(found, dtype=torch.float64)


def weights_of(case: Case, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter((gaussian(*shape, seed=3 + i) / 2).to(dtype)) for i, shape in enumerate(case.shapes)]


def logits_and_threshold(case: Case, params: Sequence[Tensor]) -> tuple[Tensor, float]:
    """The largest logit of every head, and a threshold that the lowest alone is below."""
    old = largest(case.heads(params))
    lowest = old.sort().values
    assert lowest[0] > 0
    return old, float(lowest[0] + lowest[1]) / 2


def still(params: Sequence[nn.Parameter], **values: Any) -> steepest.Muon:
    """An optimizer whose steps move nothing, with gradients."""
    matrices, vectors = ([p for p in params if (p.ndim > 1) is kind] for kind in (True, False))
    groups = [{"params": matrices}, {"params": vectors, "use_muon": False, "lr": 0.0}]
    for i, p in enumerate(params):
        p.grad = noise(p.shape, 50 + i, p.dtype)
    return steepest.Muon([g for g in groups if g["params"]], lr=0.0, weight_decay=0.0, **values)


# ---- the rule --------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("balance", [0.5, 0.0, 0.8])
def test_largest_logits_are_the_threshold_at_most(case: Case, balance: float) -> None:
    """min(old, threshold) for every head, with the same inputs: exactly, whatever is fused, shared or rotated."""
    params = weights_of(case)
    optimizer, before = still(params), copies(params)
    old, threshold = logits_and_threshold(case, params)
    clip = steepest.QKClip(optimizer, {"a": case.layer(params)}, threshold, balance)
    clip.observe("a", old)
    optimizer.step()
    torch.testing.assert_close(largest(case.heads(params)), old.clamp(max=threshold), rtol=1e-12, atol=0)
    for number, dim, rest in case.rest:
        index = torch.tensor(rest)
        assert torch.equal(params[number].index_select(dim, index), before[number].index_select(dim, index))
    assert all((p.detach().abs() <= b.abs()).all() for p, b in zip(params, before, strict=True))


def test_the_weights_are_those_of_the_paper() -> None:
    """Algorithm 1 for plain heads: W_q^h and W_k^h times gamma^alpha and gamma^(1 - alpha)."""
    case = CASES["separate"]
    params = weights_of(case)
    optimizer, wanted = still(params), copies(params)
    old, threshold = logits_and_threshold(case, params)
    clip = steepest.QKClip(optimizer, {"a": case.layer(params)}, threshold, 0.3)
    for h, s in enumerate(old.tolist()):
        if s > threshold:
            wanted[0][h * SIZE : (h + 1) * SIZE] *= (threshold / s) ** 0.3
            wanted[1][h * SIZE : (h + 1) * SIZE] *= (threshold / s) ** 0.7
    clip.observe("a", old)
    optimizer.step()
    for p, w in zip(params, wanted, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-14, atol=0)


def test_the_weights_of_latent_attention_are_those_of_the_paper() -> None:
    """q^C and k^C times sqrt(gamma), q^R times gamma, k^R and values as they were."""
    case = CASES["latent"]
    params = weights_of(case)
    optimizer, wanted = still(params), copies(params)
    old, threshold = logits_and_threshold(case, params)
    clip = steepest.QKClip(optimizer, {"a": case.layer(params)}, threshold)
    for h, s in enumerate(old.tolist()):
        gamma, q, k = min(1, threshold / s), h * (NOPE + ROPE), h * (NOPE + VALUE)
        wanted[0][q : q + NOPE] *= math.sqrt(gamma)
        wanted[0][q + NOPE : q + NOPE + ROPE] *= gamma
        wanted[1][k : k + NOPE] *= math.sqrt(gamma)
    clip.observe("a", old)
    optimizer.step()
    for p, w in zip(params, wanted, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-14, atol=0)


def test_a_head_below_is_untouched_where_it_shares_its_key() -> None:
    """Queries alone take the factor where one head of the group is below; keys take the mildest where none is."""
    case = CASES["grouped with biases"]
    params = weights_of(case)
    optimizer, before = still(params), copies(params)
    clip = steepest.QKClip(optimizer, {"a": case.layer(params)}, 1.0)
    clip.observe("a", torch.tensor([0.5, 4.0, 4.0, 16.0]))
    optimizer.step()
    factors = {0: (1, 0.25, 0.5, 0.125), 1: (1, 0.25, 0.5, 0.125), 2: (1, 0.5), 3: (1, 0.5)}
    for number, of_head in factors.items():
        for h, factor in enumerate(of_head):
            some = slice(h * SIZE, (h + 1) * SIZE)
            torch.testing.assert_close(params[number].detach()[some], before[number][some] * factor, rtol=1e-14, atol=0)


# ---- between steps ---------------------------------------------------------------------------------------------------


def clipped(**values: Any) -> tuple[steepest.Muon, list[nn.Parameter], steepest.QKClip]:
    """Three heads and a threshold of 1."""
    case = CASES["separate"]
    params = weights_of(case, values.pop("dtype", torch.float64))
    optimizer = still(params, **values)
    return optimizer, params, steepest.QKClip(optimizer, {"a": case.layer(params)}, 1.0)


def query_factors(params: Sequence[Tensor], before: Sequence[Tensor]) -> list[float]:
    """What the queries of each head were multiplied by."""
    return [round(float(p / b), 6) for p, b in zip(params[0].detach()[::SIZE, 0], before[0][::SIZE, 0], strict=True)]


def test_maxima_of_micro_batches_are_one_and_begin_anew() -> None:
    optimizer, params, clip = clipped()
    before = copies(params)
    clip.observe("a", torch.tensor([4.0, 0.5, -3.0]))
    clip.observe("a", torch.tensor([2.0, 16.0, 0.1]))
    optimizer.step()
    assert query_factors(params, before) == [0.5, 0.25, 1]
    assert {name: t.item() for name, t in clip.metrics().items()} == {
        "max_logit": 16,
        "clipped_heads": 2,
        "nonfinite": 0,
    }
    now = copies(params)
    optimizer.step()
    assert all_same_bits(params, now)
    assert clip.metrics()["max_logit"] == -math.inf


@pytest.mark.parametrize("bad", [0, 1], ids=["queries", "keys"])
def test_a_step_that_is_left_out_keeps_weights_and_maxima(bad: int) -> None:
    optimizer, params, clip = clipped()
    before = copies(params)
    clip.observe("a", torch.tensor([4.0, 0.5, 0.5]))
    gradient = params[bad].grad
    assert gradient is not None
    good = gradient.clone()
    gradient.view(-1)[3] = math.nan
    optimizer.step()
    assert all_same_bits(params, before)
    params[bad].grad = good
    clip.observe("a", torch.tensor([0.5, 0.5, 4.0]))
    optimizer.step()
    assert query_factors(params, before) == [0.5, 1, 0.5]


def test_a_step_without_a_gradient_of_the_keys_clips_nothing() -> None:
    optimizer, params, clip = clipped()
    before = copies(params)
    clip.observe("a", torch.full((3,), 4.0))
    gradient, params[1].grad = params[1].grad, None
    optimizer.step()
    assert all_same_bits(params, before)
    params[1].grad = gradient
    optimizer.step()
    assert query_factors(params, before) == [0.5] * 3


def test_a_step_that_a_scaler_leaves_out_clips_nothing() -> None:
    optimizer, params, clip = clipped(dtype=torch.float32)
    before = copies(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    clip.observe("a", torch.full((3,), 4.0))
    good = params[0].grad
    assert good is not None
    params[0].grad = torch.full_like(good, math.inf)
    scaler.step(optimizer)
    scaler.update()
    assert all_same_bits(params, before)
    params[0].grad = good
    scaler.step(optimizer)
    assert query_factors(params, before) == [0.5] * 3


def test_maxima_that_are_not_finite_say_nothing_and_are_counted() -> None:
    optimizer, params, clip = clipped()
    before = copies(params)
    clip.observe("a", torch.tensor([math.nan, math.inf, -math.inf]))
    optimizer.step()
    assert all_same_bits(params, before)
    clip.observe("a", torch.tensor([math.nan, 4.0, 0.0]))
    optimizer.step()
    assert query_factors(params, before) == [1, 0.5, 1]
    assert clip.metrics()["nonfinite"] == 3


def test_the_end() -> None:
    optimizer, params, clip = clipped()
    before = copies(params)
    clip.observe("a", torch.full((3,), 4.0))
    clip.remove()
    optimizer.step()
    assert all_same_bits(params, before)


# ---- with every optimizer and every way to store a weight -----------------------------------------------------------


def both(cls: type[MatrixOptimizer], **values: Any) -> tuple[MatrixOptimizer, list[nn.Parameter]]:
    """Two matrices and a bias of AdamW's."""
    dtype = values.pop("dtype", torch.float32)
    params = [nn.Parameter(noise(shape, i, dtype)) for i, shape in enumerate(((8, 6), (4, 6), (8,)))]
    groups = [{"params": params[:2]}, {"params": params[2:], "use_muon": False}]
    optimizer = made(cls, groups, **{"lr": 0.02, "adamw_lr": 0.01, **values})
    for i, p in enumerate(params):
        p.grad = noise(p.shape, 9 + i, dtype)
    return optimizer, params


def without_average(states: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """SPlus averages the weights as they are after the clip."""
    return [{key: t for key, t in state.items() if key != "average"} for state in states]


@pytest.mark.parametrize("cls", [cls for cls in EVERY if cls is not steepest.NIGT], ids=lambda cls: cls.__name__)
def test_every_optimizer_steps_as_without_and_is_clipped(cls: type[MatrixOptimizer]) -> None:
    (optimizer, params), (plain, others) = both(cls), both(cls)
    layer = AttentionLayer.separate([params[0], params[2]], params[1], 4, 2)
    clip = steepest.QKClip(optimizer, {"a": layer}, threshold=1.0)
    clip.observe("a", torch.tensor([1.0, 4.0, 16.0, 16.0]))
    optimizer.step()
    plain.step()
    wanted = copies(others)
    for number, factors in ((0, (1, 0.25, 0.25, 0.25)), (1, (1, 0.25)), (2, (1, 0.25, 0.25, 0.25))):
        for h, factor in enumerate(factors):
            wanted[number][2 * h : 2 * h + 2] *= factor
    assert all_same_bits(params, wanted)
    assert same_states(*(without_average(state_copies(each)) for each in (optimizer, plain)))


@pytest.mark.parametrize(
    "values, dtype, tolerance",
    [
        ({"keep_mantissa": True}, torch.bfloat16, 0),
        ({"stochastic_rounding": True}, torch.bfloat16, 2**-7),
        ({}, torch.bfloat16, 2**-8),
        ({}, torch.float16, 2**-11),
    ],
    ids=str,
)
def test_weights_are_scaled_by_their_true_value(values: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    (optimizer, params), (plain, others) = (both(steepest.Muon, dtype=dtype, **values) for _ in range(2))
    clip = steepest.QKClip(optimizer, {"a": AttentionLayer.separate(params[0], params[1], 4, 2)}, threshold=1.0)
    clip.observe("a", torch.tensor([0.5, 3.0, 7.0, 3.0]))
    optimizer.step()
    plain.step()
    rounding = plain.recipe(plain.param_groups[0]).rounding
    true = rounding.value(others[0].detach(), plain.state[others[0]])
    found = rounding.value(params[0].detach(), optimizer.state[params[0]])
    gamma = 1 / torch.tensor([1.0, 3.0, 7.0, 3.0])
    shared = torch.tensor([1.0, 1.0, gamma[3] ** 0.5, gamma[3] ** 0.5])
    wanted = true * (gamma / shared).repeat_interleave(2)[:, None]
    torch.testing.assert_close(found, wanted, rtol=tolerance or 1e-6, atol=0)
    assert all_same_bits([params[0][:2]], [others[0][:2]])
    if values.get("keep_mantissa"):
        assert (found != found.bfloat16()).any()


def test_nothing_observed_is_no_clip() -> None:
    (optimizer, params), (plain, others) = both(steepest.MuAdam), both(steepest.MuAdam)
    steepest.QKClip(optimizer, {"a": AttentionLayer.separate(params[0], params[1], 4, 2)}, threshold=1e-3)
    for _ in range(3):
        optimizer.step()
        plain.step()
    assert all_same_bits(params, others)


# ---- where maxima come from ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [1, 100, 1 << 25])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "added"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_max_logits(monkeypatch: pytest.MonkeyPatch, entries: int, mask: str, groups: int) -> None:
    monkeypatch.setattr(maxima_module, "ENTRIES", entries)
    query, key = gaussian(2, 4, 5, 3, seed=0), gaussian(2, groups, 7, 3, seed=1)
    attends = torch.ones(2, 4, 5, 7, dtype=torch.bool)
    given: Tensor | None = None
    if mask == "causal":
        attends = attends.tril()
    elif mask != "none":
        attends = given = gaussian(2, 1, 5, 7, seed=2).expand(2, 4, 5, 7) > 0
    if mask == "added":
        given = torch.where(attends, 0.3, torch.finfo(torch.float32).min)
    wanted = [
        max(
            0.7 * float(query[b, h, i] @ key[b, h * groups // 4, j])
            for b in range(2)
            for i in range(5)
            for j in range(7)
            if attends[b, h, i, j]
        )
        for h in range(4)
    ]
    found = max_logits(query, key, given, mask == "causal", scale=0.7)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-13, atol=0)


def test_max_logits_of_other_shapes_and_dtypes() -> None:
    query, key = gaussian(2, 5, 4, seed=0), gaussian(2, 5, 4, seed=1)
    whole = (query @ key.mT).amax((1, 2)) / 2
    torch.testing.assert_close(max_logits(query, key), whole)
    half = max_logits(query.bfloat16(), key.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), whole, rtol=0.02, atol=0)
    nobody = max_logits(query, key, torch.zeros(5, 5, dtype=torch.bool))
    assert nobody.tolist() == [-math.inf] * 2
    assert max_logits(query[:, :0], key).tolist() == [-math.inf] * 2
    assert not max_logits(query.requires_grad_(), key).requires_grad


@pytest.mark.parametrize(
    "shapes, message",
    [
        (((5, 4), (5, 4)), r"takes \(..., heads, tokens, size\) of both but got queries of shape \(5, 4\)"),
        (((2, 5, 4), (2, 5, 3)), "differ in the size of a head or in their batch"),
        (((3, 5, 4), (2, 5, 4)), "the number of key heads does not divide that of query heads"),
    ],
)
def test_shapes_that_max_logits_refuses(shapes: tuple[tuple[int, ...], tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        max_logits(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


class Attention(nn.Module):
    """Grouped queries, causal."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = 4, 2
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
        self.out = nn.Linear(16, WIDTH)

    def heads(self, x: Tensor) -> list[Tensor]:
        batch, tokens, _ = x.shape
        maps = (self.q_proj, self.k_proj, self.v_proj)
        return [each(x).view(batch, tokens, -1, SIZE).transpose(1, 2) for each in maps]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        attended = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(attended.transpose(1, 2).flatten(2))


class Network(nn.Module):
    """Two attention layers."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        self.layers = nn.ModuleList([Attention() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=self.checkpointed) if self.checkpointed else layer(x))
        return x


X = noise((2, TOKENS, WIDTH), 1)


def wanted_maxima(model: Network, x: Tensor) -> Tensor:
    found = []
    with torch.no_grad():
        for layer in model.layers:
            assert isinstance(layer, Attention)
            q, k, _ = layer.heads(x)
            logits = q @ k.repeat_interleave(2, 1).mT / 2
            found.append(logits.masked_fill(~torch.ones(TOKENS, TOKENS).tril().bool(), -math.inf).amax((0, 2, 3)))
            x = x + layer(x)
    return torch.cat(found)


def observed(clip: steepest.QKClip) -> Tensor:
    return torch.cat([part.maxima for part in clip._clipped.values()])


def watched(**values: Any) -> tuple[Network, steepest.Muon, steepest.QKClip]:
    model = Network(**values)
    optimizer = steepest.Muon(model, lr=0.02)
    return model, optimizer, steepest.QKClip(optimizer, model, threshold=0.5)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_calls_of_attention_are_watched(checkpointed: bool) -> None:
    model, optimizer, clip = watched(checkpointed=checkpointed)
    assert list(clip.layers) == ["layers.0", "layers.1"]
    wanted = wanted_maxima(model, X)
    model(X.clone().requires_grad_()).square().mean().backward()
    torch.testing.assert_close(observed(clip), wanted)
    optimizer.step()
    torch.testing.assert_close(clip.metrics()["max_logit"], wanted.max())
    assert clip.metrics()["clipped_heads"] == (wanted > 0.5).sum() > 0


def test_training_alone_is_watched() -> None:
    model, _, clip = watched()
    with torch.no_grad():
        model(X)
    model.eval()(X)
    assert observed(clip).max() == -math.inf
    model.train()
    clip.remove()
    model(X)
    assert observed(clip).max() == -math.inf


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    model, _, clip = watched()
    with pytest.raises(RuntimeError):
        model(X[..., :3])
    assert torch.overrides._get_current_function_mode_stack() == []
    model(X)
    torch.testing.assert_close(observed(clip), wanted_maxima(model, X))


def test_copies_of_a_watched_model_are_not_watched() -> None:
    model, _, clip = watched()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        other(X)
        assert observed(clip).max() == -math.inf
    model(X)
    assert observed(clip).max() > 0


def test_attention_that_is_not_seen_is_said_once() -> None:
    model, optimizer, _ = watched()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.warns(UserWarning, match="saw no call of scaled_dot_product_attention before this step"):
        optimizer.step()
    optimizer.step()


def test_what_was_found_can_be_read() -> None:
    [layer, _] = attention_layers(Network()).values()
    assert repr(layer) == (
        "AttentionLayer(num_heads=4, num_kv_heads=2: (16, 12) with 16 query and 0 key rows of 16; "
        "(16,) with 16 query and 0 key rows of 16; (8, 12) with 0 query and 8 key rows of 8; "
        "(8,) with 0 query and 8 key rows of 8)"
    )


def test_two_layers_trained_stay_below() -> None:
    """With steps that would let logits grow: without the clip they do."""

    def train(threshold: float | None) -> float:
        torch.manual_seed(0)
        model = Network()
        optimizer = steepest.Muon(model, lr=0.05, adamw_lr=1e-3, weight_decay=0.0)
        if threshold is not None:
            steepest.QKClip(optimizer, model, threshold)
        for step in range(30):
            optimizer.zero_grad()
            x = noise((2, TOKENS, WIDTH), step)
            (model(x) - 3 * x.roll(1, 1)).square().mean().backward()
            optimizer.step()
        return float(wanted_maxima(model, X).max())

    assert train(None) > 8
    assert train(1.0) < 3


@pytest.mark.slow
def test_a_compiled_model_hands_over_its_maxima() -> None:
    """In one graph."""
    model, _, clip = watched()
    torch.compile(model, backend="aot_eager", fullgraph=True)(X).square().mean().backward()
    torch._dynamo.reset()
    torch.testing.assert_close(observed(clip), wanted_maxima(model, X))


@pytest.mark.slow
def test_a_compiled_step_clips() -> None:
    """In one graph, one step after another with other maxima."""
    optimizer, params, clip = clipped(dtype=torch.float32)
    before, step = copies(params), torch.compile(optimizer.step, backend="eager", fullgraph=True)
    for factor in (0.5, 0.25, 1):
        clip.observe("a", torch.tensor([0.5, 1 / factor, 0.5]))
        step()
        assert query_factors(params, before) == [1, round(factor**0.5, 6), 1]
        before = copies(params)
    torch._dynamo.reset()


def test_nothing_is_read_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, _, clip = clipped()
    optimizer.step()
    memory = observed(clip).shape, [part.maxima.data_ptr() for part in clip._clipped.values()]
    with no_host_reads(monkeypatch):
        clip.observe("a", torch.full((3,), 4.0))
        optimizer.step()
        clip.metrics()
    assert memory == (observed(clip).shape, [part.maxima.data_ptr() for part in clip._clipped.values()])


# ---- layers of a model -----------------------------------------------------------------------------------------------


class Module(nn.Module):
    """Attributes and children by name; never called."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


class Conv1D(nn.Module):
    """Of Hugging Face: x W."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(inputs, outputs)), nn.Parameter(torch.zeros(outputs))


def linear(outputs: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(WIDTH, outputs, bias=bias)


Numbers = list[list[int]]
#: a module, its heads and key heads, and the factor of the first row of every block of 4 rows of its parameters
FOUND: dict[str, tuple[Callable[[], nn.Module], tuple[int, int], Numbers]] = {
    "head_dim goes before the config": (
        lambda: Module(q_proj=linear(16, True), k_proj=linear(8), head_dim=4, config=Module(num_attention_heads=16)),
        (4, 2),
        [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5]],
    ),
    "numbers of heads": (
        lambda: Module(to_q=linear(16), to_k=linear(8), config={"num_attention_heads": 4, "num_key_value_heads": 2}),
        (4, 2),
        [[0, 1, 2, 3], [4, 5]],
    ),
    "Conv1D": (lambda: Module(c_attn=Conv1D(24, WIDTH), num_heads=2), (2, 2), [[0, 1, 2, 3, 6, 6]] * 2),
    "fused": (
        lambda: Module(qkv_proj=linear(32), num_heads=4, num_key_value_heads=2),
        (4, 2),
        [[0, 1, 2, 3, 4, 5, 10, 10]],
    ),
    "interleaved": (
        lambda: Module(query_key_value=linear(32), num_heads=4, num_kv_heads=2, config=Module(num_kv_heads=4)),
        (4, 2),
        [[0, 1, 4, 10, 2, 3, 5, 10]],
    ),
    "torch's own": (
        lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True),
        (2, 2),
        [[0, 1, 2, 3, 6, 6], [0, 1, 2, 3, 6, 6], [2, 3]],
    ),
    "torch's own of other widths": (
        lambda: nn.MultiheadAttention(8, 2, kdim=5),
        (2, 2),
        [[0, 1], [2, 3], [0, 1, 2, 3, 6, 6]],
    ),
    "latent": (
        lambda: Module(q_b_proj=linear(16), kv_b_proj=linear(16), qk_nope_head_dim=4, qk_rope_head_dim=4),
        (2, 2),
        [[0, 4, 1, 5], [2, 6, 3, 6]],
    ),
}


@pytest.mark.parametrize("make, heads, numbers", FOUND.values(), ids=list(FOUND))
def test_layers_that_are_known(make: Callable[[], nn.Module], heads: tuple[int, int], numbers: Numbers) -> None:
    model = nn.ModuleList([nn.Linear(3, 3), make()])
    found = attention_layers(model)
    assert list(found) == ["1"]
    assert (found["1"].num_heads, found["1"].num_kv_heads) == heads
    assert [rows.factor[::4].tolist() for rows in found["1"].rows] == numbers
    assert all(len(rows.factor) == rows.parameter.shape[rows.dim] for rows in found["1"].rows)
    assert {rows.parameter for rows in found["1"].rows} <= set(model.parameters())


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Linear(3, 3), r"no attention layer is known in Linear: give them to QKClip by hand, \{'path.of.module'"),
        (Module(q_proj=linear(16), k_proj=linear(16)), "no attention layer is known in Module"),
        (
            nn.Sequential(Module(q_proj=linear(16), k_proj=linear(16), head_dim=4, q_norm=nn.LayerNorm(4))),
            r"'0' normalizes its queries and keys \(q_norm\), so that their size does not depend on the weights",
        ),
    ],
    ids=["nothing", "no heads", "norms"],
)
def test_models_without_layers_to_clip(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_layers(model)


def test_a_norm_that_is_none_is_no_norm() -> None:
    assert attention_layers(Module(q_proj=linear(16), k_proj=linear(16), head_dim=4, q_norm=nn.Identity()))


# ---- what is refused -------------------------------------------------------------------------------------------------


LAYERS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "heads": (
        lambda: AttentionLayer.separate(linear(12), linear(12), 5),
        ValueError,
        r"the query projection of shape \(12, 12\) has 12 rows \(outputs\), which num_heads = 5 does not divide",
    ),
    "no heads": (
        lambda: AttentionLayer.separate(linear(12), linear(12), 0),
        ValueError,
        "num_heads should be a whole number of at least 1 but is: 0",
    ),
    "groups": (
        lambda: AttentionLayer.separate(linear(12), linear(12), 4, 3),
        ValueError,
        "num_kv_heads=3 does not divide num_heads=4",
    ),
    "sizes": (
        lambda: AttentionLayer.separate(linear(12), linear(6), 3),
        ValueError,
        "query heads have 4 rows and key heads 2, with num_heads=3 and num_kv_heads=3",
    ),
    "fused": (
        lambda: AttentionLayer.fused(linear(34), 4, 2),
        ValueError,
        r"the fused projection .* 34 rows \(outputs\), which num_heads \+ 2 num_kv_heads = 8 does not divide",
    ),
    "rotated": (
        lambda: AttentionLayer.latent(linear(15), linear(24), 3, 4, 2),
        ValueError,
        r"query heads have 5 rows with num_heads=3, which is not nope_size \+ rope_size, 4 \+ 2",
    ),
    "latent keys": (
        lambda: AttentionLayer.latent(linear(18), linear(9), 3, 4, 2),
        ValueError,
        "heads of the key and value projection have fewer rows than nope_size=4",
    ),
    "a bias of another length": (
        lambda: AttentionLayer.separate([torch.zeros(6, 12), torch.zeros(12)], linear(6), 3),
        ValueError,
        r"the bias of the query projection has 12 numbers and its weight of shape \(6, 12\) 6 rows: say transposed",
    ),
    "a tensor of three dimensions": (
        lambda: AttentionLayer.separate(torch.zeros(3, 4, 12), linear(12), 3),
        ValueError,
        r"the query projection should be a matrix, perhaps with a bias, but has shapes \(3, 4, 12\)",
    ),
    "no projection": (
        lambda: AttentionLayer.separate(nn.ReLU(), linear(12), 3),
        TypeError,
        r"should be a module with a weight, a weight or \(weight, bias\) but is: ReLU\(\)",
    ),
}


@pytest.mark.parametrize("make, error, message", LAYERS.values(), ids=list(LAYERS))
def test_layers_that_do_not_fit(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def optimizer_and_layer() -> tuple[steepest.Muon, dict[str, AttentionLayer]]:
    q, k = (nn.Parameter(noise((8, 6), i)) for i in range(2))
    return steepest.Muon([q, k]), {"a": AttentionLayer.separate(q, k, 4)}


@pytest.mark.parametrize(
    "values, error, message",
    [
        ({"threshold": -1.0}, ValueError, "threshold should be > 0 and finite but is: -1.0"),
        ({"threshold": math.inf}, ValueError, "threshold should be > 0 and finite but is: inf"),
        ({"threshold": "100"}, TypeError, "threshold should be a number but is: '100', a string: unquote it"),
        ({"balance": 1.5}, ValueError, r"balance should be in \[0, 1\] but is: 1.5"),
        ({"layers": {}}, ValueError, "QKClip got no layers: leave it out, or give some"),
        ({"layers": [1]}, TypeError, r"layers should be a model or a mapping of names to AttentionLayer.* is: \[1\]"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, TypeError, "takes an optimizer of steepest but got SGD"),
        ({"optimizer": steepest.NIGT([torch.zeros(2, 2)])}, TypeError, "QKClip does not take NIGT, which would go on"),
        (
            {"layers": {"b": AttentionLayer.separate(linear(8), linear(8), 4)}},
            ValueError,
            r"a parameter of layer 'b' \(shape \(8, 12\)\) is not in the optimizer: it is frozen, of another",
        ),
    ],
    ids=str,
)
def test_arguments_that_are_refused(values: dict[str, Any], error: type[Exception], message: str) -> None:
    optimizer, layers = optimizer_and_layer()
    with pytest.raises(error, match=message):
        steepest.QKClip(**{"optimizer": optimizer, "layers": layers, **values})
    assert not optimizer._weight_hooks


def test_a_shared_parameter_is_refused() -> None:
    optimizer, layers = optimizer_and_layer()
    with pytest.raises(ValueError, match=r"of shape \(8, 6\) is in layer 'a' and again in layer 'b'"):
        steepest.QKClip(optimizer, {**layers, "b": layers["a"]})


def test_a_second_clip_of_the_same_layers_is_refused() -> None:
    optimizer, layers = optimizer_and_layer()
    first = steepest.QKClip(optimizer, layers)
    with pytest.raises(ValueError, match=r"layer 'a' is clipped by another QKClip of this optimizer: call its remove"):
        steepest.QKClip(optimizer, layers)
    first.remove()
    assert repr(steepest.QKClip(optimizer, layers)) == "QKClip(1 layers, threshold=100.0, balance=0.5)"


def test_maxima_and_names_that_do_not_fit() -> None:
    optimizer, layers = optimizer_and_layer()
    clip = steepest.QKClip(optimizer, layers)
    with pytest.raises(ValueError, match="there is no layer 'aa'; close names: .*'a'"):
        clip.observe("aa", torch.zeros(4))
    with pytest.raises(ValueError, match=r"layer 'a' has 4 heads but maxima of shape \(2,\) were handed over"):
        clip.observe("a", torch.zeros(2))
    with pytest.raises(ValueError, match="from first_head=3"):
        clip.observe("a", torch.zeros(2), first_head=3)
    with pytest.raises(ValueError, match="there is no module 'a' in Linear"):
        clip.watch(nn.Linear(2, 2))
    clip.observe("a", torch.ones(2), first_head=2)
    assert observed(clip).tolist() == [-math.inf, -math.inf, 1, 1]


def test_wrapped_optimizers_are_seen_through() -> None:
    optimizer, layers = optimizer_and_layer()

    class Wrapper(torch.optim.SGD):
        pass

    wrapper = Wrapper([torch.zeros(1)])
    wrapper.optimizer = optimizer  # type: ignore[attr-defined]
    steepest.QKClip(wrapper, layers)
    assert optimizer._weight_hooks


def test_names() -> None:
    assert attention.QKClip is steepest.QKClip
    assert set(attention.__all__) == {"AttentionLayer", "QKClip", "attention_layers", "max_logits"}
