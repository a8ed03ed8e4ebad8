"""What is known of other people's architectures, as data: names and classes that say what a parameter is.

Names are in small letters, as in `Place.path`, and patterns are fnmatch's.
"""

from __future__ import annotations

#: Matched with the last component of the module's path (of a module in a list, with the list's), with the parameter's
#: own name, and with the first where the parameter is not deep inside (head.fc, classifier.6). qa_outputs: BERT and its
#: kin; head_dist, classifier_distill: DeiT and LeViT, distilled; class_embed: DETR and its kin; class_predictor:
#: MaskFormer and its kin; cls_score to kps_score_lowres: detectors of torchvision and Detectron2; head_linear: Ovis 2.
HEADS = (
    *("lm_head", "head", "*_head", "*_heads", "classifier", "*_classifier", "embed_out", "unembed*", "logits*"),
    *("score", "qa_outputs", "head_dist", "classifier_distill", "head_linear", "*class_embed", "class_predictor"),
    *("cls_score", "cls_logits", "objectness_logits", "mask_fcn_logits", "bbox_pred", "kps_score_lowres"),
)
#: Names of hidden layers which a pattern of HEADS takes: Funnel's projections, the last convolution of EfficientNets;
#: and of a network that is no head, torchvision's of regions.
NO_HEADS = frozenset({"q_head", "k_head", "v_head", "conv_head", "roi_heads"})
#: With more components than this a parameter is deep inside of what its first component names: ESMFold 2's
#: structure_head and VibeVoice's diffusion_head are networks.
HEAD_DEPTH = 4
#: Heads only where the module stands at the top of the model; inside a block these are common names of hidden layers.
TOP_LEVEL_HEADS = ("fc", "output", "decoder")
#: Patterns of the end of the module's path: BERT's map to the vocabulary, and its next sentence; fairseq's; the last of
#: the layers that give DETR and its kin a box.
HEAD_PATHS = (
    *("predictions.decoder", "seq_relationship", "decoder.output_projection"),
    *("bbox_predictor.layers.2", "bbox_embed.layers.2", "bbox_embed.*.layers.2"),
)
#: Classes of whole networks, of Ultralytics' and torchvision's detectors and of transformers' heads, and their last
#: layers, which keep their role inside of another model: patterns of the names of modules in them.
HEADS_OF_CLASSES = {
    **dict.fromkeys(("ResNet", "GoogLeNet", "Inception3", "ShuffleNetV2", "RegNet", "Xception"), ("fc",)),
    "DenseNet": ("classifier",),
    "Classify": ("linear",),
    "Detect": ("cv?.*.2", "one2one_cv?.*.2"),
    "RTDETRDecoder": ("dec_score_head.*", "enc_bbox_head.layers.2", "dec_bbox_head.*.layers.2"),
    "SSDScoringHead": ("module_list.*",),
    "MobileBertLMPredictionHead": ("dense",),
    "PerceiverBasicDecoder": ("final_layer",),
    "SpeechT5SpeechDecoderPostnet": ("feat_out", "prob_out"),
}
#: Classes that are heads as a whole: torch's, and the loss of speaker verification.
HEAD_CLASSES = frozenset({"AdaptiveLogSoftmaxWithLoss", "AMSoftmaxLoss"})
#: Matched with the parameter's own name and with the last component of its module's path; patterns not with an
#: nn.Linear, which maps what it is given: patches, ResMLP's linear_tokens, ELECTRA's embeddings_project. embed_in is
#: NeoX's.
EMBEDDINGS = (
    *("wte", "wpe", "*embed", "*embeds", "*embedding", "*embeddings", "*embedding*", "emb", "*_emb", "*_token"),
    *("*_tokens", "embed_in", "embed", "embedding", "embeddings"),
)
#: Embeddings only where the module stands at the top of the model: T5's.
TOP_LEVEL_EMBEDDINGS = ("shared",)
#: Own names of inputs that are learned, a row a token: the queries of a resampler, a prompt. In attention modules these
#: are names of maps.
LEARNED_INPUTS = ("query", "queries", "*_query", "*_queries", "latent", "latents", "latents_*", "prompt", "prompts")
#: Words of a parameter's own name, between underscores, which say that it is a table of positions: Swin's
#: relative_position_bias_table, rel_pos_h of SAM and MViTv2, GPT-J's positions, height_rel of bottleneck attention.
POSITION_WORDS = frozenset({"position", "positions", "positional", "pos", "rel", "ape"})
#: Those of them that name projections, too, where they are words of a module's name.
PROJECTION_WORDS = frozenset({"pos", "rel"})
#: Words of a parameter's own name which say that it is added, one number an output; of stacked biases too: GPT-OSS's
#: gate_up_proj_bias, LeViT's attention_biases, those of a stacked ensemble; Dinat's rpb, of relative positions. As the
#: last word of an nn.Linear's name, beside one of positions, a table that is looked up: LayoutLMv3's rel_pos_x_bias.
BIAS_WORDS = frozenset({"bias", "biases", "rpb"})
#: Own names of tables that multiply element by element: state space models, RWKV, gains; PEFT's circulants, diagonals.
ELEMENTWISE = (
    *("a_log", "a_logs", "time_decay*", "time_first", "time_faaaa", "time_mix*", "time_maa*", "layer_scale*"),
    *("gamma", "gammas", "gain", "gains", "scale", "scales", "*_scale"),
    *("c3a_kernel", "randlora_lambda", "randlora_gamma"),
)
#: Classes and own names of theirs that are such tables, and elsewhere matrices, as AION's alpha; kernels that are mixed
#: for every sample, a row each, those of a depthwise convolution, a column each, and PEFT's angles of rotations.
ELEMENTWISE_OF_CLASSES = {
    "EfficientViMBlock": ("alpha",),
    "ZambaMambaMixer": ("d",),
    "CondConv2d": ("weight",),
    **dict.fromkeys(("Inkling2DynamicShortConvolution", "Inkling2LoopDynamicShortConvolution"), ("static_weight",)),
    "OFTRotationModule": ("weight",),
}
#: Words of a module's name which say normalization, of one that is no linear map or convolution.
NORM_WORDS = frozenset({"norm", "norms", "ln", "bn", "layernorm", "rmsnorm", "batchnorm", "groupnorm"})
#: Classes whose matrices are stored in x out. Hugging Face's experts say is_transposed themselves.
TRANSPOSED = frozenset({"Conv1D", "Llama4TextExperts", "GptOssExperts", "RecurrentGemmaRglru", "GroupedLinearLayer"})
#: Classes of which some weights are, by their own names.
TRANSPOSED_OF_CLASSES = {"DbrxExpertGLU": ("w2",)}
#: Own names of matrices without a layer of theirs, which are stored so too: CLIP's proj and text_projection, Gemma 3's
#: mm_input_projection_weight.
TRANSPOSED_NAMES = ("proj", "*_projection", "*_projection_weight")
#: Convolutions of others, (out, in / groups, *kernel).
CONVOLUTIONS = frozenset({"DeformConv2d"})
#: Classes whose three-dimensional weights are one matrix each and no stack: (width, heads x size), and of torch's
#: Bilinear, which maps the products of its inputs, (out, in x in).
FLATTENED = frozenset({"XLNetRelativeAttention", "FunnelRelMultiheadAttention", "Bilinear"})
#: Classes whose matrices lie one under the other, of groups of inputs or of experts, and how they call their number.
GROUPED = {"DeepseekV4GroupedLinear": "n_groups", "DbrxExpertGLU": "moe_num_experts"}
#: Path components that wrappers add and which say nothing of the layer.
WRAPPERS = frozenset(
    {"module", "model", "net", "base_model", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
    | {"base_layer", "original_module"}
)
#: Components after which the name of a PEFT adapter follows; the first stand for their layer, the others are parts.
ADAPTED = {"modules_to_save": True, "lora_a": False, "lora_b": False, "lora_embedding_a": False}
ADAPTED |= {"lora_embedding_b": False, "lora_magnitude_vector": False, "trainable_tokens_delta": False}
ADAPTED |= {"c3a_kernel": False, "randlora_lambda": False, "randlora_gamma": False}

#: Fused projections by the name of their module, or their own: what they hold, one under the other.
FUSED = {
    **dict.fromkeys(("qkv", "to_qkv", "qkv_proj", "wqkv", "c_attn", "in_proj_qkv"), ("q", "k", "v")),
    "qk": ("q", "k"),
    **dict.fromkeys(("gate_up_proj", "gate_up", "w12", "weights_in"), ("gate", "up")),
    **dict.fromkeys(("kv", "to_kv"), ("k", "v")),
}
#: Those that hold q, k and v head by head (NeoX, BLOOM), or key head by key head (Falcon, Megatron). timm's MaxViT
#: and CoAtNet say head_first themselves.
INTERLEAVED = frozenset({"query_key_value", "linear_qkv"})
#: Classes whose gate and up alternate row by row.
ALTERNATING = frozenset({"GptOssExperts"})
#: How attention modules and their configs call the numbers of heads, and of those of keys and values.
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_head", "n_heads")
KEY_VALUE_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_query_groups")

#: How attention modules call the maps to queries and to keys, where each has a weight of its own.
QUERY_KEY = (("q_proj", "k_proj"), ("query", "key"), ("wq", "wk"), ("to_q", "to_k"), ("q_lin", "k_lin"), ("q", "k"))
#: The same in latent attention (DeepSeek, Kimi), where the keys' weight holds the values' too; q_proj without a latent.
LATENT_QUERIES, LATENT_KEYS = ("q_b_proj", "q_proj", "wq_b", "wq"), ("kv_b_proj", "wkv_b")
#: How they and their configs call the rows of a head, and in latent attention those that are rotated and are not.
HEAD_SIZES = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
NOPE_SIZES, ROPE_SIZES = ("qk_nope_head_dim",), ("qk_rope_head_dim",)
#: The rows of a head's values, which in latent attention lie below those of its key.
VALUE_SIZES = ("v_head_dim",)
#: Norms of queries and keys: what is normalized does not know the size of its weights.
QUERY_KEY_NORMS = frozenset(
    {"q_norm", "k_norm", "qk_norm", "q_layernorm", "k_layernorm", "q_ln", "k_ln", "query_norm", "key_norm"}
    | {"norm_q", "norm_k", "query_layernorm", "key_layernorm", "query_layer_norm", "key_layer_norm"}
)
#: Classes whose fused rows have another order than their name says, queries, values, keys, and in how many blocks.
OTHER_ORDER = {"CodeGenAttention": 4}
