"""LLaMA-Factory: its own program trains, by stage, whole and with LoRA, and resumes."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("llamafactory", reason="llamafactory is not installed (make test-trainers)")

import steepest
from integrations.saved import same_weights, save_examples, save_model
from steepest.integrations.llamafactory import OTHERS, STAGES, register, use

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that trains into a folder and gives the optimizers that were made."""
    from llamafactory.train.tuner import run_exp

    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    save_model(tmp_path / "model")
    save_examples(tmp_path / "data")
    trainers = [importlib.import_module(f"llamafactory.train.{stage}.trainer") for stage in STAGES]
    for trainer in trainers:
        monkeypatch.setattr(trainer, "create_custom_optimizer", trainer.create_custom_optimizer)

    def run(name: str, **options: Any) -> list[Any]:
        made: list[Any] = []

        class Kept(steepest.MuAdam):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                made.append(self)

        use(Kept, lr=2e-3)
        paths = {"model_name_or_path": "model", "dataset_dir": "data", "output_dir": name}
        data = {"dataset": "counting", "template": "default", "cutoff_len": 64}
        steps = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        numbers = {"learning_rate": 3e-4, "weight_decay": 0.1, "lr_scheduler_type": "cosine"}
        quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "plot_loss": False}
        stage = {"stage": "sft", "do_train": True, "finetuning_type": "full"}
        run_exp(
            {
                **data,
                **steps,
                **numbers,
                **quiet,
                **stage,
                **{k: str(tmp_path / v) for k, v in paths.items()},
                **options,
            }
        )
        return made

    return run


def test_the_configuration_s_numbers_are_adamw_s_and_resume_is_the_same_bit_for_bit(train: Any, tmp_path: Path) -> None:
    [optimizer] = train("whole")
    groups = [(g["use_muon"], g["initial_lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert groups == [(True, 2e-3, 0.1), (False, 3e-4, 0.1), (False, 3e-4, 0.0)]
    assert "model.embed_tokens.weight" in optimizer.param_groups[1]["param_names"]
    begun = tmp_path / "again" / "checkpoint-2"
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", begun)
    train("again", resume_from_checkpoint=str(begun))
    assert same_weights(tmp_path / "whole" / "model.safetensors", tmp_path / "again" / "model.safetensors")


def test_other_stages_and_lora(train: Any) -> None:
    [optimizer] = train("pretrained", stage="pt", max_steps=1)
    assert type(optimizer).__mro__[1] is steepest.MuAdam
    [optimizer] = train("lora", finetuning_type="lora", lora_rank=2, max_steps=1)
    [matrices] = optimizer.param_groups
    assert all("lora_" in name for name in matrices["param_names"])


def test_another_optimizer_is_refused(train: Any) -> None:
    with pytest.raises(ValueError, match="use_muon asks for another optimizer than Kept of steepest: leave out one"):
        train("other", use_muon=True)


def test_the_options_that_are_refused_are_there() -> None:
    from llamafactory.hparams import FinetuningArguments

    assert all(hasattr(FinetuningArguments(), name) for name in OTHERS)


@pytest.fixture
def train_v1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that trains into a folder by the trainer of USE_V1."""
    monkeypatch.setenv("USE_V1", "1")
    from llamafactory.v1.trainers.sft_trainer import run_sft

    save_model(tmp_path / "model")
    turns = [("user", "count", 0.0), ("assistant", "1 2 3", 1.0)]
    messages = [{"role": r, "content": [{"type": "text", "value": t}], "loss_weight": w} for r, t, w in turns]
    (tmp_path / "data.jsonl").write_text("\n".join([json.dumps({"messages": messages})] * 16))
    register()

    def run(name: str, section: dict[str, Any], **options: Any) -> None:
        paths = {"model": "model", "train_dataset": "data.jsonl", "output_dir": name}
        steps = {"max_steps": 4, "save_steps": 2, "micro_batch_size": 2, "global_batch_size": 4, "batching_workers": 0}
        text = {"template": "qwen3_nothink", "cutoff_len": 64, "bf16": False}
        optimizer = {"optim_config": {"name": "steepest", **section}}
        run_sft({**{k: str(tmp_path / v) for k, v in paths.items()}, **steps, **text, **optimizer, **options})

    return run


def test_a_plugin_of_the_trainers_of_v1_resumes_bit_for_bit(train_v1: Any, tmp_path: Path) -> None:
    section = {"optimizer": "muadam", "lr": "2e-3", "adamw_lr": 3e-4, "adamw_weight_decay": 0.1}
    train_v1("whole", section)
    saved = torch.load(tmp_path / "whole" / "checkpoint-2" / "optimizer" / "state_dict.pt", weights_only=True)
    groups = [(g["use_muon"], g["lr"], g["weight_decay"]) for g in saved["param_groups"]]
    assert groups == [(True, 2e-3, 0.0), (False, 3e-4, 0.1), (False, 3e-4, 0.0)]
    train_v1("again", section, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same_weights(tmp_path / "whole" / "model.safetensors", tmp_path / "again" / "model.safetensors")


@pytest.mark.parametrize(
    ("section", "error"),
    [({}, "name the optimizer, as in optim_config"), ({"optimizer": "muadm"}, "did you mean .*MuAdam")],
)
def test_a_section_without_an_optimizer_says_how(train_v1: Any, section: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        train_v1("none", section)
