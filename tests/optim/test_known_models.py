"""What routing knows of other people's models: who says what, wrappers, orientation, fused projections."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import parametrizations

import steepest
from steepest.matrices import pieces
from steepest.routing import fused_layouts, param_groups, route
from support.training import name_of


def rules(params: Any) -> dict[str, str]:
    return {r.name: r.rule for r in route(params)}


def reasons(params: Any) -> dict[str, str]:
    return {r.name: r.reason for r in route(params)}


class Conv1D(nn.Module):
    """As that of transformers: x W."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok, self.body, self.fc = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.tok(x)))


class Around(nn.Module):
    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


# ---- roles ----------------------------------------------------------------------------------------------------------


def test_a_model_s_own_words_for_its_heads_and_embeddings() -> None:
    class Says(Around):
        def get_output_embeddings(self) -> nn.Module:
            return self.last

        def get_classifier(self) -> list[nn.Module]:
            return [self.other]

        def get_input_embeddings(self) -> nn.Module:
            return self.first

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(9, 4))

    model = Says(first=Table(), hidden=nn.Linear(4, 4), last=nn.Linear(4, 9), other=nn.Sequential(nn.Linear(4, 3)))
    assert reasons(model) | {"hidden.bias": ""} == {
        "first.w": "embedding, by get_input_embeddings of Says",
        "hidden.weight": "Linear",
        "hidden.bias": "",
        "last.weight": "head, by get_output_embeddings of Says",
        "last.bias": "1-D of Linear",
        "other.0.weight": "head, by get_classifier of Says",
        "other.0.bias": "1-D of Linear",
    }
    model = Says(first=nn.Linear(12, 4), hidden=nn.Linear(4, 4), last=nn.Linear(4, 9), other=nn.ReLU())
    assert rules(model)["first.weight"] == "matrix"  # of pixels


def test_a_method_without_an_answer_says_nothing() -> None:
    class Silent(Net):
        def get_output_embeddings(self) -> nn.Module:
            raise NotImplementedError

        def get_classifier(self, name: str) -> nn.Module:
            raise AssertionError(name)

    assert rules(Silent()) == rules(Net())


def test_a_network_keeps_its_head_in_a_wrapper_of_any_name() -> None:
    assert rules(Around(backbone=Net()))["backbone.fc.weight"] == "adamw"
    assert rules(Around(a=Around(b=Net())))["a.b.fc.weight"] == "adamw"

    class ResNet(Net):
        pass

    model = Around(left=ResNet(), right=Net())
    assert (rules(model)["left.fc.weight"], rules(model)["right.fc.weight"]) == ("adamw", "matrix")

    class MLPBlock(Around):
        pass

    assert rules(Around(block=MLPBlock(fc=nn.Linear(4, 4), proj=nn.Linear(4, 4))))["block.fc.weight"] == "matrix"


def test_a_head_in_a_list_is_known_by_the_name_of_the_list() -> None:
    """As RT-DETR's class embeddings, one for each layer; the parts of an nn.Sequential are layers of other names."""
    heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])
    decoder = Around(fc1=nn.Linear(8, 8), class_embed=heads, enc_class_embed=nn.ModuleList([nn.Linear(8, 3)]))
    saved = Around(modules_to_save=nn.ModuleDict({"default": nn.Linear(8, 3)}))  # a head that PEFT trains
    decoder.last_class_embed = nn.ModuleList([saved])
    inner = Around(score=nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    model = Around(encoder=nn.Linear(8, 8), a=Around(b=Around(decoder=decoder)), c=Around(d=Around(e=inner)))
    kinds = rules(model)
    assert {name for name, rule in kinds.items() if rule == "adamw" and name.endswith("weight")} == {
        "a.b.decoder.class_embed.0.weight",
        "a.b.decoder.class_embed.1.weight",
        "a.b.decoder.enc_class_embed.0.weight",
        "a.b.decoder.last_class_embed.0.modules_to_save.default.weight",
    }


def test_the_last_layer_of_a_box_is_a_head() -> None:
    boxes = Around(layers=nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)]))
    for model in (
        Around(body=nn.Linear(8, 8), bbox_predictor=boxes),
        Around(body=nn.Linear(8, 8), decoder=Around(bbox_embed=nn.ModuleList([boxes, boxes]))),
    ):
        kinds = {name.split("layers.")[1]: rule for name, rule in rules(model).items() if "layers." in name}
        assert {name: kinds[name] for name in kinds if "weight" in name} == {
            "0.weight": "matrix",
            "1.weight": "matrix",
            "2.weight": "adamw",
        }


