"""`steepest compare`: the tasks, the runs and their records, what is reported of them, and the command as a whole."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import steepest
from steepest import zoo
from steepest.tools import cli
from steepest.tools.compare import evidence, full, images, methods, mushrooms, records, report, tasks, text, training
from steepest.tools.compare.gpt import Shape
from support.slow import slow
from support.training import KINDS

TINY = replace(
    tasks.QUICK,
    shape=Shape(layers=1, width=16, heads=2, context=16),
    windows=8,
    held_out_windows=8,
    rows=32,
    width=4,
    held_out_images=32,
)
KNOWN = methods.known()
#: A method for each way through a step, and torch's.
QUICK = {cls.__name__ for cls in KINDS} | {name for name in KNOWN if name.startswith("torch.")}


def made(name: str, book: Path | None = None) -> tasks.Task:
    return tasks.make([name], TINY, book, None)[name]


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 800)
    return path


# ---- what is trained ---------------------------------------------------------------------------------------------


def test_the_made_up_mushrooms_have_the_size_of_the_real_ones() -> None:
    table = mushrooms.made_up()
    assert table.x.shape == (8124, 112)
    assert sum(mushrooms.VALUES) == 112
    assert set(table.x.unique().tolist()) == {0.0, 1.0}
    assert table.x.sum(dim=1).unique().tolist() == [21.0]
    assert int(table.y.sum()) == 8124 // 2
    assert torch.equal(table.x, mushrooms.made_up().x)


def test_a_libsvm_file_is_read_as_the_tests_read_it(tmp_path: Path) -> None:
    path = tmp_path / "some.svm"
    path.write_text("1 3:1 112:2.5\n\n2 1:1\n2\n")
    table = mushrooms.load(path)
    wanted = torch.zeros(3, 112, dtype=torch.float64)
    wanted[0, 2], wanted[0, 111], wanted[1, 0] = 1.0, 2.5, 1.0
    assert torch.equal(table.x, wanted)
    assert table.y.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file; download mushrooms from LIBSVM, or leave it out"),
        ("1 3:1\n1 4:1\n", "1 classes; two are needed"),
        ("1 3:1\n2 four\n", "not a LIBSVM file of at most 112 features"),
        ("1 3:1\n2 113:1\n", "not a LIBSVM file of at most 112 features"),
    ],
)
def test_a_file_that_is_no_table_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.svm"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        mushrooms.load(path)


def test_scaled_mushrooms_are_the_same_function_of_other_variables() -> None:
    plain, scaled = made("mushrooms"), made("mushrooms-scaled")
    assert plain.evaluate(plain.create(3)) == pytest.approx(scaled.evaluate(scaled.create(3)), rel=1e-12)
    (x, y), (s, z) = (next(task.batches(1, 0)) for task in (plain, scaled))
    assert torch.equal(y, z)
    ratio = (s[:, x.any(dim=0)].amax(dim=0)).log()
    assert 0 < ratio.min() < 3
    assert 17 < ratio.max() < 20


def test_without_any_source_the_text_is_made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    corpus = text.load(None, 64)
    assert corpus.source == "made-up sentences"
    assert len(corpus.train) + len(corpus.validation) == 500_000
    assert text.sentences(5000) == text.sentences()[:5000]
    assert text.manual(64).source == "made-up sentences"


def test_a_small_batch_is_an_eighth_of_the_other(book: Path) -> None:
    large, small = (next(made(name, book).batches(1, 0))[0] for name in ("gpt", "gpt-small-batch"))
    assert large.shape == (8, 16)
    assert small.shape == (1, 16)


def test_fine_tuning_begins_where_training_on_another_text_ended(book: Path) -> None:
    """The same weights for every seed, which are not those of a run before; better than new ones on either text."""
    task, other = made("gpt-fine-tune", book), made("gpt", book)
    first, second = task.create(0), task.create(1)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    with torch.no_grad():
        next(first.parameters()).zero_()
    assert next(second.parameters()).any()
    assert other.evaluate(task.create(0)) < 0.8 * other.evaluate(other.create(0))
    assert task.evaluate(task.create(0)) != other.evaluate(task.create(0))
    assert task.described.endswith(f"after 40 steps of AdamW on {other.described}")


def test_made_up_images_are_ten_shapes_that_differ() -> None:
    drawn = images.made_up(500)
    assert drawn.x.shape == (500, 1, 16, 16)
    assert drawn.y.unique().tolist() == list(range(10))
    assert torch.equal(drawn.x, images.made_up(500).x)
    assert not torch.equal(drawn.x, images.made_up(500, 1).x)
    line = torch.linspace(-1, 1, 16)
    inside = [shape(*torch.meshgrid(line, line, indexing="xy")) > 0 for shape in images.SHAPES]
    assert all(20 < int(each.sum()) < 180 for each in inside)
    assert len({tuple(each.flatten().tolist()) for each in inside}) == 10


def test_convolutions_are_the_methods_and_the_head_is_adamws() -> None:
    model = images.ConvNet.create(4, 0)
    groups = KNOWN["Muon"].build(model, 0.1, True).param_groups
    assert [p.ndim for group in groups if group["use_muon"] for p in group["params"]] == [4, 4, 4]
    assert model(images.made_up(3).x).shape == (3, 10)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), images.ConvNet.create(4, 0).parameters()))


# ---- who trains it -----------------------------------------------------------------------------------------------


def test_every_optimizer_of_the_zoo_is_compared() -> None:
    exported = {name: getattr(zoo, name) for name in zoo.__all__}
    optimizers = {
        n for n, kind in exported.items() if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    }
    made = {method.kind.__name__ for method in KNOWN.values()}
    assert set(KNOWN) - optimizers == {"torch.AdamW", "torch.SGD", "torch.Muon", *methods.VARIANTS}
    assert optimizers - made == {"Momo"}  # a part of one


def test_torchs_muon_has_adamw_beside_it(book: Path) -> None:
    """Both step what they would alone, at the rates of a schedule; without a matrix it says why it cannot."""
    task = made("gpt", book)
    model, alone = task.create(0), task.create(0)
    optimizer = KNOWN["torch.Muon"].build(model, 0.02, True, adamw_lr=1e-3)
    matrices = alone.hidden_matrices()  # type: ignore[operator]
    rest = [p for p in alone.parameters() if id(p) not in {id(q) for q in matrices}]
    pair = [torch.optim.Muon(matrices, lr=0.02, weight_decay=0), torch.optim.AdamW(rest, lr=1e-3, weight_decay=0)]
    for batch in task.batches(3, 0):
        for each, optimizers in ((model, [optimizer]), (alone, pair)):
            each.zero_grad()
            task.loss(each, batch).backward()
            for some in optimizers:
                some.step()
                for group in some.param_groups:
                    group["lr"] *= 0.5
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), alone.parameters(), strict=True))
    record = training.train(made("images"), KNOWN["torch.Muon"], 0.02, 3, 0)
    assert (
        record["reason"]
        == "ValueError: torch.optim.Muon takes parameters of two dimensions, and all of these are AdamW's"
    )


#: Those that train the convolutional net in every run; the others do in the slow ones.
QUICK_METHODS = ("torch.AdamW", "MuAdam", "SOAP", "Schattor")


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK_METHODS else pytest.param(name, marks=pytest.mark.slow)
        for name in KNOWN
        if name != "torch.Muon"
    ],
)
def test_a_method_trains_the_convolutional_net(name: str) -> None:
    """At the smallest rate of five, in few steps: what is seen goes down or stands nearly still."""
    task, method = made("images"), KNOWN[name]
    record = training.train(task, method, method.grid("images", 5)[0], 6, 0, 2)
    assert record["reason"] is None
    assert record["loss"] < 1.2 * record["first_loss"]


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in KNOWN])
def test_a_method_steps_every_parameter_and_lowers_the_loss(name: str, book: Path) -> None:
    """At the smallest rate of three, in few steps."""
    task, method = made("gpt", book), KNOWN[name]
    model = task.create(0)
    stepped = [p for group in method.build(model, 1e-3, task.routed).param_groups for p in group["params"]]
    assert len(stepped) == len(list(model.parameters())) == len({id(p) for p in stepped})
    record = training.train(task, method, method.grid("gpt", 3)[0], 12, 0, 2)
    assert record["reason"] is None
    assert record["loss"] < record["first_loss"]


@pytest.mark.parametrize("name", KNOWN)
def test_a_method_takes_every_matrix_of_the_classifier(name: str) -> None:
    task, method = made("mushrooms"), KNOWN[name]
    groups = method.build(task.create(0), 1e-3, task.routed).param_groups
    assert [p.ndim for group in groups if group.get("use_muon", True) for p in group["params"]] == [2, 2]
    assert training.train(task, method, 1e-9, 3, 0, 1)["reason"] is None


def test_what_a_matrix_method_leaves_to_adamw_has_one_learning_rate() -> None:
    groups = KNOWN["Muon"].build(made("gpt").create(0), 0.5, True).param_groups
    assert {group["lr"] for group in groups if group["use_muon"]} == {0.5}
    assert {group["lr"] for group in groups if not group["use_muon"]} == {methods.ADAMW_RATE}


def test_grids_are_powers_around_the_middle() -> None:
    grid = KNOWN["Muon"].grid("gpt", 5)
    assert grid[2] == methods.RATES["Muon"][0]
    assert all(b / a == pytest.approx(4, rel=1e-2) for a, b in zip(grid, grid[1:]))
    unknown = methods.Method("New", steepest.MuAdam)
    assert unknown.grid("mushrooms", 1) == [1e-3]


# ---- a run and its record ----------------------------------------------------------------------------------------


def test_a_record_is_repeated_by_the_same_seed_and_survives_json() -> None:
    task = made("mushrooms")
    one, other, third = (training.train(task, KNOWN["MuAdam"], 5e-3, 8, seed, 4) for seed in (0, 0, 1))

    def losses(record: training.Record) -> list[Any]:
        return [(step, loss, held_out) for step, _, loss, held_out in record["points"]]

    assert losses(one) == losses(other) != losses(third)
    assert [point[0] for point in one["points"] if point[3] is not None] == [0, 2, 4, 6, 8]
    assert json.loads(json.dumps(one)) == {**one, "points": [list(point) for point in one["points"]]}
    assert 0 < one["optimizer_ms"] < one["step_ms"]
    assert one["adamw_lr"] == methods.ADAMW_RATE
    assert one["loss"] == one["points"][-1][3]


@pytest.mark.parametrize(
    ("name", "numbers"), [("torch.SGD", 1), ("torch.AdamW", 2), ("torch.Muon", 1), ("Muon", 1), ("MuAdam", 2)]
)
def test_the_state_of_a_weight_is_counted_for_the_methods_matrices(name: str, numbers: int, book: Path) -> None:
    """Four bytes a number; a clock or the like of a matrix adds little."""
    task = made("gpt", book)
    record = training.train(task, KNOWN[name], 1e-3, 3, 0)
    assert 4 * numbers <= record["state_bytes"] < 4 * numbers + 1.5


def test_a_run_that_diverges_or_fails_says_so() -> None:
    task = made("mushrooms")
    record = training.train(task, methods.Method("SGD", torch.optim.SGD), 1e200, 8, 0)
    assert (record["status"], record["loss"]) == ("diverged", None)
    broken = methods.Method("Muon", steepest.Muon, {"ns_steps": 1000})
    record = training.train(task, broken, 0.1, 8, 0)
    assert record["status"] == "failed"
    assert record["reason"].startswith("ValueError: Number of steps must be less than 100")


def test_splus_is_held_to_its_averages() -> None:
    """Its held-out loss is that of the averaged weights; training goes on from the weights themselves."""
    task = made("mushrooms")
    averaged = training.train(task, methods.Method("SPlus", steepest.SPlus, {"average_rate": 0.9}), 0.5, 8, 0, 8)
    plain = training.train(task, methods.Method("SPlus", steepest.SPlus, {"average_rate": 0.0}), 0.5, 8, 0, 8)
    assert [p[2] for p in averaged["points"]] == [p[2] for p in plain["points"]]
    assert averaged["points"][1][3] == plain["points"][1][3]
    assert averaged["points"][-1][3] != plain["points"][-1][3]


@pytest.fixture(scope="module")
def table() -> Path:
    default = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "mushrooms.svm"
    path = Path(os.environ.get("STEEPEST_DATA", default))
    path = path / "mushrooms.svm" if path.is_dir() else path
    if not path.is_file():
        pytest.skip(f"no LIBSVM mushrooms at {path}: download it there or set STEEPEST_DATA")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name, invariant", [("MuAdamSANIA", True), ("Muon", False), ("torch.AdamW", False)])
def test_scaling_the_features_of_mushrooms(name: str, invariant: bool, table: Path) -> None:
    """The experiment of arXiv:2510.10777 on LIBSVM's file; observed gap of MuAdamSANIA: 1e-15."""
    curves = []
    for task in tasks.make(["mushrooms", "mushrooms-scaled"], tasks.Size(), None, table).values():
        record = training.train(task, KNOWN[name], KNOWN[name].grid(task.name, 1)[0], 100, 0, 10)
        curves.append([point[3] for point in record["points"] if point[3] is not None])
    plain, scaled = curves
    gap = max(abs(b / a - 1) for a, b in zip(plain, scaled))
    assert plain[-1] < 0.9 * plain[0]
    assert gap < 1e-12 if invariant else gap > 1e-1


