"""Known networks from configs, on the meta device: 90 and more, of transformers, timm and torchvision."""

from __future__ import annotations

import inspect
import operator
import re
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from steepest.routing import route

#: Sizes that most configs of transformers take; what a config does not know is left out.
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
CAUSAL, MASKED, SEQ2SEQ = "ForCausalLM", "ForMaskedLM", "ForSeq2SeqLM"

#: Class of transformers, and what its config wants besides.
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {},
    "Qwen3MoeForCausalLM": {"shared_expert_intermediate_size": 16},
    "Gemma2ForCausalLM": {},
    "Gemma3ForCausalLM": {},
    "Phi3ForCausalLM": {},
    "MistralForCausalLM": {},
    "MixtralForCausalLM": {},
    "GptOssForCausalLM": {},
    "DeepseekV3ForCausalLM": {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 2,
        "n_group": 2,
        "topk_group": 1,
        "num_key_value_heads": 4,
    },
    "Llama4ForCausalLM": {"intermediate_size_mlp": 48, "moe_layers": [0]},
    "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16},
    "GPTNeoXForCausalLM": {},
    "GPTJForCausalLM": {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16, "rotary_dim": 4},
    "BloomForCausalLM": {"n_layer": 1, "n_head": 4},
    "FalconForCausalLM": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "OPTForCausalLM": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "MptForCausalLM": {"d_model": 32, "n_heads": 4, "n_layers": 1},
    "MambaForCausalLM": {"state_size": 8},
    "Mamba2ForCausalLM": {"state_size": 8, "head_dim": 8, "num_heads": 8, "n_groups": 2},
    "JambaForCausalLM": {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "RwkvForCausalLM": {"attention_hidden_size": 32},
    "BertForPreTraining": {},
    "BertForQuestionAnswering": {},
    "RobertaForMaskedLM": {},
    "DebertaV2ForMaskedLM": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "ElectraForPreTraining": {"embedding_size": 16},
    "AlbertForMaskedLM": {"embedding_size": 16},
    "ModernBertForMaskedLM": {},
    "DistilBertForQuestionAnswering": {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48},
    "LlamaForSequenceClassification": {"num_labels": 3},
    "XLNetLMHeadModel": {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48},
    "T5ForConditionalGeneration": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
    "BartForConditionalGeneration": {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
    },
    "WhisperForConditionalGeneration": {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "num_mel_bins": 8,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_source_positions": 16,
    },
    "Wav2Vec2ForCTC": {
        "conv_dim": [16, 16],
        "conv_stride": [2, 2],
        "conv_kernel": [4, 4],
        "num_conv_pos_embeddings": 4,
    },
    "ViTForImageClassification": {"image_size": 16, "patch_size": 8},
    "SamModel": {},
    "CLIPModel": {},
}
#: With the sizes of their authors, in which no two sides are equal by chance, and few layers.
TWO, AS_IT_IS = {"num_hidden_layers": 2}, {}
WHOLE_SIZE: dict[str, dict[str, Any]] = {
    "Qwen3NextForCausalLM": {"num_hidden_layers": 4},
    "DeepseekV4ForCausalLM": TWO,
    "KimiLinearForCausalLM": {"num_hidden_layers": 4},
    "Glm4MoeForCausalLM": TWO,
    "MiniMaxM2ForCausalLM": TWO,
    "NemotronHForCausalLM": AS_IT_IS,
    "GraniteMoeHybridForCausalLM": TWO,
    "ZambaForCausalLM": AS_IT_IS,
    "RecurrentGemmaForCausalLM": {"num_hidden_layers": 3},
    "xLSTMForCausalLM": TWO,
    "InklingForCausalLM": {"num_hidden_layers": 3},
    "JetMoeForCausalLM": TWO,
    "FunnelModel": AS_IT_IS,
    "FuyuForCausalLM": AS_IT_IS,
    "Gemma3ForConditionalGeneration": AS_IT_IS,
    "AriaForConditionalGeneration": AS_IT_IS,
    "SiglipModel": AS_IT_IS,
    "Sam2Model": AS_IT_IS,
    "Swinv2ForImageClassification": AS_IT_IS,
    "ConvNextV2ForImageClassification": AS_IT_IS,
    "YolosForObjectDetection": TWO,
    "XCLIPModel": AS_IT_IS,
    "LayoutLMv3ForTokenClassification": TWO,
    "MobileBertForPreTraining": TWO,
    "DeiTForImageClassificationWithTeacher": TWO,
    "PerceiverForImageClassificationLearned": AS_IT_IS,
    "RTDetrForObjectDetection": AS_IT_IS,
    "Mask2FormerForUniversalSegmentation": AS_IT_IS,
    "FSMTForConditionalGeneration": AS_IT_IS,
    "SpeechT5ForTextToSpeech": AS_IT_IS,
}
#: What a config refuses.
NOT_TAKEN = {"FalconForCausalLM": ("head_dim",), "XLNetLMHeadModel": ("max_position_embeddings",)}
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4, "num_classes": 5}
TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "eva02_tiny_patch14_224": {"num_classes": 5, "depth": 1},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1), "embed_dim": 32, "num_heads": (2, 4), "num_classes": 5},
    "mvitv2_tiny": {"num_classes": 5},
    "levit_128s": {"num_classes": 5},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32), "num_classes": 5},
    "mixer_s32_224": {"num_classes": 5},
    "efficientnet_b0": {"num_classes": 5},
    "resnet18": {"num_classes": 5},
    "maxvit_tiny_rw_224": {"num_classes": 5},
    "resmlp_12_224": {"num_classes": 5},
    "efficientvim_m1": {"num_classes": 5},
    "eca_nfnet_l0": {"num_classes": 5},
    "sequencer2d_s": {"num_classes": 5},
    "volo_d1_224": {"num_classes": 5},
    "tnt_s_patch16_224": {"num_classes": 5, "depth": 1},
    "samvit_base_patch16": {"depth": 1, "embed_dim": 32, "num_heads": 4, "global_attn_indexes": (0,)},
}
TORCHVISION = (
    *("resnet18", "vgg11", "mobilenet_v2", "resnext50_32x4d", "vit_b_32", "swin_t", "googlenet", "maxvit_t"),
    *("detection.maskrcnn_resnet50_fpn", "detection.ssdlite320_mobilenet_v3_large"),
)