def test_the_regions_of_a_detector_are_a_network_and_its_predictors_heads() -> None:
    regions = Around(
        box_head=Around(fc6=nn.Linear(12, 8), fc7=nn.Linear(8, 8)),
        box_predictor=Around(cls_score=nn.Linear(8, 5), bbox_pred=nn.Linear(8, 20)),
        keypoint_head=nn.Sequential(nn.Conv2d(8, 8, 3)),
    )

    class SSDScoringHead(Around):
        pass

    scores = SSDScoringHead(module_list=nn.ModuleList([nn.Conv2d(8, 6, 3)]))
    kinds = rules(Around(backbone=nn.Linear(8, 8), roi_heads=regions, head=Around(a=Around(b=Around(scores=scores)))))
    assert {name.removesuffix(".weight") for name, rule in kinds.items() if rule == "matrix"} == {
        "backbone",
        "roi_heads.box_head.fc6",
        "roi_heads.box_head.fc7",
        "roi_heads.keypoint_head.0",
    }


def test_a_linear_layer_that_is_a_table_of_relative_positions() -> None:
    """LayoutLM looks up columns of the weight of nn.Linear(buckets, heads)."""
    layers = {"rel_pos_bias": nn.Linear(32, 4), "rel_pos_x_bias": nn.Linear(32, 4), "rel_proj": nn.Linear(8, 8)}
    layers |= {"pos_bias_mlp": nn.Linear(8, 8), "bias": nn.Linear(8, 8)}
    model = Around(body=nn.Linear(8, 8), encoder=Around(**layers))
    tables = {"encoder.rel_pos_bias.weight", "encoder.rel_pos_x_bias.weight"}
    for params in (model, dict(model.named_parameters())):
        sent = {name for name, rule in rules(params).items() if rule == "adamw" and name.endswith("weight")}
        assert sent == tables
    assert reasons(model)["encoder.rel_pos_bias.weight"] == "embedding, by the word 'pos'"


@pytest.mark.parametrize(
    "name", ["cls_classifier", "distillation_classifier", "classifier_distill", "class_predictor", "output_projection"]
)
def test_names_of_last_layers(name: str) -> None:
    decoder = Around(layers=nn.ModuleList([Around(output_projection=nn.Linear(8, 8))]), **{name: nn.Linear(8, 5)})
    model = Around(encoder=nn.Linear(8, 8), decoder=decoder)
    assert rules(model)[f"decoder.{name}.weight"] == "adamw"
    assert rules(model)["decoder.layers.0.output_projection.weight"] == "matrix"


def test_tensors_that_are_one_in_memory_have_one_role() -> None:
    model = Around(tok=nn.Embedding(20, 8), body=nn.Linear(8, 8), out=nn.Linear(8, 20, bias=False))
    model.out.weight = nn.Parameter(model.tok.weight.data)
    assert reasons(model)["out.weight"] == "tied with tok.weight (Embedding)"
    model.out.weight = nn.Parameter(model.tok.weight.data.clone())
    assert rules(model)["out.weight"] == "matrix"


def test_scripted_modules_are_what_they_were() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(Around2())
    assert reasons(scripted) == reasons(Around2())


