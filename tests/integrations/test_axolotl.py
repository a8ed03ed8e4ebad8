"""axolotl: a section of its configuration, its own program from there on, LoRA and resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("axolotl", reason="axolotl is not installed (make test-trainers)")

import yaml

import steepest
from integrations.saved import EXAMPLES, same_weights, save_model

pytestmark = pytest.mark.filterwarnings("ignore")
SECTION = "steepest: {optimizer: MuAdam, lr: 2e-3}"  # as people write it: YAML takes 2e-3 for a word


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that trains into a folder and gives the trainer."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")

    def run(name: str, section: str = SECTION, **options: Any) -> Any:
        from axolotl.cli.config import load_cfg
        from axolotl.common.datasets import TrainDatasetMeta
        from axolotl.train import train as trained
        from datasets import Dataset

        values = {
            "base_model": "model",
            "plugins": ["steepest.integrations.axolotl.Plugin"],
            "datasets": [{"path": "data.jsonl", "ds_type": "json", "type": "alpaca"}],
            "output_dir": name,
            "sequence_len": 64,
            "special_tokens": {"pad_token": "<pad>"},
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 4,
            "save_steps": 2,
            "learning_rate": 3e-4,
            "weight_decay": 0.1,
            "lr_scheduler": "cosine",
            "optimizer": "adamw_torch",
            "bf16": False,
            "fp16": False,
            "tf32": False,
            "val_set_size": 0,
            **options,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values) + section)
        cfg = load_cfg(str(path))
        ids = [[1, *(4 + ord(c) - 32 for c in example["output"]), 2] for example in EXAMPLES]
        rows = [{"input_ids": each, "labels": each, "attention_mask": [1] * len(each)} for each in ids]
        data = TrainDatasetMeta(train_dataset=Dataset.from_list(rows), total_num_steps=values["max_steps"])
        return trained(cfg=cfg, dataset_meta=data)[2]

    return run


def test_the_configuration_s_numbers_are_adamw_s_and_resume_is_the_same_bit_for_bit(train: Any, tmp_path: Path) -> None:
    optimizer = steepest.unwrap(train("whole").optimizer)
    assert type(optimizer) is steepest.MuAdam
    groups = [(g["use_muon"], g["initial_lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert groups == [(True, 2e-3, 0.1), (False, 3e-4, 0.1), (False, 3e-4, 0.0)]
    assert "model.embed_tokens.weight" in optimizer.param_groups[1]["param_names"]
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    train("again", resume_from_checkpoint="again/checkpoint-2")
    assert same_weights(tmp_path / "whole" / "model.safetensors", tmp_path / "again" / "model.safetensors")


def test_lora_with_a_module_to_save(train: Any) -> None:
    lora = {"adapter": "lora", "lora_r": 2, "lora_alpha": 4, "lora_target_modules": ["q_proj", "v_proj"]}
    optimizer = steepest.unwrap(train("lora", max_steps=1, lora_modules_to_save=["lm_head"], **lora).optimizer)
    kinds = {name: g["use_muon"] for g in optimizer.param_groups for name in g["param_names"]}
    assert {kind for name, kind in kinds.items() if "lora_" in name} == {True}
    assert {kind for name, kind in kinds.items() if "lm_head" in name} == {False}


def test_what_is_refused(train: Any) -> None:
    with pytest.raises(ValueError, match="embedding_lr: an optimizer of steepest makes its groups of the model"):
        train("groups", embedding_lr=1e-4)
    with pytest.raises(ValueError, match="no optimizer is called 'MuAdm': did you mean .*MuAdam"):
        train("typo", "steepest: {optimizer: MuAdm}")
    with pytest.raises(ValueError, match="name the optimizer, as in steepest: {optimizer: MuAdam, lr: 0.002}"):
        train("nameless", "steepest: {lr: 0.1}")
    with pytest.raises(ValueError, match="steepest"):
        train("without", "")
