"""TRL: SFTTrainer with the helper of Transformers, whole and with LoRA, and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl", reason="trl is not installed (make test-trainers)")

from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402

import steepest  # noqa: E402
from integrations.saved import EXAMPLES, save_model  # noqa: E402
from steepest.integrations.transformers import optimizer_cls_and_kwargs  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def trained(folder: Path, name: str, resume: Path | None = None, **options: Any) -> Any:
    steps = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    quiet = {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True}
    args = trl.SFTConfig(str(folder / name), learning_rate=3e-4, weight_decay=0.1, **steps, **quiet)
    how = optimizer_cls_and_kwargs(steepest.MuAdam, args, lr=2e-3)
    data = Dataset.from_list([{"text": f"{each['instruction']} {each['output']}"} for each in EXAMPLES])
    model = str(folder / "model")
    trainer = trl.SFTTrainer(model, args=args, train_dataset=data, optimizer_cls_and_kwargs=how, **options)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def test_resume_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    whole = trained(tmp_path, "whole")
    again = trained(tmp_path, "again", tmp_path / "whole" / "checkpoint-2")
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True))
    groups = [(g["use_muon"], g["initial_lr"]) for g in steepest.unwrap(whole.optimizer).param_groups]
    assert groups == [(True, 2e-3), (False, 3e-4), (False, 3e-4)]


def test_lora_with_a_module_to_save(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    groups = steepest.unwrap(trained(tmp_path, "lora", peft_config=config).optimizer).param_groups
    kinds = {name: group["use_muon"] for group in groups for name in group["param_names"]}
    assert {kind for name, kind in kinds.items() if "lora_" in name} == {True}
    assert {kind for name, kind in kinds.items() if "lm_head" in name} == {False}


def test_a_trainer_that_does_not_pass_it_on_is_told_afterwards(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    rows = [{"prompt": each["instruction"], "chosen": each["output"], "rejected": "no"} for each in EXAMPLES]

    def preferred(name: str, resume: str | None = None) -> Any:
        steps = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2}
        args = trl.DPOConfig(str(tmp_path / name), report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, **steps)
        trainer = trl.DPOTrainer(str(tmp_path / "model"), args=args, train_dataset=Dataset.from_list(rows))
        trainer.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs(steepest.MuAdam, args, lr=2e-3)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = preferred("whole")
    again = preferred("again", str(tmp_path / "whole" / "checkpoint-2"))
    assert isinstance(steepest.unwrap(whole.optimizer), steepest.MuAdam)
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True))