# ---- the report --------------------------------------------------------------------------------------------------


def run(lr: float, loss: float | None, optimizer: str = "A", first: float = 2.0) -> training.Record:
    status = "done" if loss is not None else "diverged"
    return {
        "task": "t",
        "optimizer": optimizer,
        "lr": lr,
        "loss": loss,
        "first_loss": first,
        "status": status,
        "reason": None,
        "step_ms": 1.0,
        "optimizer_ms": 0.5,
        "points": [[0, 0.0, None, first], [5, 0.1, 1.5, loss]],
    }


def test_sensitivity_and_good_rates() -> None:
    """Losses 1.5, 1.0, 5 (counts as 2) and a divergence (2): the mean of .5, 0, 1 and 1; 1.1 is good enough."""
    runs = [run(1, 1.5), run(2, 1.0), run(4, 5.0), run(8, None)]
    (found,) = report.summaries(runs)["t"]
    assert found.sensitivity == pytest.approx((0.5 + 0 + 1 + 1) / 4)
    assert found.good_rates == 1
    assert not found.at_the_edge
    (found,) = report.summaries([run(1, 1.1), run(2, 1.0)])["t"]
    assert found.good_rates == 2
    assert found.at_the_edge
    (found,) = report.summaries([run(1, 3.0), run(2, 4.0)])["t"]
    assert (found.sensitivity, found.good_rates, found.at_the_edge) == (None, 0, False)
    (found,) = report.summaries([run(1, None)])["t"]
    assert (found.best, found.sensitivity, found.good_rates) == (None, None, 0)