class Around2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok, self.norm, self.body = nn.Embedding(9, 4), nn.LayerNorm((4, 4)), nn.Linear(4, 4)
        self.grouped, self.depthwise = nn.Conv2d(8, 8, 3, groups=2), nn.Conv1d(8, 8, 3, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("name", "shape", "rule"),
    [
        ("qa_outputs.weight", (2, 8), "adamw"),
        ("cls.predictions.decoder.weight", (20, 8), "adamw"),
        ("encoder.layer.0.output.dense.weight", (8, 16), "matrix"),
        ("head_dist.weight", (5, 8), "adamw"),
        ("shared.weight", (20, 8), "adamw"),
        ("block.shared.weight", (20, 8), "matrix"),
        ("gpt_neox.embed_in.weight", (20, 8), "adamw"),
        ("blocks.0.attn.rel_pos_h", (7, 8), "adamw"),
        ("absolute_positions.weight", (7, 8), "adamw"),
        ("decomposition", (7, 8), "matrix"),
        ("decomposition.weight", (7, 8), "matrix"),
        ("attn.attention_biases", (4, 49), "adamw"),
        ("attn.pos_key_proj.weight", (8, 8), "matrix"),
        ("mixer.A_log", (64, 8), "adamw"),
        ("experts.gate_up_proj_bias", (4, 96), "adamw"),
        ("0.bias", (4, 32), "adamw"),
        ("layers.0.norm1.weight", (4, 32), "adamw"),
        ("layers.0.ln_1.weight", (4, 32), "adamw"),
        ("lm_head.modules_to_save.default.weight", (20, 8), "adamw"),
        ("base_model.model.score.modules_to_save.mine.weight", (5, 8), "adamw"),
        ("base_model.model.model.embed_tokens.lora_embedding_A.default", (2, 20), "adamw"),
        ("base_model.model.model.layers.0.q_proj.lora_A.default.weight", (2, 8), "matrix"),
        ("base_model.model.model.layers.0.q_proj.lora_A.default.weight", (1, 8), "adamw"),
        ("base_model.model.model.layers.0.q_proj.base_layer.weight", (8, 8), "matrix"),
        ("model.embed_tokens.trainable_tokens_delta.default", (2, 32), "adamw"),
        ("lm_head.trainable_tokens_delta.default", (2, 32), "adamw"),
        ("layers.0.q_proj.c3a_kernel.default", (4, 4, 8), "adamw"),
        ("layers.0.q_proj.randlora_lambda.default", (4, 8), "adamw"),
        ("layers.0.q_proj.randlora_gamma.default", (8, 32), "adamw"),
        ("layers.0.q_proj.hada_w1_a.default", (32, 4), "matrix"),
        ("layers.0.q_proj.lora_A.default", (4, 32), "matrix"),
    ],
)
def test_names_alone(name: str, shape: tuple[int, ...], rule: str) -> None:
    assert rules({name: nn.Parameter(torch.zeros(shape))}) == {name: rule}


# ---- orientation ----------------------------------------------------------------------------------------------------


