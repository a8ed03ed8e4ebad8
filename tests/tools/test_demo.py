"""The demo in examples/, end to end at a small size: what it writes, that it repeats itself, and what it refuses."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import steepest
from steepest.tools.compare import text
from steepest.tools.compare.gpt import GPT, Shape
from steepest.tools.compare.progress import Progress
from steepest.tools.compare.training import learning_rate_factor

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

pytest.importorskip("matplotlib", reason="the demo draws its picture with matplotlib")

import robustness  # noqa: E402
import seeds  # noqa: E402
import sweep  # noqa: E402
import train_gpt  # noqa: E402
from demo import rates  # noqa: E402
from demo.methods import METHODS  # noqa: E402
from demo.report import catch_up  # noqa: E402
from demo.training import QUICK, Run, Settings, train  # noqa: E402

TINY = Settings(
    shape=Shape(layers=1, width=16, heads=2, context=16), batch=4, steps=6, validate_every=3, validation_windows=8
)
RATES = {
    "adamw": 4e-3,
    "muon": 0.02,
    "torch-muon": 0.02,
    "muadam": 1e-3,
    "muadam-sania": 1e-5,
    "soap": 4e-3,
    "kl-soap": 4e-3,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose more to waiting for a second thread than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 800)
    return path


def trained(names: list[str], settings: Settings, path: Path) -> list[Run]:
    runs = [Run(METHODS[name], RATES[name], RATES["adamw"], settings) for name in names]
    train(runs, text.load(path, settings.shape.context), settings, lambda step, note: None)
    return runs


# ---- the whole of it --------------------------------------------------------------------------------------------


def test_a_quick_run_writes_table_curves_and_picture(
    book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "out"
    assert train_gpt.main(["--quick", "--steps", "12", "--text", str(book), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    for label in ("MuAdam", "Muon", "AdamW", "validation loss", "step ms", "optimizer ms"):
        assert label in printed.out
    assert "step 12/12" in printed.err
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    with (out / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 13
    last = [row for row in rows if row["step"] == "12"]
    assert {row["optimizer"] for row in last} == {"muadam", "muon", "adamw"}
    assert all(float(row["validation_loss"]) > 0 and float(row["seconds"]) > 0 for row in last)


def test_every_method_starts_from_the_same_loss_and_lowers_it(book: Path) -> None:
    runs = trained(list(METHODS), replace(TINY, steps=40), book)
    assert len({run.points[0].validation_loss for run in runs}) == 1
    for run in runs:
        assert run.validation_loss < 0.9 * run.points[0].validation_loss, run.method.name


def test_the_same_seed_gives_the_same_losses_and_another_does_not(book: Path) -> None:
    def losses(settings: Settings) -> list[tuple[float | None, float | None]]:
        points = [point for run in trained(["muadam", "adamw"], settings, book) for point in run.points]
        return [(point.train_loss, point.validation_loss) for point in points]

    assert losses(TINY) == losses(TINY)
    assert losses(TINY) != losses(replace(TINY, seed=1))


def test_a_method_trains_the_same_beside_others_as_alone(book: Path) -> None:
    alone = trained(["adamw"], TINY, book)[0]
    beside = trained(["muadam", "muon", "adamw"], TINY, book)[2]
    assert [p.train_loss for p in alone.points] == [p.train_loss for p in beside.points]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_updates_every_parameter_once(name: str) -> None:
    model = GPT.create(TINY.shape, 0)
    optimizers = METHODS[name].build(model, RATES[name], RATES["adamw"])
    updated = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(updated) == len(list(model.parameters()))
    assert {id(p) for p in updated} == {id(p) for p in model.parameters()}


def test_the_hidden_matrices_are_what_steepest_routes_to_the_matrix_method() -> None:
    model = GPT.create(TINY.shape, 0)
    routed = [p for group in steepest.MuAdam(model).param_groups if group["use_muon"] for p in group["params"]]
    assert {id(p) for p in routed} == {id(p) for p in model.hidden_matrices()}


# ---- parts ------------------------------------------------------------------------------------------------------


def test_the_model_is_causal() -> None:
    model = GPT.create(TINY.shape, 0)
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 10:] = 0
    torch.testing.assert_close(model(tokens)[:, :10], model(changed)[:, :10])
    assert not torch.allclose(model(tokens)[:, 10:], model(changed)[:, 10:])


def test_creating_a_model_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    GPT.create(TINY.shape, 3)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_schedule_warms_up_then_falls_to_a_tenth() -> None:
    factors = [learning_rate_factor(step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 15)
    assert max(factors) == factors[14] == 1.0
    assert factors[100] == pytest.approx(0.1)
    assert factors[15:] == sorted(factors[15:], reverse=True)


def test_the_held_out_blocks_are_a_tenth_and_nothing_is_lost() -> None:
    data = bytes(range(250)) * 400
    train_part, held_out = text.split(data, "data", 16)
    assert len(train_part) + len(held_out) == len(data)
    assert 0.08 < len(held_out) / len(data) < 0.12
    assert sorted(torch.cat([train_part, held_out]).tolist()) == sorted(data)


def test_the_standard_library_is_read_in_order_and_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b.py").write_bytes(b"second")
    (tmp_path / "a.py").write_bytes(b"first")
    assert text.standard_library(tmp_path) == b"first\nsecond"
    monkeypatch.setattr(text, "LIMIT", 7)
    assert text.standard_library(tmp_path) == b"first\ns"


def test_targets_are_the_inputs_one_byte_later() -> None:
    data = torch.arange(100, dtype=torch.uint8)
    inputs, targets = text.windows(data, 5, 16, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (5, 16)
    assert torch.equal(inputs + 1, targets)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_redraws_one_line_on_a_terminal_and_prints_few_elsewhere() -> None:
    terminal, plain = Terminal(), io.StringIO()
    for stream in (terminal, plain):
        progress = Progress(100, stream)
        for step in range(1, 101):
            progress.update(step, "muadam 1.234")
    assert terminal.getvalue().count("\r") == 100
    assert terminal.getvalue().count("\n") == 1
    assert terminal.getvalue().rstrip().endswith("muadam 1.234")
    assert plain.getvalue().count("\n") == 11
    assert plain.getvalue().startswith("step 1/100")
    assert "\r" not in plain.getvalue()


def test_catch_up_says_when_adamw_was_reached(book: Path) -> None:
    muadam, adamw = trained(["muadam", "adamw"], TINY, book)
    adamw.record(6, None, 4.0)
    muadam.points.clear()
    for step, loss in ((0, 5.0), (3, 3.9), (6, 3.5)):
        muadam.record(step, None, loss)
    assert catch_up([muadam, adamw]) == ["muadam reaches adamw's last validation loss (4.0000) by step 3 of 6"]
    adamw.record(6, None, 3.0)
    assert catch_up([muadam, adamw]) == ["muadam does not reach adamw's last validation loss (3.0000) in 6 steps"]
    assert catch_up([muadam]) == []


# ---- learning rates and the sweep -------------------------------------------------------------------------------


#: Methods whose rule has changed since they were swept: `python examples/sweep.py` trains them at their rates again.
TO_SWEEP = ("kl-soap",)


@pytest.mark.parametrize("method", sweep.GRIDS)
def test_the_committed_sweep_has_the_whole_grid_and_encloses_the_best(method: str) -> None:
    rows = rates.read()
    if method in TO_SWEEP:
        assert not [row for row in rows if row["optimizer"] == method]
        with pytest.raises(ValueError, match=method):
            train_gpt.learning_rates([method], [])
        return
    assert {float(row["lr"]) for row in rows if row["optimizer"] == method} == set(sweep.GRIDS[method])
    assert rates.enclosed(rows, method)


def test_the_demo_runs_at_the_rates_that_were_best_in_the_committed_sweep() -> None:
    names = ["muadam", "muon", "adamw", "muadam-sania"]
    chosen = train_gpt.learning_rates(names, [])
    for name in names:
        rows = [row for row in rates.read() if row["optimizer"] == name]
        lowest = min(float(row["validation_loss"]) for row in rows)
        assert [float(r["validation_loss"]) for r in rows if float(r["lr"]) == chosen[name]] == [lowest]
        assert all(float(row["adamw_lr"]) == chosen["adamw"] for row in rows if name != "adamw")
    assert train_gpt.learning_rates(["torch-muon"], []) == {"torch-muon": chosen["muon"]}


def test_a_rate_given_by_hand_wins() -> None:
    assert train_gpt.learning_rates(["muon", "adamw"], ["muon=0.5"])["muon"] == 0.5


def test_the_best_rate_is_never_one_that_diverged() -> None:
    rows = [
        {"optimizer": "muon", "lr": lr, "validation_loss": loss} for lr, loss in (("1", "nan"), ("2", "3"), ("3", "2"))
    ]
    assert rates.best(rows, "muon") == 3
    assert not rates.enclosed(rows, "muon")


def test_the_committed_seeds_show_muadam_and_muon_below_adamw() -> None:
    rows = rates.read(rates.RESULTS / "seeds.csv")
    by_seed = {(row["seed"], row["optimizer"]): float(row["validation_loss"]) for row in rows}
    numbers = {seed for seed, _ in by_seed}
    assert len(numbers) >= 3
    for seed in numbers:
        assert by_seed[seed, "muadam"] < by_seed[seed, "adamw"]
        assert by_seed[seed, "muon"] < by_seed[seed, "adamw"]
    assert len(seeds.margins(rows)) == 3


def test_the_committed_robustness_has_its_grids_and_muonmax_momo_varies_less_than_muon() -> None:
    rows = rates.read(robustness.RESULT)
    found = {name: robustness.losses(rows, name) for name in robustness.GRIDS}
    assert {name: tuple(own) for name, own in found.items()} == robustness.GRIDS
    assert robustness.spread(found["MuonMax-Momo"])[1] < 0.5 * robustness.spread(found["Muon"])[1]


def test_the_spread_is_that_of_the_flattest_hundredfold_range() -> None:
    own = {0.01: 5.0, 0.1: 3.0, 1.0: 2.0, 10.0: 2.5, 100.0: 4.0}
    assert robustness.spread(own) == ({0.1: 3.0, 1.0: 2.0, 10.0: 2.5}, 1.0)
    with pytest.raises(ValueError, match=r"learning rates 0\.1, 1 span less than a factor of 100"):
        robustness.spread({0.1: 1.0, 1.0: 2.0})


def test_robustness_goes_on_where_it_was_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robustness, "GRIDS", {"Muon": (1e-3, 1e-1), "MuonMax-Momo": (1e-2, 1.0)})
    path, picture = tmp_path / "robustness.csv", tmp_path / "robustness.png"
    arguments = ["--quick", "--steps", "2", "--threads", "1", "--out", str(path), "--picture", str(picture)]
    threads = torch.get_num_threads()
    try:
        assert robustness.main(arguments) == 0
        lines = path.read_text().splitlines()
        assert len(lines) == 5
        path.write_text("\n".join(lines[:3]) + "\n")
        assert robustness.main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    assert [line.split(",")[:4] for line in path.read_text().splitlines()] == [line.split(",")[:4] for line in lines]
    assert picture.stat().st_size > 1000
    with pytest.raises(SystemExit, match="holds runs with steps 2; delete it or pass another --out"):
        robustness.main([*arguments, "--steps", "3"])


def test_a_stopped_sweep_goes_on_where_it_was(book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "GRIDS", {"adamw": (1e-3, 4e-3), "muadam": (1e-3,)})
    path = tmp_path / "sweep.csv"
    corpus = text.load(book, TINY.shape.context)
    sweep.sweep(path, corpus, TINY)
    whole = rates.read(path)
    assert [(row["optimizer"], row["lr"]) for row in whole] == [
        ("adamw", "0.001"),
        ("adamw", "0.004"),
        ("muadam", "0.001"),
    ]
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    first = path.read_text()
    sweep.sweep(path, corpus, TINY)
    assert path.read_text().startswith(first)
    losses = [[row["validation_loss"] for row in rows] for rows in (whole, rates.read(path))]
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match=r"sweep\.csv holds a sweep with steps 6; delete it or pass another --out"):
        sweep.sweep(path, corpus, replace(TINY, steps=7))


# ---- what it refuses --------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        train_gpt.main(["--quick", *arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--optimizers", "adam"], "unknown optimizer 'adam'; pass some of muadam, muon, adamw"),
        (["--lr", "sgd=1"], "--lr sgd=1: unknown optimizer 'sgd'; pass NAME=VALUE"),
        (["--lr", "muon=fast"], "--lr muon=fast: 'fast' is no learning rate; pass a positive number"),
        (["--lr", "muon=-1"], "--lr muon=-1: '-1' is no learning rate; pass a positive number"),
        (["--lr", "muon"], "--lr muon: '' is no learning rate; pass a positive number"),
        (["--steps", "0"], "--steps: '0': pass a whole number of 1 or more"),
        (["--threads", "two"], "--threads: 'two': pass a whole number of 1 or more"),
        (
            ["--text", "no/such/file.txt"],
            "--text no/such/file.txt: there is no such file; pass the path of a text file",
        ),
        (["--text", str(EXAMPLES)], "not a file; pass the path of one text file"),
    ],
)
def test_a_bad_argument_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *arguments)


def test_an_empty_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "empty.txt"
    path.touch()
    assert "empty.txt: the file is empty; pass a file with text in it" in refused(capsys, "--text", str(path))


def test_a_text_too_short_for_the_context_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "short.txt"
    path.write_text("too short")
    expected = "9 bytes are too few; a context of 64 needs 5,200 or more"
    assert expected in refused(capsys, "--text", str(path))
    needed = b"x" * 5200
    train_part, held_out = text.split(needed, "enough", QUICK.shape.context)
    assert len(train_part) > 64
    assert len(held_out) > 64


def test_an_output_folder_that_cannot_be_written_is_refused(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "--text", str(book), "--out", str(book / "out"))
    assert "cannot write there (Not a directory); pass another folder" in said


def test_a_method_without_a_sweep_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no learning rate for muon; run examples/sweep\.py or pass --lr"):
        rates.best([], "muon")
