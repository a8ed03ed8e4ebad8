"""Hugging Face's Trainer and PEFT: the helper, plain groups, resume."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed (make test-integrations)")
pytest.importorskip("accelerate", reason="accelerate is not installed (make test-integrations)")

from transformers import (  # noqa: E402
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import steepest  # noqa: E402
from steepest.integrations.transformers import optimizer_cls_and_kwargs  # noqa: E402
from steepest.routing import fused_layouts  # noqa: E402

DATA = [{"input_ids": (ids := [(3 * i + j) % 40 for j in range(8)]), "labels": ids} for i in range(16)]


def llama(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=1, **sizes, **kwargs))


def arguments(folder: Path, **kwargs: Any) -> Any:
    fixed = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 2}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    return TrainingArguments(str(folder), **{**fixed, **quiet, **kwargs})


def trained(folder: Path, cls: Any, *, resume: str | None = None, options: Any = None, **kwargs: Any) -> Any:
    args = arguments(folder, **kwargs)
    how = optimizer_cls_and_kwargs(cls, args, lr=1e-2, **(options or {}))
    trainer = Trainer(llama(), args, train_dataset=DATA, optimizer_cls_and_kwargs=how)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def test_plain_groups_of_the_trainer(tmp_path: Path) -> None:
    args = arguments(tmp_path, weight_decay=0.1)
    trainer = Trainer(llama(), args, train_dataset=DATA, optimizer_cls_and_kwargs=(steepest.MuAdam, {"lr": 1e-2}))
    trainer.train()
    optimizer = steepest.unwrap(trainer.optimizer)
    assert [(g["use_muon"], g["weight_decay"]) for g in optimizer.param_groups] == [(True, 0.1), (False, 0.0)]


def test_the_helper_takes_the_arguments(tmp_path: Path) -> None:
    trainer = trained(tmp_path, steepest.MuAdam, weight_decay=0.1, learning_rate=2e-3, adam_beta2=0.9, max_steps=1)
    optimizer = steepest.unwrap(trainer.optimizer)
    found = [(g["use_muon"], g["initial_lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [(True, 1e-2, 0.1), (False, 2e-3, 0.1), (False, 2e-3, 0.0)]
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.9)
    assert "model.embed_tokens.weight" in optimizer.param_groups[1]["param_names"]
    assert "layers.0.mlp.up_proj.weight" in optimizer.describe()


def test_overrides_split_a_fused_weight(tmp_path: Path) -> None:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, **sizes))
    args = arguments(tmp_path, weight_decay=0.1, learning_rate=2e-3)
    how = optimizer_cls_and_kwargs(steepest.MuAdam, args, lr=1e-2, overrides=fused_layouts(model))
    trainer = Trainer(model, args, train_dataset=DATA, optimizer_cls_and_kwargs=how)
    trainer.create_optimizer()
    groups = steepest.unwrap(trainer.optimizer).param_groups
    assert groups[0]["split_sizes"] == (16, 16, 16)
    found = [(g["use_muon"], g["lr"], g["weight_decay"]) for g in groups]
    assert found == [(True, 1e-2, 0.1)] * 2 + [(False, 2e-3, 0.1), (False, 2e-3, 0.0)]
    factory, kwargs = optimizer_cls_and_kwargs(steepest.KFAC, args, overrides={})
    with pytest.raises(TypeError, match="KFAC takes a module, whose layers it watches: leave out overrides"):
        factory()(model, **kwargs)
    with pytest.raises(TypeError, match=r"'MuAdam' is a name: pass the class, as in steepest\.MuAdam"):
        optimizer_cls_and_kwargs("MuAdam", args)  # type: ignore[arg-type]


def test_optim_args_win_over_the_arguments_and_what_is_named_over_them(tmp_path: Path) -> None:
    args = arguments(tmp_path, weight_decay=0.1, learning_rate=2e-3, optim_args="lr=0.05,momentum=0.8,adamw_lr=1e-3")
    factory, kwargs = optimizer_cls_and_kwargs(steepest.Muon, args, lr=1e-2)
    matrices, others, _ = factory()(llama(), **kwargs).param_groups
    assert (matrices["lr"], matrices["momentum"], matrices["weight_decay"]) == (1e-2, 0.8, 0.1)
    assert others["lr"] == 1e-3
    with pytest.raises(ValueError, match="'momentum' is no argument of an optimizer: write name=value"):
        optimizer_cls_and_kwargs(steepest.Muon, arguments(tmp_path, optim_args="momentum"))


def test_a_trainer_may_hand_over_its_arguments_too(tmp_path: Path) -> None:
    """As axolotl's do, which call the factory by themselves."""
    args = arguments(tmp_path, weight_decay=0.1)
    factory, kwargs = optimizer_cls_and_kwargs(steepest.MuAdam, args, lr=1e-2)
    assert factory()(llama(), args, **kwargs).param_groups[0]["weight_decay"] == 0.1


def test_an_older_trainer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.trainer_optimizer", None)
    with pytest.raises(ImportError, match="needs a Trainer that hands its model over: pip install 'transformers>=5'"):
        optimizer_cls_and_kwargs(steepest.MuAdam)


@pytest.mark.parametrize("cls", [steepest.MuAdam, steepest.SOAP, steepest.Muon])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_is_the_same_bit_for_bit(tmp_path: Path, cls: Any, accumulate: int) -> None:
    whole = trained(tmp_path / "whole", cls, gradient_accumulation_steps=accumulate)
    begun = str(tmp_path / "whole" / "checkpoint-2")
    resumed = trained(tmp_path / "again", cls, gradient_accumulation_steps=accumulate, resume=begun)
    assert all(torch.equal(p, q) for p, q in zip(weights(whole), weights(resumed), strict=True))


def test_kfac_sees_an_accumulated_batch_as_one(tmp_path: Path) -> None:
    """Micro-batches of a step are one term of the factors' averages, whatever their number."""
    options = {"precondition_frequency": 1}
    runs = [
        trained(
            tmp_path / str(k),
            steepest.KFAC,
            per_device_train_batch_size=4 // k,
            gradient_accumulation_steps=k,
            options=options,
            max_steps=3,
        )
        for k in (1, 2)
    ]
    for p, q in zip(weights(runs[0]), weights(runs[1]), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("where", ["lm_head", "embed_tokens"])
def test_peft(tmp_path: Path, where: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (make test-integrations)")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=[where], r=2)
    model = peft.get_peft_model(llama(), config)
    args = arguments(tmp_path, max_steps=2)
    how = optimizer_cls_and_kwargs(steepest.MuAdam, args, lr=1e-2)
    trainer = Trainer(model, args, train_dataset=DATA, optimizer_cls_and_kwargs=how)
    trainer.train()
    optimizer = steepest.unwrap(trainer.optimizer)
    kinds = {name: g["use_muon"] for g in optimizer.param_groups for name in g["param_names"]}
    assert kinds
    assert not any(kind for name, kind in kinds.items() if "modules_to_save" in name)
    assert all(kind for name, kind in kinds.items() if "lora_" in name)