def test_the_table_has_the_best_first_and_the_csv_the_same_rows(tmp_path: Path) -> None:
    runs = [run(1, 1.5), run(2, 1.0), run(3, 1.2), run(1, None, "B"), run(1, 0.5, "C")]
    runs.append({**run(1, None, "D"), "status": "failed", "reason": "ValueError: no"})
    found = report.summaries(runs)
    assert [each.optimizer for each in found["t"]] == ["C", "A", "B", "D"]
    printed = report.table(found)
    assert "diverged" in printed
    assert printed.endswith("D on t: ValueError: no")
    report.write_csv(tmp_path / "table.csv", found)
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["optimizer"] for row in rows] == ["C", "A", "B", "D"]
    assert (rows[1]["learning_rate"], rows[1]["loss"], rows[1]["good_rates"]) == ("2", "1.0000", "1/3")


# ---- the whole comparison ----------------------------------------------------------------------------------------


def searched(losses: Callable[[int], float]) -> dict[int, float]:
    """The falls by place, as far as they are looked for."""
    falls: dict[int, float] = {}
    while (place := full.next_place(falls)) is not None:
        assert place not in falls
        falls[place] = losses(place)
    return falls


@pytest.mark.parametrize("best", range(-4, 5))
@pytest.mark.parametrize("width", [0.3, 1.0])
def test_a_grid_grows_until_it_encloses_the_best_rate(best: int, width: float) -> None:
    """Falls like a parabola over the logarithm of the rate, and runs that diverge four places above its top."""
    falls = searched(lambda place: -float("inf") if place > best + 4 else 3 - 0.1 * ((place - best) / width) ** 2)
    assert sorted(falls) == list(range(min(falls), max(falls) + 1))
    assert min(falls) < best < max(falls)
    assert max(falls, key=falls.__getitem__) == best
    assert max(falls[min(falls)], falls[max(falls)]) < 0.98 * 3


