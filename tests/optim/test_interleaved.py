"""Splits that lie group by group: a step is that of the same rows one split under the other, bit by bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.attention import AttentionLayer
from steepest.optimizer import MatrixOptimizer
from steepest.routing import fused_layouts
from support.slow import slow
from support.training import (
    EVERY,
    Make,
    all_same_bits,
    both_backends,
    check_compiled_step,
    check_resume_and_bad_gradients,
    made,
    name_of,
    noise,
    on_backends,
    relative,
)

SPLITS, GROUPS, ROWS = (12, 6, 6), 3, 24
#: (shape, layout but for `interleaved`), wide and tall, with heads in one group each, over several and cut by groups.
LAYOUTS: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    ((ROWS, 4), {"split_sizes": SPLITS}),
    ((ROWS, 15), {"split_sizes": SPLITS}),
    ((ROWS, 5), {"split_sizes": SPLITS, "num_heads": (6, 3, 3)}),
    ((ROWS, 5), {"split_sizes": SPLITS, "num_heads": 2}),
    ((2, ROWS, 5), {"split_sizes": SPLITS, "batch_dims": 1}),
    ((5, ROWS), {"split_sizes": SPLITS, "transposed": True}),
    ((ROWS, 2, 3), {"split_sizes": SPLITS, "batch_dims": 0}),
)
#: Fromage measures whole tensors.
CLASSES = tuple(cls for cls in EVERY if cls is not steepest.Fromage)


def gathered(t: Tensor, splits: Sequence[int] = SPLITS, groups: int = GROUPS) -> Tensor:
    """The rows of the first split of every group, then those of the second, along the dimension that has them all."""
    places = torch.arange(sum(splits)).view(groups, -1).split([size // groups for size in splits], 1)
    rows = torch.cat([of_split.flatten() for of_split in places])
    return t.index_select(tuple(t.shape).index(sum(splits)), rows).contiguous()


def pair(
    cls: type[MatrixOptimizer],
    layouts: Sequence[tuple[tuple[int, ...], dict[str, Any]]] = LAYOUTS,
    dtype: torch.dtype = torch.float32,
    **values: Any,
) -> tuple[MatrixOptimizer, list[nn.Parameter], MatrixOptimizer, list[nn.Parameter]]:
    """Interleaved parameters and their optimizer, and the same with the rows gathered."""
    ours = [nn.Parameter(noise(shape, seed, dtype)) for seed, (shape, _) in enumerate(layouts)]
    plain = [nn.Parameter(gathered(p.detach())) for p in ours]
    of_groups = [{"params": [p], **layout} for p, (_, layout) in zip(ours, layouts, strict=True)]
    of_plain = [{"params": [p], **layout} for p, (_, layout) in zip(plain, layouts, strict=True)]
    given = {"lr": 0.02, "weight_decay": 0.1, **values}
    first = made(cls, [{**group, "interleaved": GROUPS} for group in of_groups], **given)
    return first, ours, made(cls, of_plain, **given), plain


def train(first: MatrixOptimizer, ours: list[nn.Parameter], second: MatrixOptimizer, plain: list[nn.Parameter]) -> None:
    for step in range(4):
        for i, (p, q) in enumerate(zip(ours, plain, strict=True)):
            p.grad = noise(p.shape, 100 * (step + 1) + i, p.dtype)
            q.grad = gathered(p.grad)
        first.step()
        second.step()


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.bfloat16)], ids=["fp32", "bf16"])
@on_backends(CLASSES)
def test_every_class_steps_as_on_gathered_rows(cls: type[MatrixOptimizer], backend: str, dtype: torch.dtype) -> None:
    first, ours, second, plain = pair(cls, dtype=dtype, backend=backend)
    train(first, ours, second, plain)
    found, wanted = [gathered(p.detach()) for p in ours], [q.detach() for q in plain]
    if cls in (steepest.NormalizedSGD, steepest.NIGT) and backend == "torch":
        # torch sums the squares of a transposed matrix by columns, and of a copy by rows
        assert all(relative(a, b) < 1e-6 for a, b in zip(found, wanted, strict=True))
    else:
        assert all_same_bits(found, wanted)


OPTIONS: list[dict[str, Any]] = [
    {"stochastic_rounding": True},
    {"keep_mantissa": True},
    {"average": 0.9},
    {"constraint": "frobenius"},
    {"constraint": "spectral"},
    {"variance_reduction": 0.05},
    {"cautious_update": True, "cautious_wd": True},
    {"weight_decay_method": "l2"},
    {"fuse_update": True},
]


@both_backends
@pytest.mark.parametrize("values", OPTIONS, ids=lambda values: next(iter(values)))
def test_options_of_weights(values: dict[str, Any], backend: str) -> None:
    """To the bit but where norms of whole matrices are summed in the order of memory."""
    if "constraint" in values:
        values = {**values, "weight_decay": 0.0}
    layouts = LAYOUTS[:5]  # random bits go by an element's place, which in a transposed one is another
    first, ours, second, plain = pair(steepest.MuAdam, layouts, torch.bfloat16, backend=backend, **values)
    train(first, ours, second, plain)
    found, wanted = [gathered(p.detach()) for p in ours], [q.detach() for q in plain]
    if "constraint" in values:
        assert all(relative(a, b) < 1e-2 for a, b in zip(found, wanted, strict=True))
    else:
        assert all_same_bits(found, wanted)
    if "average" in values:
        first.eval()
        second.eval()
        assert all_same_bits([gathered(p.detach()) for p in ours], plain)


@both_backends
def test_state_in_codes(backend: str) -> None:
    """A block of codes is a row here, so that rows in another order have the same codes."""
    layouts = (((ROWS, 256), {"split_sizes": SPLITS}), ((ROWS, 256), {"split_sizes": SPLITS, "num_heads": (6, 3, 3)}))
    first, ours, second, plain = pair(steepest.MuAdam, layouts, state_bits=8, backend=backend)
    train(first, ours, second, plain)
    assert any(t.dtype is torch.uint8 for t in first.state[ours[0]].values())
    assert all_same_bits([gathered(p.detach()) for p in ours], plain)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups, splits", [(4, (8, 8, 8)), (2, (16, 4, 4))], ids=["heads", "grouped queries"])
def test_a_step_of_muon_in_fp64(groups: int, splits: tuple[int, ...], transposed: bool) -> None:
    """W <- (1 - lr decay) W - lr sqrt(max(1, rows / cols)) U V^T, of all rows of a split that a plain index gathers."""
    shape, lr, decay = (24, 7), 0.1, 0.2
    w, g = noise(shape, 0, torch.float64), noise(shape, 1, torch.float64)
    p = nn.Parameter(w.mT.contiguous() if transposed else w.clone())
    p.grad = g.mT.contiguous() if transposed else g
    layout = {"split_sizes": splits, "interleaved": groups, "transposed": transposed}
    steepest.Muon([{"params": [p], **layout}], lr=lr, weight_decay=decay, polar="svd").step()
    wanted, size = (1 - lr * decay) * w, 24 // groups
    before = 0
    for split in splits:
        of_group = split // groups
        rows = [group * size + before + i for group in range(groups) for i in range(of_group)]
        before += of_group
        u, _, vh = torch.linalg.svd(g[rows], full_matrices=False)
        wanted[rows] -= lr * max(1, split / 7) ** 0.5 * (u @ vh)
    torch.testing.assert_close(p.detach().mT if transposed else p.detach(), wanted, rtol=1e-10, atol=1e-12)


# ---- resume, compiled steps, reports --------------------------------------------------------------------------------


def interleaved(cls: type[MatrixOptimizer], **values: Any) -> Make:
    def make() -> tuple[MatrixOptimizer, list[nn.Parameter]]:
        first, ours, _, _ = pair(cls, **values)
        return first, ours

    return make


#: State by element, row, matrix and factor, and a submatrix; the others look closer.
QUICK = (steepest.MuAdam, steepest.NorMuon, steepest.NAMO, steepest.KLShampoo, steepest.Dion2)


@pytest.mark.parametrize("cls", [cls if cls in QUICK else slow(cls) for cls in CLASSES], ids=name_of)
def test_resume_is_exact(cls: type[MatrixOptimizer]) -> None:
    check_resume_and_bad_gradients(interleaved(cls))


@pytest.mark.slow
@pytest.mark.parametrize("cls", [steepest.Muon, steepest.MuAdam, steepest.NorMuon, steepest.Scion], ids=name_of)
def test_compiled_steps(cls: type[MatrixOptimizer]) -> None:
    check_compiled_step(interleaved(cls))


@pytest.mark.slow
def test_a_functionalized_step_keeps_what_is_beside_a_split() -> None:
    """aot_eager replaces every write into a view by a new tensor of the whole."""
    torch._dynamo.reset()
    (optimizer, ours), (other, theirs) = interleaved(steepest.MuAdam)(), interleaved(steepest.MuAdam)()
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    for i in range(2):
        for number, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = noise(p.shape, 10 * i + number)
            q.grad = p.grad.clone()
        step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_metrics_are_those_of_gathered_rows() -> None:
    first, ours, second, plain = pair(steepest.Muon)
    train(first, ours, second, plain)
    found, wanted = first.metrics(), second.metrics()
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-5, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}")


def test_the_clip_of_attention_logits() -> None:
    """Four query heads of two keys, Megatron's order, clipped as with all queries before all keys."""
    layouts = (((16, 6), {"split_sizes": (8, 4, 4)}),)
    weights = []
    for groups in (2, 1):
        w, g = noise((16, 6), 0), noise((16, 6), 1)
        rows = (w, g) if groups > 1 else tuple(gathered(t, (8, 4, 4), 2) for t in (w, g))
        p = nn.Parameter(rows[0].clone())
        optimizer = steepest.Muon([{"params": [p], **layouts[0][1], "interleaved": groups}])
        layer = AttentionLayer.fused(p, num_heads=4, num_kv_heads=2, interleaved=groups > 1)
        clip = steepest.QKClip(optimizer, {"attention": layer}, threshold=10.0)
        clip.observe("attention", torch.tensor([40.0, 5.0, 20.0, 10.0]))
        p.grad = rows[1]
        optimizer.step()
        weights.append(p.detach() if groups == 1 else gathered(p.detach(), (8, 4, 4), 2))
    assert all_same_bits(*([t] for t in weights))


