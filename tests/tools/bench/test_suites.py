"""Every suite on a CPU: what it measures, that it is right before it is timed, and what is said where it is not."""

from __future__ import annotations

import math
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from steepest import zoo
from steepest.linalg.polar import compute_dtype
from steepest.linalg.polar import polar as polar_of
from steepest.ops import backend, cpu_chain
from steepest.tools import planner
from steepest.tools.bench import ceilings, optimizers, timing, training
from steepest.tools.bench.case import Job, Settings
from steepest.tools.bench.ceilings import Ceilings
from steepest.tools.bench.suites import SUITES, launch, memory, polar, refresh, symm_gemm
from steepest.tools.compare import text
from support.pretended_gpu import pretended
from support.singular_values import gaussian
from support.slow import slow

CEILINGS = Ceilings({"float32": 1e12, "bfloat16": 1e12, "float16": 1e12}, 1e11)
QUICK = Settings(quick=True, rounds=3, seconds=0.0, peers=False, compiled=False)
Rows = dict[tuple[str, str], dict[str, Any]]


def run(suite: str, settings: Settings = QUICK, **options: Any) -> Rows:
    """By case and variant."""
    settings = replace(settings, options=options)
    rows = [row for job in SUITES[suite](settings) for row in job.run(CEILINGS)]
    return {(row["case"], row["variant"]): row for row in rows}


def all_timed(rows: Rows, without: tuple[str, ...] = ()) -> None:
    for (_, variant), row in rows.items():
        assert row["status"] == "ok", row
        if variant not in without:
            assert row["ms"] > 0
            assert row["spread_ms"] >= 0
            assert row["ratio"] > 0
            assert row["rounds"] == 3


def test_polar() -> None:
    rows = run("polar", replace(QUICK, shapes=["2x32x64", "64x32"]))
    all_timed(rows)
    assert {case for case, _ in rows} == {"2x32x64", "1x64x32"}
    presets = {f"polar {preset}" for preset in ("auto", "exact", "turbo", "jordan")}
    assert {variant for _, variant in rows} == {"torch.optim.Muon", "torch.bmm", *presets}
    for (_, variant), row in rows.items():
        assert row["tflop_per_s"] > 0
        assert 0 < row["of_products"] < 1
        if variant != "torch.bmm":
            assert 0 < row["relative_error"] < 0.4
            assert 0 < row["off_diagonal"] < 0.05
    # Five steps of one product of m x m and two of m x n.
    assert rows["2x32x64", "torch.optim.Muon"]["gflop"] == pytest.approx(
        5 * 2 * (2 * 32**2 * 64 + 32**3) * 2 / 1e9, rel=1e-3
    )
    # Where the chain is compiled, the two symmetric ones are triangles. In fp32 the form is that of "exact".
    whole, triangles = (
        rows["2x32x64", "torch.optim.Muon"]["gflop"],
        5 * 2 * (32 * 33 * (64 + 32) + 2 * 32**2 * 64) / 1e9,
    )
    dtype, found = compute_dtype("jordan", torch.float32, "cpu"), rows["2x32x64", "polar jordan"]["gflop"]
    if dtype == torch.float32:
        assert found == rows["2x32x64", "polar exact"]["gflop"] < whole
    else:
        assert found == pytest.approx(triangles if cpu_chain.compiled(dtype) else whole, rel=1e-3)


def test_one_wrong_tile_of_the_last_matrix_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(x: torch.Tensor, preset: str = "auto", **options: Any) -> torch.Tensor:
        if preset == "exact":
            raise RuntimeError("no room")
        y = polar_of(x, preset, **options)
        if preset == "turbo":
            y[-1, :8, :8] = 0
        return y

    monkeypatch.setattr(polar.__globals__["linalg"], "polar", damaged)
    monkeypatch.setitem(polar.__globals__, "flop", lambda xs, preset: 1.0)
    rows = run("polar", replace(QUICK, shapes=["2x32x64"]))
    status = {variant: row["status"] for (_, variant), row in rows.items()}
    assert status["polar turbo"] == "WRONG"
    assert status["polar exact"] == "failed: RuntimeError: no room"
    assert status["polar auto"] == "ok"
    assert "ms" not in rows["2x32x64", "polar turbo"]
    assert rows["2x32x64", "polar turbo"]["relative_error"] > 0


