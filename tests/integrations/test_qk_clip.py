"""QK-clip on Hugging Face models: their layers, their calls of attention, their Trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed (make test-integrations)")

import steepest  # noqa: E402
from steepest.attention import attention_layers  # noqa: E402
from steepest.integrations.transformers import optimizer_cls_and_kwargs, qk_clip  # noqa: E402

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "pad_token_id": 0}
GATED = {**SIZES, "intermediate_size": 24}
GROUPED = {**GATED, "num_key_value_heads": 2}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5}
EXPERTS = {"moe_intermediate_size": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
#: name of the model, values of its config, and (heads, key heads, parameters) of its layer
MODELS: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "Llama": (GROUPED, (4, 2, 2)),
    "Qwen2": (GROUPED, (4, 2, 4)),
    "GPT2": ({**SIZES, **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)}, (4, 4, 2)),
    "GPTNeoX": (GATED, (4, 4, 2)),
    "Phi3": (GROUPED, (4, 2, 1)),
    "Falcon": ({**SIZES, "bias": True}, (4, 1, 2)),
    "DeepseekV3": ({**GATED, **LATENT, **EXPERTS, "num_key_value_heads": 4, "num_experts_per_tok": 2}, (4, 4, 2)),
    "OPT": ({**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16}, (4, 4, 4)),
}
CLASSES = {"GPT2": "GPT2LMHeadModel"}
TOKENS = torch.arange(18).view(2, 9) * 7 % 40


def model_of(name: str, values: dict[str, Any]) -> Any:
    """With random weights of some size, biases included, in fp64."""
    config = getattr(transformers, f"{name}Config")(bos_token_id=1, eos_token_id=2, **values)
    config.use_cache = False
    model = getattr(transformers, CLASSES.get(name, f"{name}ForCausalLM"))(config).double()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model.train()


def observed(model: Any, clip: steepest.QKClip) -> Tensor:
    """The largest logits of the layer in a forward pass, with padding on the left of one sequence."""
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    model(input_ids=TOKENS, attention_mask=mask, labels=TOKENS).loss.backward()
    [part] = clip._clipped.values()
    return part.maxima.clone()


@pytest.mark.parametrize("name", MODELS)
def test_the_same_inputs_have_logits_of_the_threshold_at_most(name: str) -> None:
    values, wanted = MODELS[name]
    model = model_of(name, values)
    [layer] = attention_layers(model).values()
    assert (layer.num_heads, layer.num_kv_heads, len(layer.rows)) == wanted
    optimizer = steepest.Muon(model, lr=0.0, adamw_lr=0.0, weight_decay=0.0)
    free = steepest.QKClip(optimizer, model)
    old = observed(model, free)
    free.remove()
    threshold = float(old.sort().values[:2].mean())
    assert threshold > 0
    clip = steepest.QKClip(optimizer, model, threshold)
    assert torch.equal(observed(model, clip), old)
    optimizer.step()
    torch.testing.assert_close(observed(model, clip), old.clamp(max=threshold), rtol=1e-9, atol=0)


def test_normalized_queries_and_eager_attention_are_refused() -> None:
    model = model_of("Qwen3", {**GROUPED, "head_dim": 4})
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn' normalizes its .* \(q_norm, k_norm\)"):
        attention_layers(model)
    model = model_of("Llama", GROUPED)
    model.set_attn_implementation("eager")
    optimizer = steepest.Muon(model)
    with pytest.raises(ValueError, match=r"attention of this model is 'eager', .*set_attn_implementation\('sdpa'\)"):
        steepest.QKClip(optimizer, model)
    assert not optimizer._weight_hooks


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_the_trainer(tmp_path: Path, checkpointing: bool) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed (make test-integrations)")
    model = model_of("Llama", {**GROUPED, "num_hidden_layers": 2}).float()
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, gradient_accumulation_steps=2, gradient_checkpointing=checkpointing, **quiet
    )
    data = [{"input_ids": TOKENS[i % 2], "labels": TOKENS[i % 2]} for i in range(16)]
    callback = qk_clip(threshold=1.0)
    how = optimizer_cls_and_kwargs(steepest.MuAdam, args, lr=1e-2)
    trainer = transformers.Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=how, callbacks=[callback])
    trainer.train()
    metrics = callback.clip.metrics()
    assert 0 < metrics["max_logit"] < math.inf
    assert metrics["nonfinite"] == 0
    assert not steepest.unwrap(trainer.optimizer)._weight_hooks