def of_transformers(name: str) -> nn.Module:
    import transformers

    cls = getattr(transformers, name)
    config = cls.config_class
    if name in WHOLE_SIZE:
        return cls(config(**WHOLE_SIZE[name]))
    if name == "SamModel":
        vision = transformers.SamVisionConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            mlp_dim=48,
            output_channels=16,
            global_attn_indexes=[0],
            window_size=2,
        )
        decoder = {
            "hidden_size": 16,
            "mlp_dim": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 16,
        }
        prompt = {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
        return cls(
            transformers.SamConfig(
                vision_config=vision.to_dict(), mask_decoder_config=decoder, prompt_encoder_config=prompt
            )
        )
    if name == "CLIPModel":
        text = {
            key: SMALL[key]
            for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        }
        return cls(
            config(text_config=text, vision_config={**text, "image_size": 16, "patch_size": 8}, projection_dim=16)
        )
    takes = inspect.signature(config.__init__).parameters
    unknown = NOT_TAKEN.get(name, ())
    known = {key: value for key, value in SMALL.items() if (key in takes or "kwargs" in takes) and key not in unknown}
    return cls(config(**{**known, **TRANSFORMERS[name]}))


def of_timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, **TIMM[name])


def of_torchvision(name: str) -> nn.Module:
    import torchvision

    extra: dict[str, Any] = {"init_weights": False} if name in ("vgg11", "googlenet") else {}
    if name.startswith("detection."):
        extra = {"weights_backbone": None}
    return operator.attrgetter(name)(torchvision.models)(num_classes=5, **extra)


PACKAGES: dict[str, tuple[Callable[[str], nn.Module], tuple[str, ...]]] = {
    "transformers": (of_transformers, (*TRANSFORMERS, *WHOLE_SIZE)),
    "timm": (of_timm, tuple(TIMM)),
    "torchvision": (of_torchvision, TORCHVISION),
}


def build(package: str, name: str) -> nn.Module:
    with torch.device("meta"):
        return PACKAGES[package][0](name)


def table(package: str, name: str) -> list[str]:
    """A line for each kind of parameter, and one for all vectors; what differs in numbers of layers alone is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of vocabularies, and of configs that have become old
        routes = route(build(package, name))
    lines, vectors = [], Counter(r.rule for r in routes if r.param.ndim < 2)
    for r in routes:
        if r.param.ndim > 1:
            lines.append(f"{r.rule:<6} {re.sub('[0-9]+(?=[.])', '*', r.name)} {tuple(r.param.shape)}: {r.reason}")
    return list(dict.fromkeys([*lines, *(f"{rule:<6} {count} vectors" for rule, count in vectors.items())]))


def printed() -> str:
    """All tables, as routes.txt has them."""
    return "\n".join(
        line
        for package, (_, names) in PACKAGES.items()
        for name in names
        for line in (f"[{package} {name}]", *table(package, name), "")
    )


if __name__ == "__main__":
    import conftest

    conftest.pytest_configure()
    print(printed(), end="")