class Raw(nn.Module):
    """A module with parameters of its own, by name and shape, and of any class."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


class RelAttention(Raw):
    pass


def test_learned_inputs_are_tables_but_for_the_maps_of_attention() -> None:
    shapes = {"query": (5, 8), "latents": (5, 8), "slot_queries": (5, 8), "kernel": (5, 8)}
    found = rules(nn.ModuleDict({"pool": Raw(**shapes), "attn": RelAttention(**shapes)}))
    assert [found[f"pool.{name}"] for name in shapes] == ["adamw", "adamw", "adamw", "matrix"]
    assert [found[f"attn.{name}"] for name in shapes] == ["matrix"] * 4
    named = {"pool.query": torch.zeros(5, 8), "self_attn.query": torch.zeros(5, 8), "up.weight": torch.zeros(5, 8)}
    assert list(rules({name: nn.Parameter(p) for name, p in named.items()}).values()) == ["adamw", "matrix", "matrix"]


def test_gains_of_two_dimensions_are_tables() -> None:
    ZambaMambaMixer = type("ZambaMambaMixer", (Raw,), {})
    shapes = {"D": (2, 8), "gamma": (2, 8), "weight": (2, 8)}
    model = nn.ModuleDict({"mixer": ZambaMambaMixer(**shapes), "other": Raw(**shapes), "norm": Raw(weight=(4, 8))})
    matrices = ["mixer.weight", "other.D", "other.weight"]  # D says nothing where the class is not known
    assert [name for name, rule in rules(model).items() if rule == "matrix"] == matrices
    assert rules(nn.ModuleDict({"norm": nn.Linear(4, 4, bias=False)})) == {"norm.weight": "matrix"}
    EfficientViMBlock = type("EfficientViMBlock", (Raw,), {})
    found = rules(nn.ModuleDict({"block": EfficientViMBlock(alpha=(4, 8)), "layer": steepest.AION(4, 3)}))
    assert [name for name, rule in found.items() if rule == "adamw"] == ["block.alpha", "layer.cosine", "layer.sine"]


def test_a_linear_map_of_patches_or_tokens_is_a_matrix_whatever_its_name() -> None:
    names = ("patch_embed", "linear_tokens", "vision_embed_tokens", "patch_embedding")
    assert set(rules(nn.ModuleDict({name: nn.Linear(6, 4, bias=False) for name in names})).values()) == {"matrix"}
    assert rules(nn.ModuleDict({"emb": nn.Linear(6, 4, bias=False), "up": nn.Linear(4, 6, bias=False)})) == {
        "emb.weight": "adamw",
        "up.weight": "matrix",
    }


def test_what_is_called_a_head_and_is_none() -> None:
    """Projections of attention, a convolution before the classifier, and a network inside of a head."""
    block = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, bias=False), "up": nn.Linear(8, 8, bias=False)})
    parts = {
        "attention": nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in ("q_head", "k_head", "v_head")}),
        "conv_head": nn.Conv2d(4, 8, 1, bias=False),
        "flow_head": nn.ModuleDict({"layers": nn.ModuleList([block]), "out": nn.Linear(8, 4, bias=False)}),
        "class_embed": nn.Linear(8, 5, bias=False),
    }
    found = rules(nn.ModuleDict(parts))
    assert [name for name, rule in found.items() if rule == "adamw"] == ["flow_head.out.weight", "class_embed.weight"]
    pool = nn.ModuleDict({"head": nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, bias=False)})})
    assert set(rules(pool).values()) == {"matrix"}


def test_matrices_without_a_layer_of_theirs_are_multiplied_from_the_right() -> None:
    shapes = {"text_projection": (4, 6), "mm_input_projection_weight": (4, 6), "proj": (4, 6), "w": (4, 6)}
    for model in (Raw(**shapes), {name: nn.Parameter(torch.zeros(s)) for name, s in shapes.items()}):
        read = [[piece.shape for piece in pieces((4, 6), **r.values)] for r in route(model)]
        assert read == [[(1, 6, 4)]] * 3 + [[(1, 4, 6)]]
    layer = nn.ModuleDict({"text_projection": nn.Linear(4, 6, bias=False)})
    assert [dict(r.values) for r in route(layer)] == [{}]


def test_linear_maps_in_groups_are_a_matrix_each() -> None:
    class DeepseekV4GroupedLinear(nn.Linear):
        n_groups = 3

    (r,) = route(DeepseekV4GroupedLinear(4, 6, bias=False))
    assert [piece.shape for piece in pieces((6, 4), **r.values)] == [(3, 2, 4)]


def test_a_flattened_kernel_is_one_matrix() -> None:
    class FunnelRelMultiheadAttention(Raw):
        pass

    (r,) = route(FunnelRelMultiheadAttention(r_kernel=(8, 2, 3)))
    assert [piece.shape for piece in pieces((8, 2, 3), **r.values)] == [(1, 8, 6)]


def test_matrices_stored_in_x_out_are_found_by_their_module() -> None:
    class Experts(nn.Module):
        is_transposed = True

        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.zeros(3, 4, 6))

    found = {r.name: (r.values, r.reason) for r in route(Around(up=Conv1D(4, 8), experts=Experts()))}
    assert found["up.weight"] == ({"transposed": True}, "Conv1D read as (8, 4), transposed")
    assert found["experts.up"] == (
        {"batch_dims": 1, "transposed": True},
        "Experts read as 3 matrices (6, 4), transposed",
    )


def test_the_ratio_of_the_learning_rate_is_that_of_out_by_in() -> None:
    model = Around(up=Conv1D(8, 32), down=Conv1D(32, 8), up_linear=nn.Linear(8, 32), down_linear=nn.Linear(32, 8))
    rows = [line.split() for line in steepest.Muon(model, lr=1.0).describe().splitlines()]
    rates = {row[0]: row[-2] for row in rows if row[0].endswith("weight")}
    assert rates["up.weight"] == rates["up_linear.weight"] == "2"
    assert rates["down.weight"] == rates["down_linear.weight"] == "1"


def test_splits_and_heads_of_a_transposed_weight_are_columns() -> None:
    w = torch.arange(24.0).reshape(4, 6)
    parts = pieces(w.shape, split_sizes=(4, 2), num_heads=(2, 1), transposed=True)
    plain = pieces((6, 4), split_sizes=(4, 2), num_heads=(2, 1))
    for a, b in zip(parts, plain, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a.view(w).reshape(a.shape), b.view(w.mT.contiguous()).reshape(b.shape))
        assert a.view(w).data_ptr() == w[:, a.start :].data_ptr()


def test_a_transposed_convolution_is_the_map_of_a_pixel_to_the_patch_that_it_makes() -> None:
    """Where stride and kernel agree, patches do not overlap, and the layer is a linear map of every pixel."""
    for groups in (1, 2):
        layer = nn.ConvTranspose2d(4, 6, (3, 2), stride=(3, 2), groups=groups, bias=False)
        (r,) = route(layer)
        (piece,) = pieces(layer.weight.shape, **r.values)
        matrices = piece.view(layer.weight).reshape(piece.shape)
        x = torch.randn(1, 4, 5, 7)
        pixels = x.unflatten(1, (groups, -1)).flatten(3)  # (1, groups, in, 35)
        patches = (matrices @ pixels).unflatten(2, (-1, 6)).unflatten(-1, (5, 7))
        patches = patches.unflatten(3, (3, 2)).permute(0, 1, 2, 5, 3, 6, 4).reshape(1, 6, 15, 14)
        torch.testing.assert_close(layer(x), patches)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("shape, groups", [((4, 6, 2, 2), 1), ((4, 3, 2, 2), 2), ((6, 4, 3), 1), ((4, 3, 2, 2, 2), 2)])
@pytest.mark.parametrize(
    "cls", [steepest.Muon, steepest.MuAdam, steepest.NorMuon, steepest.OneSidedShampoo, steepest.Dion2], ids=name_of
)
def test_a_transposed_convolution_steps_as_the_matrices_it_is_read_as(
    cls: Any, shape: tuple[int, ...], groups: int, backend: str
) -> None:
    def matrices(t: Tensor) -> Tensor:
        return t.reshape(groups, shape[0] // groups, -1).mT.contiguous()

    torch.manual_seed(0)
    module = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}[len(shape)]
    layer = module(shape[0], shape[1] * groups, shape[2:], groups=groups, bias=False)
    memory = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape), torch.contiguous_format)
    layer = layer.to(memory_format=memory) if groups > 1 else layer
    plain = nn.Parameter(matrices(layer.weight.detach()))
    first = cls(layer, lr=0.1, backend=backend)
    second = cls([{"params": [plain], "use_muon": True, "batch_dims": 1}], lr=0.1, backend=backend)
    for _ in range(3):
        layer.weight.grad = torch.randn(shape).to(memory_format=memory)
        plain.grad = matrices(layer.weight.grad)
        first.step()
        second.step()
    torch.testing.assert_close(matrices(layer.weight.detach()), plain.detach(), rtol=1e-4, atol=1e-5)
    first.load_state_dict(first.state_dict())


def test_the_ratio_of_a_transposed_convolution_is_that_of_outputs_by_inputs() -> None:
    model = Around(up=nn.ConvTranspose2d(4, 4, 2, 2), wide=nn.ConvTranspose2d(64, 4, 2, 2), last=nn.Linear(4, 4))
    rows = [line.split() for line in steepest.Muon(model, lr=1.0).describe().splitlines()]
    rates = {row[0]: row[-2] for row in rows if row[0].endswith("weight")}
    assert (rates["up.weight"], rates["wide.weight"]) == ("2", "1")
    assert "ConvTranspose2d read as (16, 64), transposed" in steepest.Muon(model).describe()


@pytest.mark.parametrize("kernel, stride", [(2, 2), (4, 2), (6, 2), (3, 1)])
def test_overlapping_patches_multiply_the_norm_of_a_transposed_convolution(kernel: int, stride: int) -> None:
    """The largest RMS of outputs by that of inputs, around a circle, when the weight is a step of sqrt(rows / cols) in
    the spectral norm: kernel / stride for a transposed convolution, 1 for a convolution. All entries alike attain it.
    """

    def norm(layer: nn.Module) -> float:
        (r,) = route(layer)
        (piece,) = pieces(r.param.shape, **r.values)
        with torch.no_grad():
            scale = (piece.rows / piece.cols) ** 0.5 / (piece.rows * piece.cols) ** 0.5
            r.param.copy_(torch.ones_like(r.param) * scale)

        def around(x: Tensor) -> Tensor:
            if isinstance(layer, nn.Conv1d):
                return layer(torch.cat([x, x[..., : kernel - stride]], -1))
            y = layer(x)
            whole, beyond = y.split([12 * stride, kernel - stride], -1)
            return whole + nn.functional.pad(beyond, (0, 12 * stride - beyond.shape[-1]))

        x = torch.zeros(1, 6, 12, dtype=torch.double)
        jacobian = torch.autograd.functional.jacobian(around, x)
        jacobian = jacobian.reshape(-1, x.numel())
        return float(torch.linalg.matrix_norm(jacobian, 2)) * (jacobian.shape[1] / jacobian.shape[0]) ** 0.5

    numbers = {"kernel_size": kernel, "stride": stride, "bias": False, "dtype": torch.double}
    assert norm(nn.ConvTranspose1d(6, 4, **numbers)) == pytest.approx(kernel / stride)
    assert norm(nn.Conv1d(6, 4, **numbers)) == pytest.approx(1)


def test_angles_of_rotations_are_no_matrices() -> None:
    class OFTRotationModule(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8, 6))

    assert rules(Around(q_proj=nn.Linear(8, 8), oft_R=nn.ModuleDict({"default": OFTRotationModule()}))) == {
        "q_proj.weight": "matrix",
        "q_proj.bias": "adamw",
        "oft_R.default.weight": "adamw",
    }


def test_the_last_layers_of_a_detector_are_heads_and_those_before_are_matrices() -> None:
    class Detect(Around):
        pass

    class Segment(Detect):
        pass

    def branch() -> nn.Module:
        return nn.ModuleList([nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))])

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Segment(cv2=branch(), cv3=branch(), one2one_cv3=branch()))
    found = {name: rule for name, rule in rules(model).items() if name.endswith("weight")}
    heads = {f"1.{name}.0.2.weight" for name in ("cv2", "cv3", "one2one_cv3")}
    assert {name for name, rule in found.items() if rule == "adamw"} == heads
    assert len(found) == 10


class EinMix(nn.Module):
    """As that of einops: the pattern says what the axes of the weight are."""

    def __init__(self, pattern: str, weight_shape: str, **lengths: int) -> None:
        super().__init__()
        self.pattern, self.weight_shape = pattern, weight_shape
        self.weight = nn.Parameter(torch.zeros(*map(lengths.__getitem__, weight_shape.split())))


@pytest.mark.parametrize(
    ("pattern", "axes", "read"),
    [
        ("b t c -> b t d", "c d", (1, 6, 4)),
        ("b t c -> b t d", "d c", (1, 6, 4)),
        ("b t c -> b s c", "t s", (1, 7, 5)),
        ("b (h c) -> b h d", "h c d", (2, 6, 4)),
        ("b (h c) -> b h d", "h d c", (2, 6, 4)),
        ("b t c -> b (d s)", "t d s", (1, 42, 5)),
        ("b (h c) -> b d", "d h c", (1, 6, 8)),
    ],
)
def test_the_pattern_of_an_einsum_says_what_is_an_output(pattern: str, axes: str, read: tuple[int, int, int]) -> None:
    layer = EinMix(pattern, axes, h=2, c=4, t=5, d=6, s=7)
    (r,) = route(layer)
    (piece,) = pieces(layer.weight.shape, **r.values)
    assert piece.shape == read
    steepest.Muon(layer)


def test_an_einsum_without_such_a_view_is_read_as_it_lies() -> None:
    (r,) = route(EinMix("b t c -> b d s", "d s c t", c=4, t=5, d=6, s=7))
    assert r.reason == "EinMix read as (6, 140)"


@pytest.mark.parametrize("make", [parametrizations.weight_norm, parametrizations.spectral_norm], ids=name_of)
def test_a_parametrized_weight_lies_as_its_layer_stores_it(make: Any) -> None:
    transposed = make(nn.ConvTranspose1d(4, 6, 3, groups=2))
    found = {r.name: r for r in route(Around(up=transposed, gpt=make(Conv1D(4, 8))))}
    values = {name: dict(r.values) for name, r in found.items() if r.rule == "matrix"}
    weight = "original1" if make is parametrizations.weight_norm else "original"
    assert values == {
        f"up.parametrizations.weight.{weight}": {"transposed": True, "num_heads": 2, "split_columns": True},
        f"gpt.parametrizations.weight.{weight}": {"transposed": True},
    }


def test_a_class_that_derives_from_a_known_one_is_known() -> None:
    class Mine(Conv1D):
        pass

    fully_sharded = type("FSDPConv1D", (FSDPModule, Conv1D), {})  # as fully_shard makes it
    layer = Conv1D(4, 8)
    layer.__class__ = fully_sharded
    for module in (Mine(4, 8), layer):
        assert [dict(r.values) for r in route(Around(up=module))] == [{"transposed": True}]


def test_scripted_and_traced_layers_are_read_as_what_they_were() -> None:
    layers: dict[str, nn.Module] = {
        "conv": nn.ConvTranspose2d(4, 6, 2, groups=2),
        "lstm": nn.LSTM(3, 4),
        "mha": nn.MultiheadAttention(8, 2),
        "gru": nn.GRUCell(3, 4),
    }
    plain = {r.name: (r.rule, dict(r.values)) for r in route(nn.ModuleDict(layers))}
    scripted = nn.ModuleDict({name: torch.jit.script(layer) for name, layer in layers.items()})
    assert {r.name: (r.rule, dict(r.values)) for r in route(scripted)} == plain
    traced = torch.jit.trace(nn.Sequential(nn.Conv2d(4, 4, 2, groups=4), nn.Conv2d(4, 6, 2)), torch.randn(1, 4, 4, 4))
    found = {r.name: r.reason for r in route(traced) if r.param.ndim > 1}
    assert found == {"0.weight": "depthwise by its shape (4, 1, 2, 2)", "1.weight": "Conv2d read as (6, 16)"}


def test_layers_of_torch_whose_weights_are_no_plain_matrices() -> None:
    model = Around(
        body=nn.Linear(4, 4),
        bilinear=nn.Bilinear(3, 4, 5),
        pair=nn.Bilinear(3, 4, 1),
        softmax=nn.AdaptiveLogSoftmaxWithLoss(8, 40, [10, 20], div_value=2.0),
    )
    found = {r.name: (r.rule, r.reason) for r in route(model)}
    assert found["bilinear.weight"] == ("matrix", "Bilinear read as (5, 12)")
    assert found["pair.weight"] == ("adamw", "a vector in disguise, shape (1, 3, 4)")
    assert found["softmax.tail.0.1.weight"] == ("adamw", "head, by AdaptiveLogSoftmaxWithLoss")


def test_experts_one_under_the_other_of_which_one_weight_is_transposed() -> None:
    class DbrxExpertGLU(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe_num_experts = 3
            self.w1, self.w2 = (nn.Parameter(torch.zeros(3 * 8, 4)) for _ in range(2))

    found = {r.name: r.reason for r in route(DbrxExpertGLU())}
    assert found["w1"] == "DbrxExpertGLU read as 3 matrices (8, 4)"
    assert found["w2"] == "DbrxExpertGLU read as 3 matrices (4, 8), transposed"


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("layout", [{}, {"split_sizes": (4, 4, 4)}, {"split_sizes": (4, 4, 4), "num_heads": 2}])
@pytest.mark.parametrize("shape", [(6, 12), (3, 6, 12)])
@pytest.mark.parametrize("cls", [steepest.Muon, steepest.MuAdam, steepest.SOAP, steepest.OneSidedShampoo])
def test_a_transposed_weight_steps_as_its_transpose(
    cls: Any, shape: tuple[int, ...], layout: dict[str, Any], backend: str
) -> None:
    torch.manual_seed(0)
    a = nn.Parameter(torch.randn(shape))
    b = nn.Parameter(a.detach().mT.contiguous())
    layout = {**layout, "use_muon": True, "batch_dims": len(shape) - 2}
    first = cls([{"params": [a], "transposed": True, **layout}], lr=0.1, backend=backend)
    second = cls([{"params": [b], **layout}], lr=0.1, backend=backend)
    for _ in range(3):
        a.grad = torch.randn(shape)
        b.grad = a.grad.mT.contiguous()
        first.step()
        second.step()
    torch.testing.assert_close(a.detach().mT, b.detach(), rtol=1e-5, atol=1e-5)
    first.load_state_dict(first.state_dict())


# ---- fused projections ----------------------------------------------------------------------------------------------


class Attention(Around):
    def __init__(self, heads: int, groups: int, **modules: nn.Module) -> None:
        super().__init__(**modules)
        self.num_heads, self.num_key_value_heads = heads, groups


class WithHeadSize(Attention):
    head_dim = 8


class LatentAttention(Attention):
    qk_nope_head_dim, v_head_dim = 3, 5


class CodeGenAttention(Attention):
    """Known by the name of its class: queries, values and keys in each of four blocks."""


@pytest.mark.parametrize(
    ("model", "layouts"),
    [
        (Attention(4, 2, qkv_proj=nn.Linear(8, 64)), {"a.qkv_proj.weight": {"split_sizes": (32, 16, 16)}}),
        (Attention(4, 4, c_attn=Conv1D(8, 24)), {"a.c_attn.weight": {"split_sizes": (8, 8, 8)}}),
        (
            Attention(4, 4, query_key_value=nn.Linear(8, 24)),
            {"a.query_key_value.weight": {"split_sizes": (8, 8, 8), "interleaved": 4}},
        ),
        (
            Attention(4, 2, linear_qkv=nn.Linear(8, 64)),
            {"a.linear_qkv.weight": {"split_sizes": (32, 16, 16), "interleaved": 2}},
        ),
        (Attention(4, 1, query_key_value=nn.Linear(8, 48)), {"a.query_key_value.weight": {"split_sizes": (32, 8, 8)}}),
        (
            CodeGenAttention(8, 8, qkv_proj=nn.Linear(16, 48)),
            {"a.qkv_proj.weight": {"split_sizes": (16, 16, 16), "interleaved": 4}},
        ),
        (Around(gate_up_proj=nn.Linear(8, 24)), {"a.gate_up_proj.weight": {"split_sizes": (12, 12)}}),
        (Around(w12=nn.Linear(8, 24)), {"a.w12.weight": {"split_sizes": (12, 12)}}),
        (Around(to_kv=nn.Linear(8, 16)), {"a.to_kv.weight": {"split_sizes": (8, 8)}}),
        (
            LatentAttention(4, 4, kv_b_proj=nn.Linear(6, 32)),
            {"a.kv_b_proj.weight": {"split_sizes": (12, 20), "interleaved": 4}},
        ),
        (Attention(4, 4, kv_b_proj=nn.Linear(6, 32)), {}),
        (LatentAttention(4, 4, kv_b_proj=nn.Linear(6, 36)), {}),
        (Around(qkv=nn.Linear(8, 24)), {}),
        (Attention(4, 2, qkv=nn.Linear(8, 63)), {}),
        (WithHeadSize(4, 4, query_key_value=nn.Linear(8, 48)), {}),  # four heads and two, not twelve of four rows
    ],
)
def test_fused_projections_are_hinted_at_and_taken_apart(model: nn.Module, layouts: dict[str, Any]) -> None:
    model = Around(a=model)
    assert fused_layouts(model) == layouts
    for name, values in layouts.items():
        text = ", ".join(f"{key}={value}" for key, value in values.items())
        assert f"; fused, not split: {text}" in reasons(model)[name]
        assert text in steepest.MuAdam(model).describe()
        group = param_groups(model, overrides=layouts)[0]
        assert {key: group[key] for key in values} == values
        steepest.MuAdam(param_groups(model, overrides=layouts))


def test_keys_and_values_of_latent_attention_are_those_that_it_takes() -> None:
    """As DeepSeek's attention does: of every head the rows of its key, and below them those of its value."""
    heads, key, value, rank = 4, 3, 5, 6
    weight = torch.randn(heads * (key + value), rank)
    latent = torch.randn(rank)
    attention = LatentAttention(heads, heads, kv_b_proj=nn.Linear(rank, len(weight), bias=False))
    layout = fused_layouts(Around(a=attention))["a.kv_b_proj.weight"]
    parts = [piece.view(weight).reshape(piece.shape)[0] @ latent for piece in pieces(weight.shape, **layout)]
    keys, values = (weight @ latent).view(heads, key + value).split([key, value], dim=-1)
    torch.testing.assert_close(parts[0], keys.flatten())
    torch.testing.assert_close(parts[1], values.flatten())