def test_it_is_routed_and_shown() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.num_query_groups = 4, 2
            self.linear_qkv = nn.Linear(8, 64, bias=False)

    model = nn.ModuleDict({"attention": Attention()})
    layouts = fused_layouts(model)
    assert layouts == {"attention.linear_qkv.weight": {"split_sizes": (32, 16, 16), "interleaved": 2}}
    optimizer = steepest.Muon(steepest.param_groups(model, overrides=layouts))
    assert optimizer.param_groups[0]["interleaved"] == 2
    assert "2 matrices (16, 8)" in optimizer.describe()


# ---- what it is not for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, message",
    [
        ({"interleaved": 0}, "interleaved should be a whole number of at least 1 but is: 0"),
        ({"interleaved": 2.0}, "interleaved should be a whole number of at least 1 but is: 2.0"),
        ({"interleaved": True}, "interleaved should be a whole number of at least 1 but is: True"),
        ({"interleaved": 4}, "interleaved=4 says in how many groups the splits lie: give split_sizes"),
        ({"interleaved": 5, "split_sizes": SPLITS}, r"interleaved=5 does not divide the split of 12 rows"),
        ({"interleaved": 2, "split_sizes": (3, 2), "split_columns": True}, "leave out split_columns=True"),
    ],
)
def test_what_is_no_layout_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        steepest.Muon([{"params": [nn.Parameter(torch.zeros(ROWS, 5))], **values}])


def test_a_checkpoint_from_before_is_read() -> None:
    optimizer, ours, _, _ = pair(steepest.Muon, LAYOUTS[:1])
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["interleaved"]
    optimizer.load_state_dict(saved)
    ours[0].grad = noise(ours[0].shape, 5)
    optimizer.step()


def test_a_view_of_too_many_dimensions_goes_by_torch_operations() -> None:
    """Images' weights in channels_last have four dimensions that do not merge, and a split has one more."""
    shape, layout = (ROWS, 2, 3, 3), {"split_sizes": SPLITS, "interleaved": GROUPS}
    steps = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        p = nn.Parameter(noise(shape, 0).to(memory_format=memory_format))
        optimizer = steepest.Muon([{"params": [p], **layout}], lr=0.1)
        p.grad = noise(shape, 1).to(memory_format=memory_format)
        optimizer.step()
        steps.append(p.detach() - noise(shape, 0))
    assert relative(*steps) < 1e-5
    p = nn.Parameter(noise(shape, 0).to(memory_format=torch.channels_last))
    forced = steepest.Muon([{"params": [p], **layout}], backend="cpu")
    p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match="a tensor is not contiguous and has more than 3 dimensions"):
        forced.step()