def test_a_matrix_in_the_middle_is_looked_at_too() -> None:
    x = torch.stack([gaussian(16, 24, seed) for seed in range(3)]).float()
    y = polar_of(x, "svd")
    gate = polar.__globals__["Gate"]([x])
    assert gate([y])["relative_error"] < 1e-5
    y[1] *= 2
    assert gate([y])["relative_error"] == pytest.approx(1.0, rel=1e-5)


def test_work_on_a_gpu_is_what_its_plan_executes(monkeypatch: pytest.MonkeyPatch) -> None:
    device = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    stack = types.SimpleNamespace(is_cuda=True, shape=(3, 512, 2048), dtype=torch.float16, device=None)
    asked = planner.plan([planner.Stack(3, 512, 2048)], "auto").totals()["asked_flop"]
    assert asked <= polar.__globals__["flop"]([stack], "auto") < 2 * asked


def test_symmetric_products() -> None:
    rows = run("symm_gemm", replace(QUICK, shapes=["2x64x64"]))
    all_timed(rows)
    assert rows["2x64x64", "symm_gemm"]["asymmetry"] == 0
    assert rows["2x64x64", "symm_gemm"]["gflop"] == pytest.approx(rows["2x64x64", "torch.bmm"]["gflop"] / 2, rel=1e-3)
    with pytest.raises(ValueError, match="takes square matrices, as in 8x2048x2048, but got 2x64x32"):
        run("symm_gemm", replace(QUICK, shapes=["2x64x32"]))


def test_a_tile_that_is_not_written_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def lazy(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor, symmetric: bool) -> torch.Tensor:
        out[:, 8:] = (a @ b)[:, 8:]
        return out

    monkeypatch.setitem(symm_gemm.__globals__, "gemm", lazy)
    rows = run("symm_gemm", replace(QUICK, shapes=["2x16x16"]))
    assert rows["2x16x16", "symm_gemm"]["status"] == "WRONG"


def chains(long: float, short: float) -> list[dict[str, Any]]:
    shared = {"suite": "symm_gemm", "case": "x", "dtype": "float16", "ours": True, "version": "", "status": "ok"}
    times = {"torch.bmm": 4.0, "chain of 10": long, "chain of 2": short}
    return [
        {**shared, "variant": name, "ms": ms, "spread_ms": 0.1, "relative_error": 0.0} for name, ms in times.items()
    ]


def test_one_product_of_a_chain_is_a_difference() -> None:
    of = symm_gemm.__globals__["one_of_a_chain"]
    (row,) = of(chains(12.0, 4.0), 1e9, CEILINGS)
    assert (row["variant"], row["ms"], row["ratio"], row["base"]) == ("one of a chain", 1.0, 4.0, "torch.bmm")
    assert row["tflop_per_s"] == 1.0
    (row,) = of(chains(4.0, 4.0), 1e9, CEILINGS)
    assert row["status"] == "failed: less than the noise"
    assert of(chains(4.0, 4.0)[:2], 1e9, CEILINGS) == []


@pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")
@pytest.mark.parametrize("length", [2, 10])
def test_the_chain_of_products(length: int) -> None:
    """(X X^T)^2 X, whatever the number of products."""
    x = torch.stack([gaussian(16, 16, seed) for seed in range(2)]).half() / 4
    y = symm_gemm.__globals__["run_chain"](x, torch.empty_like(x), length)
    exact = torch.linalg.matrix_power(x.double() @ x.double().mT, 2) @ x.double()
    assert (y.double() - exact).norm() < 2e-3 * exact.norm()