def test_a_flat_grid_grows_on_both_sides_of_its_best() -> None:
    falls = searched(lambda place: 1.001 if place == -1 else 1.0 - 1e-6 * place)
    assert -1 - min(falls) in (4, 5)
    assert max(falls) + 1 in (4, 5)


def test_a_grid_ends_where_no_rate_is_worse_and_goes_down_where_all_diverge() -> None:
    assert len(searched(lambda place: 1.0)) == full.MOST
    assert sorted(searched(lambda place: -float("inf"))) == list(range(1 - full.MOST, 1))
    assert min(searched(lambda place: -1.0 - place)) < 0  # the loss rose: lower is better


def runs_of(optimizer: str, losses: dict[float, float | None], seeds: tuple[float, ...] = ()) -> list[training.Record]:
    """A grid with seed 0, and other seeds at its best rate."""
    best = min((loss, lr) for lr, loss in losses.items() if loss is not None)[1]
    grid = [{**run(lr, loss, optimizer), "seed": 0} for lr, loss in losses.items()]
    again = [{**run(best, loss, optimizer), "seed": 1 + number} for number, loss in enumerate(seeds)]
    more = {"adamw_lr": 0.01, "steps": 5, "state_bytes": 8.0}
    return [{**record, **more} for record in (*grid, *again)]