@pytest.mark.skipif(backend.extension is None, reason=f"{backend.extension_reason}")
def test_products_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product alone and two chains stand there, right, and what one product more takes is their difference."""
    monkeypatch.setattr(symm_gemm.__globals__["polar_chain"], "supports", lambda x, constants: True)
    rows = run("symm_gemm", replace(QUICK, shapes=["2x16x16"], dtypes=[torch.float16]))
    for chain in ("grouped_gemm", "chain of 10", "chain of 2"):
        assert rows["2x16x16", chain]["status"] == "ok"
        assert 0 < rows["2x16x16", chain]["relative_error"] < 2e-3
    assert ("2x16x16", "one of a chain") in rows


def test_compiled_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are asked for, and of a step only of few matrices."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    compiled = replace(QUICK, compiled=True, shapes=["2x16x24"])
    for suite in ("polar", "step"):
        rows = run(suite, compiled)
        assert rows["2x16x24", "torch.optim.Muon compiled"]["ms"] > 0
    few, many = optimizers.parse("64x16x24"), optimizers.parse("65x16x24")
    assert "torch.optim.Muon compiled" in optimizers.muons(compiled, few)
    assert "torch.optim.Muon compiled" not in optimizers.muons(compiled, many)


def test_small_matrices() -> None:
    rows = run("small")
    all_timed(rows)
    assert {variant for _, variant in rows} == {
        *("torch.optim.Muon", "polar auto, stack by stack", "polar auto, one call")
    }


def test_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steepest.linalg.polar.choice.native_bf16", lambda: True)  # torch.optim.Muon computes in bf16
    rows = run("step", whole=True)
    all_timed(rows)
    found = {variant: row for (case, variant), row in rows.items() if case == "tiny whole"}
    assert {"torch.optim.Muon", "Muon", "Muon exact", "Muon auto", "MuAdam turbo"} <= set(found)
    assert all(0 < row["relative_error"] < 0.4 for row in found.values())
    # The same products in the same dtype, whose sums may go in another order.
    assert found["Muon"]["relative_error"] == pytest.approx(found["torch.optim.Muon"]["relative_error"], abs=2e-3)
    assert found["Muon"]["base"] == "torch.optim.Muon"
    # Where a gradient has no rank SOAP divides rounding by rounding, and the fused momentum rounds otherwise.
    assert rows["tiny whole SOAP", "SOAP"]["off_the_parts"] < 1e-3


def test_a_wrong_direction_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step twice too long."""
    twice = optimizers.Method(lambda a, b: [zoo.Muon(a, lr=2e-3)], "muon")
    monkeypatch.setattr(optimizers, "MUONS", {"Muon": twice})
    rows = run("step", replace(QUICK, shapes=["4x8x16"]))
    assert rows["4x8x16", "Muon"]["status"] == "WRONG"
    assert rows["4x8x16", "Muon"]["relative_error"] > 0.7
    assert "ms" in rows["4x8x16", "torch.optim.Muon"]


def test_an_optimizer_that_fails_in_a_step_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise TypeError("unexpected")

    monkeypatch.setattr(optimizers, "MUONS", {"broken": optimizers.Method(broken, "muon")})
    rows = run("step", replace(QUICK, shapes=["2x8x16"]))
    assert rows["2x8x16", "broken"]["status"] == "failed: TypeError: unexpected"
    assert rows["2x8x16", "torch.optim.Muon"]["ms"] > 0


def test_a_peers_scale_is_its_own_and_so_are_its_gradients() -> None:
    class Peer(torch.optim.SGD):
        """Muon of another scale, which writes into gradients and drops them."""

        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                p.data.add_(polar_of(p.grad, "svd"), alpha=-0.7)
                p.grad.zero_()
                p.grad = None

    methods = {"peer": optimizers.Method(lambda a, b: [Peer(a, lr=1.0)], "normed", ours=False)}
    errors = optimizers.direction_errors(methods, [(8, 16)], "cpu")["peer"]
    assert errors["relative_error"] < 1e-5
    problem = optimizers.Problem(optimizers.parse("2x8x16"), "cpu")
    before = [p.grad for p in problem.params]
    values = [g.clone() for g in problem.grads]
    found = problem.variant(methods["peer"], errors)
    for _ in range(2):
        found.call.prepare()
        assert all(p.grad.norm() > 0 for p in problem.params)
        found.run()
    assert all(torch.equal(a, b) for a, b in zip(before, values))


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not essential first, and never the baseline and one of ours."""
    model = optimizers.parse("4x8x16")
    settings = replace(QUICK, device="cuda")
    found = {optimizers.BASE: optimizers.TORCH, **optimizers.MUONS}
    size = 4 * 4 * 8 * 16
    for room, left in ((100, len(found)), (10, 3), (0, 2)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda room=room: (room * size, 0))
        chosen = optimizers.fitting(found, model, settings)
        assert list(chosen) == list(found)
        kept = {name for name, method in chosen.items() if not method.skip}
        assert len(kept) == left
        assert {optimizers.BASE, "Muon auto"} <= kept
    assert optimizers.fitting(found, model, QUICK) == found
    skipped = {"Muon": optimizers.Method(optimizers.ours(zoo.Muon), "muon", skip="no memory beside the others")}
    monkeypatch.setattr(optimizers, "MUONS", skipped)
    rows = run("step", replace(QUICK, shapes=["2x8x16"]))
    assert rows["2x8x16", "Muon"]["status"] == "skipped: no memory beside the others"


def test_refreshes_and_roots() -> None:
    rows = run("refresh", replace(QUICK, shapes=["2x16"], guard=100.0))
    all_timed(rows, without=("no refresh",))
    assert {case for case, _ in rows} == {
        f"2x16 {part}" for part in ("products", "averages", "refresh", "roots p=2", "roots p=4")
    }
    whitening = {variant: row["whitening"] for (case, variant), row in rows.items() if case == "2x16 refresh"}
    assert whitening["jr"] < whitening["torch sorted QR"] < whitening["no refresh"]
    assert 0 < rows["2x16 roots p=4", "inverse_root"]["residual"] < 1e-3
    assert rows["2x16 refresh", "jr"]["base"] == "torch sorted QR"
    with pytest.raises(ValueError, match="'gpt2' of refresh is not COUNTxSIZE, as 64x1024 is"):
        run("refresh", replace(QUICK, shapes=["gpt2"]))


def test_a_refresh_that_is_wrong_and_baselines_that_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    space = refresh.__globals__
    refreshed = space["eigh_refresh"]
    damaged = types.SimpleNamespace(basis=torch.ones(2, 16, 16))
    monkeypatch.setitem(
        space, "eigh_refresh", lambda *a, method, **k: damaged if method == "jr" else refreshed(*a, method=method, **k)
    )
    rows = run("refresh", replace(QUICK, shapes=["2x16"], guard=0.0))
    found = {variant: row for (case, variant), row in rows.items() if case == "2x16 refresh"}
    assert found["jr"]["status"] == "WRONG"
    assert found["torch sorted QR"]["status"].startswith("skipped: about 0.0 s, more than --guard 0")
    assert found["qr"]["base"] == "qr"  # the first that was timed
    assert found["auto"]["ratio"] > 0


def test_the_elementwise_part() -> None:
    rows = run("fused", replace(QUICK, shapes=["tiny"]), elements=[10_000])
    all_timed(rows)
    ops = {variant for case, variant in rows if case == "10,000 elements"}
    assert ops == {
        "copy",
        "grad_stats Muon",
        "update_moments Muon",
        "apply_update Muon",
        "update_moments MuAdam",
        "apply_update MuAdam",
        "update_moments AdamW",
    }
    assert {variant for case, variant in rows if case == "tiny AdamW"} == {"torch fused AdamW", "AdamW"}
    assert rows["10,000 elements", "copy"]["mbyte"] == 0.08
    assert all(row["gb_per_s"] > 0 for row in rows.values())


def test_fused_ops_that_are_wrong_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUITES["fused"].__globals__, "parts_error", lambda *a, **k: {"off_the_parts": 0.1})
    rows = run("fused", replace(QUICK, shapes=["tiny"]), elements=[10_000])
    assert {row["status"] for row in rows.values() if row["ours"]} == {"WRONG"}


def test_memory_of_an_optimizer() -> None:
    rows = run("memory")
    assert {row["status"] for row in rows.values()} == {"ok"}
    found = {variant: row for (_, variant), row in rows.items()}
    # One fp32 average of the matrices and two of the rest; MuAdam has two of all.
    per_parameter = found["Muon auto"]["state_bytes_per_parameter"]
    matrices = optimizers.elements(optimizers.parse("tiny"), "matrix") / optimizers.elements(optimizers.parse("tiny"))
    assert per_parameter == pytest.approx(4 * matrices + 8 * (1 - matrices), rel=0.01)
    assert found["MuAdam auto"]["state_bytes_per_parameter"] == pytest.approx(8, rel=0.01)
    assert found["torch.optim.AdamW"]["state_bytes_per_parameter"] == pytest.approx(8, rel=0.01)
    assert found["torch.optim.Muon"]["ratio"] == 1
    assert all(row["extra_mib"] > 0 for variant, row in found.items() if variant != "torch.optim.AdamW")


def test_launches_of_a_step() -> None:
    rows = run("launch")
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert all(row["host_us"] > 0 for row in rows.values())
    by_operators = ("torch.optim.Muon", "Muon auto, fused update")  # others may be one call that is no operator
    assert all(row["operators"] > 0 for (_, variant), row in rows.items() if variant in by_operators)


@pytest.mark.parametrize("suite", [launch, memory])
def test_an_optimizer_that_fails_leaves_the_others(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise TypeError("unexpected")

    methods = {optimizers.BASE: optimizers.TORCH, "broken": optimizers.Method(broken, None, ours=False)}
    monkeypatch.setitem(suite.__globals__, "muons", lambda *_: methods)
    monkeypatch.setitem(suite.__globals__, "soaps", lambda *_: {})
    (job,) = suite(QUICK)
    statuses = [row["status"] for row in job.run(CEILINGS)]
    assert statuses[-2:] == ["ok", "failed: TypeError: unexpected"]


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 400)
    return path


def test_a_training_run(book: Path) -> None:
    rows = run("train", text=book)
    assert {variant for _, variant in rows} == set(training.METHODS)
    for row in rows.values():
        assert row["status"] == "ok"
        assert row["loss"] < row["first_loss"]
        assert [point[0] for point in row["points"]] == [0, 4, 8]
        assert 0 < row["optimizer_ms"] < row["ms"]
        assert row["optimizer_share"] == pytest.approx(row["optimizer_ms"] / row["ms"], abs=1e-3)
        assert row["tokens_per_s"] == pytest.approx(8 * 32 / (row["ms"] / 1e3), rel=1e-3)
        assert "book.txt" in row["text"]
    muon = rows["1x32 GPT, 8 x 32 bytes", "Muon"]
    assert len(muon["slack"]) == 6
    assert all(len(values) == 2 and min(values) >= 1 for values in muon["slack"].values())
    assert muon["slack_least"] <= muon["slack_median"]
    assert sum(muon["auto_tables"]) == pytest.approx(1, abs=1e-3)


def test_slack_goes_by_the_name_of_its_matrix() -> None:
    """It is that of the momentum, which after one step without Nesterov's look ahead is the gradient."""
    names = ("a", "b", "c", "d")
    model = nn.Module()
    for number, name in enumerate(names):
        shape = (16, 24) if number % 2 else (24, 16)
        model.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        spectrum = torch.diag(torch.linspace(1, 1 + 10 * number, 16))
        grad = gaussian(16, 16, number).float() @ spectrum @ gaussian(16, 24, number + 9).float()
        getattr(model, name).grad = grad.mT.contiguous() if shape[0] == 24 else grad
    groups = [{"params": list(model.parameters())}]
    optimizer = zoo.Muon(groups, lr=1e-3, polar="auto", nesterov=False)
    optimizer.step()
    found = training.polar_slack(model, [optimizer])
    for name in names:
        slack = torch.empty(1)
        polar_of(getattr(model, name).grad, slack=slack)
        assert found[name] == pytest.approx(slack.item(), rel=1e-2)
    assert len({round(value, 3) for value in found.values()}) == 4