def test_evidence_is_what_the_runs_say() -> None:
    """A loss that begins at 2: rates with 1.0 to 1.02 are good. AdamW ends at 1.1, which A reaches and B never."""
    reference = runs_of("torch.AdamW", {1: 1.9, 2: 1.1, 4: 1.9}, (1.0, 1.2))
    a = runs_of("A", {1: 1.5, 2: 1.014, 4: 1.0, 8: 1.013, 16: None}, (0.9, 1.1))
    b = [{**record, "step_ms": 3.0} for record in runs_of("B", {1: 1.2, 2: 1.9}, (1.3, 1.4))]
    failed = {**run(1, None, "D"), "status": "failed", "reason": "ValueError: no", "seed": 0}
    found = {row["optimizer"]: row for row in evidence.rows([*reference, *b, *a, failed])}
    assert list(found) == ["A", "torch.AdamW", "B", "D"]
    row = found["A"]
    assert (row["learning_rate"], row["loss"], row["lowest"], row["highest"]) == ("4", "1.0000", "0.9000", "1.1000")
    assert (row["band"], row["lowest_good"], row["highest_good"]) == ("4", "2", "8")
    assert (row["enclosed"], row["closed"], row["seeds"], row["steps_to_reference"]) == ("yes", "yes", "3/3", "5")
    assert row["tried"] == "1:1.5000 2:1.0140 4:1.0000 8:1.0130 16:diverged"
    assert (found["B"]["enclosed"], found["B"]["closed"], found["B"]["band"]) == ("no", "no", "1")
    assert (found["B"]["steps_to_reference"], found["B"]["step_ratio"]) == ("", "3.00")
    assert found["torch.AdamW"]["steps_to_reference"] == "5"
    assert (found["D"]["status"], found["D"]["loss"], found["D"]["tried"]) == ("failed", "", "1:failed")
    printed = evidence.table(list(found.values()))
    assert printed.splitlines()[0] == "t"
    assert "failed" in printed
    assert "*1" in printed