def test_which_table_of_auto_a_slack_takes() -> None:
    """By what `steepest.polar` promises: from 2.26 on the first, from 1.54 on the second."""
    assert training.auto_tables([5.0, 2.27, 2.2, 1.55, 1.5, 1.0]) == [0.3333, 0.3333, 0.3333]


def test_all_methods_stop_together_and_one_that_fails_is_a_row(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = text.load(book, training.TINY.shape.context)

    def broken(*_: Any) -> Any:
        raise RuntimeError("no such thing")

    methods = {**training.METHODS, "broken": training.Method(broken, (1.0, 1.0))}
    monkeypatch.setattr(training, "METHODS", methods)
    names = [training.ADAMW, "Muon", "broken"]
    rows = training.train(names, {}, training.TINY, corpus, "cpu", toy=True, deadline=time.monotonic())
    assert [row["status"] for row in rows] == ["ok", "ok", "failed: RuntimeError: no such thing"]
    assert [row["steps"] for row in rows[:2]] == [1, 1]
    assert [point[0] for point in rows[0]["points"]] == [0, 1]
    assert rows[1]["base"] == training.ADAMW


def test_a_loss_that_is_not_finite_ends_a_run(book: Path) -> None:
    corpus = text.load(book, training.TINY.shape.context)
    rows = training.train([training.ADAMW, "Muon"], {"Muon": 1e30}, training.TINY, corpus, "cpu", toy=True)
    status = {row["variant"]: row["status"] for row in rows}
    assert status == {training.ADAMW: "ok", "Muon": "failed: the loss is not finite"}
    assert all(math.isfinite(point[2]) for row in rows for point in row["points"])
    assert "loss" not in rows[1]


def test_an_unknown_method_of_training() -> None:
    with pytest.raises(ValueError, match="method 'Adagrad' is not known; choose from torch fused AdamW"):
        run("train", methods=["Adagrad"])


class Event:
    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.now += 1500.0
        self.at = Event.now

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


def test_the_stopwatch_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = training.Stopwatch("cuda")
    for _ in range(3):
        watch.mark()
    assert watch.read() == [1.5, 1.5]
    assert watch.marks == []


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("quick", [True, False])
def test_what_a_gpu_would_be_given(suite: str, quick: bool) -> None:
    """Jobs are made without the device, so that a wrong option is found before anything runs."""
    jobs = list(SUITES[suite](replace(QUICK, device="cuda", quick=quick)))
    assert jobs
    assert all(isinstance(job, Job) and job.suite == suite for job in jobs)
    assert len({job.label for job in jobs}) == len(jobs)


SHAPES = {"polar": ["2x32x64"], "symm_gemm": ["2x32x32"], "small": ["2x16x24+2x32x32"], "refresh": ["2x16"]}


@pytest.mark.parametrize("suite", [suite if suite in SHAPES or suite == "step" else slow(suite) for suite in SUITES])
def test_the_harness_as_on_a_gpu(suite: str, book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is pretended: launches queue behind a busy GPU, graphs stand beside calls, nothing fails."""
    monkeypatch.setattr(timing, "FLUSH_BYTES", 1024)
    monkeypatch.setattr(optimizers, "graphed", lambda optimizer: optimizer)
    monkeypatch.setattr(training, "QUICK", training.TINY)
    monkeypatch.setitem(SUITES["train"].__globals__, "QUICK", training.TINY)
    dtypes = [torch.float32] if suite in ("polar", "symm_gemm", "small") else None  # half precision needs a real one
    shapes = SHAPES.get(suite, ["tiny"])
    with pretended(monkeypatch) as busy:
        settings = replace(QUICK, device="cuda", shapes=shapes, dtypes=dtypes, guard=100.0)
        rows = run(suite, settings, whole=True, elements=[10_000], text=book)
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert bool(busy) == (suite in ("polar", "symm_gemm", "refresh", "fused"))
    if suite not in ("symm_gemm", "fused", "train", "memory"):
        assert any(variant.endswith(", captured") for _, variant in rows)
    if suite == "launch":
        assert all(row["launches"] == 1 for row in rows.values())
    if suite == "memory":
        assert all(row["extra_mib"] == 1 for row in rows.values())
    if suite in ("polar", "step"):
        assert all(row["host_ms"] >= 0 for row in rows.values())


@pytest.mark.gpu
@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_on_a_gpu(suite: str, book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUITES["train"].__globals__, "QUICK", training.TINY)
    settings = replace(QUICK, device="cuda", shapes=SHAPES.get(suite, ["tiny"]), guard=100.0)
    rows = run(suite, settings, whole=True, elements=[100_000], text=book)
    assert {key: row["status"] for key, row in rows.items() if row["status"] != "ok"} == {}


@pytest.mark.gpu
def test_the_ceilings_of_a_gpu() -> None:
    found = ceilings.measure("cuda", rounds=3)
    assert found.products["bfloat16"] > 2 * found.products["float32"] > 0
    assert found.copy > 1e11