def test_a_seed_that_diverges_at_the_best_rate_is_not_averaged_away() -> None:
    runs = runs_of("torch.AdamW", {1: 1.9, 2: 1.1, 4: 1.9}, (1.0,))
    runs.append({**runs[-1], "seed": 2, "status": "diverged", "loss": None})
    (row,) = evidence.rows(runs)
    assert (row["status"], row["seeds"], row["loss"]) == ("diverged", "2/3", "1.0500")


@pytest.mark.slow
def test_the_whole_comparison_finds_rates_and_repeats_them_with_more_seeds(
    tmp_path: Path, book: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from steepest.tools.compare import command

    monkeypatch.setattr(command, "FULL", replace(TINY, tasks=("gpt", "images"), gpt_steps=3, image_steps=3))
    monkeypatch.setattr(full, "MOST", 4)
    out = tmp_path / "out"
    arguments = ["compare", "--full", "--text", str(book), "--out", str(out), "--optimizers", "muadam"]
    assert cli.main(arguments) == 0
    found = records.read(out / "runs.jsonl")
    with (out / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["task"], row["optimizer"]) for row in rows} == {
        (task, name) for task in ("gpt", "images") for name in ("MuAdam", "torch.AdamW")
    }
    rates = {row["task"]: row["learning_rate"] for row in rows if row["optimizer"] == "torch.AdamW"}
    for row in rows:
        runs = [r for r in found if (r["task"], r["optimizer"]) == (row["task"], row["optimizer"])]
        assert {r["seed"] for r in runs if f"{r['lr']:g}" == row["learning_rate"]} == {0, 1, 2}
        assert len(row["tried"].split()) == len([r for r in runs if r["seed"] == 0]) <= 4
        if row["optimizer"] == "MuAdam":
            assert row["adamw_rate"] == rates[row["task"]]
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["tasks"].keys() == {"gpt", "images"}
    assert len(provenance["machines"]) == 1
    assert provenance["machines"][0].keys() >= {"machine", "torch", "python", "steepest", "commit"}
    table = capsys.readouterr().out

    lines = (out / "runs.jsonl").read_text().splitlines(keepends=True)
    (out / "runs.jsonl").write_text("".join(lines[:5]))
    assert cli.main([*arguments, "--resume"]) == 0

    def outcomes(records: list[training.Record]) -> list[tuple[object, ...]]:
        return [(r["task"], r["optimizer"], r["lr"], r["seed"], r["adamw_lr"], r["loss"]) for r in records]

    assert outcomes(records.read(out / "runs.jsonl")) == outcomes(found)
    assert capsys.readouterr().out.splitlines()[0] == table.splitlines()[0] == "gpt"
    if "no pictures" not in table:
        assert (out / "images.png").read_bytes().startswith(b"\x89PNG")


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def compare(tmp_path: Path, book: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    from steepest.tools.compare import command

    monkeypatch.setattr(command, "QUICK", TINY)

    def call(*arguments: str) -> int:
        out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
        return cli.main(["compare", "--quick", "--text", str(book), "--threads", "1", *out, *arguments])

    return call


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_run(
    compare: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        compare("--optimizers", "muon", "--out", str(tmp_path / "file"))
    assert f"--out: nothing can be written into {tmp_path / 'file'}: File exists" in capsys.readouterr().err


def test_the_command_writes_records_table_and_pictures(
    compare: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    arguments = ["--optimizers", "muon,torch.adamw", "--steps", "4", "--rates", "Muon=0.02,0.08", "--rates", "1e-3"]
    assert compare(*arguments) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr()
    out = tmp_path / "out"
    found = records.read(out / "runs.jsonl")
    keys = {(record["task"], record["optimizer"], record["lr"]) for record in found}
    own = {("Muon", 0.02), ("Muon", 0.08), ("torch.AdamW", 1e-3)}
    assert keys == {(task, *each) for task in tasks.Size().tasks for each in own}
    assert "run 9/9" in printed.err
    with (out / "summary.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6
    assert "sensitivity" in printed.out
    if "no pictures" not in printed.out:
        for task in tasks.Size().tasks:
            assert (out / f"{task}.png").read_bytes().startswith(b"\x89PNG")


def test_the_axis_of_losses_points_up_whatever_the_runs_did() -> None:
    """It has what the best runs ended at, and the start; where all ended above it, more than the start."""
    pytest.importorskip("matplotlib")
    from steepest.tools.compare.pictures import limits

    for first, last in (
        ([2.0, 2.1], [0.5, 1.0]),
        ([2.0], [3.0]),
        ([2.0, 2.0], [3.0, 9.0]),
        ([2.0], [2.0]),
        ([0.0], [0.0]),
    ):
        low, high = limits(first, last)
        assert low < high
        assert low < min(*first, *last)
        assert high > (max(first) if min(last) < max(first) else max(last))


@pytest.mark.slow
def test_a_comparison_that_was_stopped_goes_on(
    compare: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--optimizers", "muadam,torch.sgd", "--steps", "3", "--tasks", "mushrooms"]
    path = tmp_path / "out" / "runs.jsonl"
    assert compare(*arguments) == 0
    whole = records.read(path)
    assert len(whole) == 6
    kept = "".join(path.read_text().splitlines(keepends=True)[:4])
    path.write_text(kept + '{"task": "mushrooms", "opti')
    with pytest.raises(SystemExit):
        compare(*arguments)
    assert "holds 4 runs: pass --resume to go on with them, or another --out" in capsys.readouterr().err
    assert compare(*arguments, "--resume") == 0
    assert path.read_text().startswith(kept)
    again = records.read(path)
    assert [(r["optimizer"], r["lr"], r["loss"]) for r in again] == [
        (r["optimizer"], r["lr"], r["loss"]) for r in whole
    ]
    assert compare(*arguments, "--resume", "--seed", "1") == 0
    assert [record["seed"] for record in records.read(path)] == 6 * [0] + 6 * [1]
    with pytest.raises(SystemExit):
        compare(*arguments, "--resume", "--steps", "5")
    assert "holds runs on mushrooms with steps 3, not 5: pass the same options again" in capsys.readouterr().err


def test_a_stop_while_records_are_mended_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs.jsonl"
    text = '{"task": "a"}\n{"task": "b"}\n{"ta'
    path.write_text(text)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            records.read(path)
    assert path.read_text() == text
    assert records.read(path) == [{"task": "a"}, {"task": "b"}]
    assert path.read_text() == text[: text.rindex("{")]


@pytest.mark.parametrize("line", ["", "[1]", "text", "[" * 100_000], ids=["empty", "list", "text", "deep"])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(f'{{"task": "a"}}\n{line}\n{{"task": "b"}}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*runs.jsonl is no record of a run: take it out, or choose"):
        records.read(path)


def test_without_matplotlib_there_are_no_pictures(
    compare: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert compare("--optimizers", "torch.sgd", "--steps", "2", "--tasks", "mushrooms") == 0
    assert "no pictures, pictures are drawn with matplotlib: pip install 'steepest[plot]'" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*.png"))


def test_rates_and_the_search_for_them_exclude_one_another(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["compare", "--full", "--rates", "Muon=0.02"])
    assert "--rates Muon=0.02: --full looks for the learning rates; leave one of the two out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers", "adamw9"], "--optimizers: unknown optimizer 'adamw9'; pass some of torch.AdamW, torch.SGD"),
        (["--tasks", "imagenet"], "--tasks: unknown task 'imagenet'; pass some of gpt, mushrooms, mushrooms-scaled"),
        (["--tasks", "gpt,Images"], "--tasks: unknown task 'Images'"),
        (["--rates", "fast"], "--rates fast: pass positive numbers, as in --rates 1e-3,1e-2"),
        (["--rates", "Muon=-1"], "--rates Muon=-1: pass positive numbers"),
        (["--rates", "lamb=1"], "unknown optimizer 'lamb'"),
        (["--steps", "0"], "--steps: '0': pass a whole number of 1 or more"),
        (["--mushrooms", "nowhere.svm"], "--mushrooms nowhere.svm: there is no such file"),
        (["--text", "nowhere.txt"], "--text nowhere.txt: there is no such file"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], message: str, compare: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        compare(*arguments)
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
