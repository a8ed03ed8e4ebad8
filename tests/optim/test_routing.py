"""routing: real structures go where they should, with the reason; overrides are checked; bad input is named."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.matrices import LAYOUT_KEYS, pieces
from steepest.routing import Route, format_table, param_groups, route, route_by_shape, summary


class GPT(nn.Module):
    """nanoGPT: fused c_attn, head tied to the token embedding."""

    def __init__(self, vocabulary: int = 50, width: int = 16) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, width),
                "wpe": nn.Embedding(8, width),
                "h": nn.ModuleList(
                    nn.ModuleDict(
                        {
                            "ln_1": nn.LayerNorm(width),
                            "attn": nn.ModuleDict(
                                {"c_attn": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)}
                            ),
                            "mlp": nn.ModuleDict(
                                {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
                            ),
                        }
                    )
                    for _ in range(2)
                ),
            }
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.transformer.wte.weight = self.lm_head.weight


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, width))  # two dimensions: only the class tells what it is


class Llama(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        block = {"wqkv": nn.Linear(width, 2 * width), "gate_up": nn.Linear(width, 6 * width), "norm": RMSNorm(width)}
        self.tok_embeddings = nn.Embedding(50, width)
        self.layers = nn.ModuleList([nn.ModuleDict(block)])
        self.output = nn.Linear(width, 50)


class ViT(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 4, 4)})
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(width, 4, 32)])
        self.head = nn.Linear(width, 10)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(
            nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 16, 3, groups=4)
        )
        self.fc = nn.Linear(16, 10)


class MoE(nn.Module):
    def __init__(self, experts: int = 4, width: int = 8) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.w_in = nn.Parameter(torch.zeros(experts, 4 * width, width))
        self.w_out = nn.Parameter(torch.zeros(experts, width, 2 * width))


def by_name(*args: Any, **kwargs: Any) -> dict[str, Route]:
    return {r.name: r for r in route(*args, **kwargs)}


def matrices(routes: dict[str, Route]) -> set[str]:
    return {name for name, r in routes.items() if r.rule == "matrix"}


def read_as(r: Route) -> list[tuple[int, int, int]]:
    return [piece.shape for piece in pieces(r.param.shape, **{k: r.values[k] for k in LAYOUT_KEYS if k in r.values})]


def test_nanogpt_with_a_tied_head() -> None:
    routes = by_name(GPT())
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert matrices(routes) == {f"transformer.h.{i}.{layer}.weight" for i in range(2) for layer in layers}
    assert routes["transformer.wte.weight"].reason == "Embedding, tied with lm_head.weight"
    assert "lm_head.weight" not in routes
    assert routes["transformer.wpe.weight"].reason == "Embedding"
    assert routes["transformer.h.0.ln_1.weight"].reason == "1-D of LayerNorm"
    assert routes["transformer.h.0.attn.c_attn.weight"].reason == "Linear"


def test_a_head_that_comes_first_is_still_tied_with_its_embedding() -> None:
    model = nn.ModuleDict(
        {"out_map": nn.Linear(8, 20, bias=False), "tok_emb": nn.Embedding(20, 8), "fc1": nn.Linear(8, 8)}
    )
    model["out_map"].weight = model["tok_emb"].weight
    assert by_name(model)["out_map.weight"].reason == "tied with tok_emb.weight (Embedding)"


def test_tied_hidden_layers_appear_once_and_stay_matrices() -> None:
    shared = nn.Linear(8, 8, bias=False)
    (only,) = route(nn.Sequential(shared, nn.ReLU(), shared))
    assert (only.rule, only.reason) == ("matrix", "Linear, tied with 2.weight")


def test_llama() -> None:
    routes = by_name(Llama(), overrides={"*.gate_up.weight": {"split_sizes": [48, 48]}})
    assert matrices(routes) == {"layers.0.wqkv.weight", "layers.0.gate_up.weight"}
    assert read_as(routes["layers.0.gate_up.weight"]) == [(1, 48, 16)] * 2
    assert routes["layers.0.wqkv.weight"].reason == "Linear"
    assert routes["layers.0.norm.weight"].reason == "normalization (RMSNorm)"
    assert routes["output.weight"].reason == "head, by the name pattern 'output'"


def test_a_hidden_layer_called_output_is_a_matrix() -> None:
    assert (
        by_name(nn.ModuleDict({"block": nn.ModuleDict({"output": nn.Linear(4, 4)})}))["block.output.weight"].rule
        == "matrix"
    )


def test_vit() -> None:
    routes = by_name(ViT())
    assert routes["cls_token"].reason == "embedding, by the name pattern '*_token'"
    assert routes["pos_embed"].reason == "embedding, by the name pattern '*embed'"
    assert routes["head.weight"].reason == "head, by the name pattern 'head'"
    assert routes["patch_embed.proj.weight"].reason == "Conv2d read as (16, 48)"
    assert read_as(routes["blocks.0.self_attn.in_proj_weight"]) == [(1, 16, 16)] * 3
    assert routes["blocks.0.self_attn.in_proj_weight"].reason == "MultiheadAttention read as 3 matrices (16, 16)"


def test_resnet() -> None:
    routes = by_name(ResNet())
    assert matrices(routes) == {"conv1.weight", "layer1.0.weight", "layer1.2.weight"}
    assert routes["layer1.1.weight"].reason == "depthwise Conv2d"
    assert routes["fc.weight"].reason == "head, by the name pattern 'fc'"
    assert read_as(routes["conv1.weight"]) == [(1, 8, 147)]
    assert routes["layer1.2.weight"].reason == "Conv2d read as 4 matrices (4, 36)"
    assert read_as(routes["layer1.2.weight"]) == [(4, 4, 36)]


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv1d(6, 4, 3), (1, 4, 18)),
        (nn.Conv1d(1, 4, 5), (1, 4, 5)),
        (nn.Conv3d(2, 4, 3), (1, 4, 54)),
        (nn.ConvTranspose2d(4, 6, 3), (1, 54, 4)),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 9, 2)),
    ],
)
def test_convolutions_are_flattened_group_by_group(conv: nn.Module, shape: tuple[int, int, int]) -> None:
    assert read_as(by_name(conv)["weight"]) == [shape]


def test_experts_are_a_batch() -> None:
    routes = by_name(MoE(), overrides={"w_in": {"split_sizes": (16, 16)}})
    assert read_as(routes["w_in"]) == [(4, 16, 8)] * 2
    assert read_as(routes["w_out"]) == [(4, 8, 16)]
    assert routes["w_out"].reason == "MoE read as 4 matrices (8, 16)"


@pytest.mark.parametrize(
    ("module", "gates"),
    [(nn.LSTM(6, 8), 4), (nn.GRU(6, 8), 3), (nn.LSTMCell(6, 8), 4), (nn.LSTM(6, 8, proj_size=5), 4)],
)
def test_recurrent_gates_are_matrices_of_their_own(module: nn.Module, gates: int) -> None:
    routes = by_name(module)
    inputs = next(r for name, r in routes.items() if name.startswith("weight_ih"))
    assert read_as(inputs) == [(1, 8, 6)] * gates
    assert routes.get("weight_hr_l0", inputs).rule == "matrix"


def test_plain_rnn_has_one_gate() -> None:
    assert read_as(by_name(nn.RNN(6, 8))["weight_ih_l0"]) == [(1, 8, 6)]


def test_fused_layers_keep_their_rule_under_a_name_like_a_head() -> None:
    assert (
        by_name(nn.ModuleDict({"multi_head": nn.MultiheadAttention(8, 2)}))["multi_head.in_proj_weight"].rule
        == "matrix"
    )


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("classifier.6.weight", "adamw"),
        ("head.fc.weight", "adamw"),
        ("heads.head.weight", "adamw"),
        ("module.fc.weight", "adamw"),
        ("_orig_mod.model.output.weight", "adamw"),
        ("decoder.weight", "adamw"),
        ("decoder.0.weight", "matrix"),
        ("blocks.0.mlp.fc.weight", "matrix"),
        ("blocks.0.sa.heads.0.key.weight", "matrix"),
        ("score.weight", "adamw"),
        ("unembedding", "adamw"),
        ("tok_emb.weight", "adamw"),
        ("model.embed_tokens.weight", "adamw"),
        ("encoder.wpe.weight", "adamw"),
        ("layers.0.relative_position_bias_table", "adamw"),
        ("register_tokens", "adamw"),
        ("layers.0.attention.query.weight", "matrix"),
    ],
)
def test_names_alone(name: str, rule: str) -> None:
    (r,) = route({name: nn.Parameter(torch.zeros(6, 4))})
    assert r.rule == rule


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((), "0-D"),
        ((4,), "1-D"),
        ((4, 1), "a vector in disguise, shape (4, 1)"),
        ((0, 4), "a vector in disguise, shape (0, 4)"),
        ((4, 1, 1), "a vector in disguise, shape (4, 1, 1)"),
        ((1, 9, 4), "a table, by the leading 1 of its shape (1, 9, 4)"),
        ((4, 1, 3, 3), "depthwise by its shape (4, 1, 3, 3)"),
    ],
)
def test_shapes_alone_for_adamw(shape: tuple[int, ...], reason: str) -> None:
    (r,) = route([torch.zeros(shape)])
    assert (r.name, r.rule, r.reason) == ("param_0", "adamw", reason)


@pytest.mark.parametrize(
    ("shape", "read"),
    [((4, 3), (1, 4, 3)), ((5, 4, 3), (5, 4, 3)), ((4, 2, 3, 3), (1, 4, 18)), ((4, 2, 3, 3, 3), (1, 4, 54))],
)
def test_shapes_alone_for_the_matrix_method(shape: tuple[int, ...], read: tuple[int, int, int]) -> None:
    (r,) = route([torch.zeros(shape)])
    assert r.rule == "matrix"
    assert read_as(r) == [read]


def test_norms_of_two_dimensions_and_unknown_embedding_classes() -> None:
    class VocabParallelEmbedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(20, 8))

    routes = by_name(nn.ModuleList([nn.LayerNorm((4, 4)), VocabParallelEmbedding(), nn.EmbeddingBag(20, 8)]))
    reasons = [routes[f"{i}.weight"].reason for i in range(3)]
    assert reasons == ["normalization (LayerNorm)", "VocabParallelEmbedding", "EmbeddingBag"]


def test_a_parametrized_layer_is_read_as_its_layer() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3, groups=2)))
    routes = by_name(model)
    assert read_as(routes["0.parametrizations.weight.original1"]) == [(2, 3, 18)]
    assert "vector in disguise" in routes["0.parametrizations.weight.original0"].reason


def test_frozen_parameters_are_left_out_of_a_model_but_not_of_bare_tensors() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    assert list(by_name(model)) == ["1.weight", "1.bias"]
    assert list(by_name(model.named_parameters())) == ["1.weight", "1.bias"]
    assert len(route(list(model.parameters()))) == 4


def test_names_from_named_parameters_a_mapping_and_a_meta_model_agree() -> None:
    with torch.device("meta"):
        model = GPT()
    expected = matrices(by_name(model))
    assert matrices(by_name(model.named_parameters())) == expected
    assert matrices(by_name(dict(model.named_parameters(remove_duplicate=False)))) == expected


# Overrides


def test_overrides_decide_in_order_by_name_and_by_type() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv2d(4, 8, 3), nn.Linear(8, 8))
    overrides = {"1.weight": {"num_heads": 2}, nn.Linear: "adamw", "2.*": "exclude"}
    routes = by_name(model, overrides=overrides)
    assert {name: r.rule for name, r in routes.items() if name.endswith("weight")} == {
        "0.weight": "adamw",
        "1.weight": "matrix",
        "3.weight": "adamw",
    }
    assert routes["1.weight"].values == {"num_heads": 2}
    assert routes["1.weight"].reason == "override '1.weight' read as 2 matrices (4, 8)"
    assert routes["0.weight"].reason == "override Linear"
    assert "2.bias" not in routes


def test_an_override_adds_to_the_layout_of_a_known_layer() -> None:
    r = by_name(nn.MultiheadAttention(8, 2), overrides={"in_proj_weight": {"num_heads": 2}})["in_proj_weight"]
    assert read_as(r) == [(2, 4, 8)] * 3
    r = by_name(nn.MultiheadAttention(8, 2), overrides={"in_proj_weight": {"split_sizes": None}})["in_proj_weight"]
    assert read_as(r) == [(1, 24, 8)]


def test_the_reason_counts_matrices_of_each_shape() -> None:
    (r,) = route(
        {"qkv": nn.Parameter(torch.zeros(20, 4))}, overrides={"qkv": {"split_sizes": (8, 12), "num_heads": (2, 2)}}
    )
    assert r.reason == "override 'qkv' read as 2 matrices (4, 4) and 2 matrices (6, 4)"


def test_an_override_reaches_a_tied_parameter_by_any_name_and_lets_vectors_pass() -> None:
    routes = by_name(GPT(), overrides={"lm_head.*": "matrix", "transformer.h.0.*": "matrix"})
    assert routes["transformer.wte.weight"].rule == "matrix"
    assert routes["transformer.h.0.ln_1.bias"].rule == "adamw"


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"lm_haed.weight": "adamw"}, ValueError, "'lm_haed.weight' matches no parameter; close names: lm_head.weight"),
        ({nn.LSTM: "adamw"}, ValueError, "LSTM matches no parameter: module types here: Embedding, LayerNorm, Linear"),
        ({"*.ln_1.weight": "matrix"}, ValueError, "matches only parameters with fewer than two dimensions"),
        ({"lm_head.weight": "muon"}, ValueError, "must be one of ('matrix', 'adamw', 'exclude')"),
        ({"*.c_attn.weight": {"num_head": 4}}, ValueError, "unknown value 'num_head': did you mean 'num_heads'?"),
        ({"*.c_attn.weight": {"use_muon": True}}, ValueError, "cannot set 'use_muon': routing fills it in"),
        ({"*.c_attn.weight": {"lr": {}}}, TypeError, "must hold plain values"),
        (
            {"*.c_attn.weight": {"num_heads": 5}},
            ValueError,
            "parameter 'transformer.h.0.attn.c_attn.weight': num_heads=5 does not divide the 48 rows",
        ),
        ({3: "adamw"}, TypeError, "override key must be a pattern on parameter names or a module type but is: 3"),
        ("lm_head", TypeError, "overrides must be a mapping"),
    ],
)
def test_bad_overrides(overrides: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        route(GPT(), overrides=overrides)


def test_a_type_override_needs_the_model() -> None:
    with pytest.raises(ValueError, match="module types need the model, not only names"):
        route(GPT().named_parameters(), overrides={nn.Linear: "adamw"})


def test_overrides_need_names() -> None:
    with pytest.raises(ValueError, match="overrides need names"):
        route(list(GPT().parameters()), overrides={"*": "adamw"})


# Groups


def test_groups_of_a_model() -> None:
    model = GPT()
    overrides = {"*.c_attn.weight": {"split_sizes": (16, 16, 16), "num_heads": 4}}
    groups = param_groups(model, overrides=overrides, matrix={"lr": 0.02}, adamw={"lr": 1e-3, "weight_decay": 0.1})
    assert [(g["use_muon"], g["lr"], g.get("weight_decay")) for g in groups] == [
        (True, 0.02, None),
        (True, 0.02, None),
        (False, 1e-3, 0.1),
        (False, 1e-3, 0.0),
    ]
    assert groups[0]["num_heads"] == 4
    assert "num_heads" not in groups[1]
    assert [name for name, _ in groups[2]["params"]] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert all(p.ndim < 2 for _, p in groups[3]["params"])
    assert all(len(g["params"]) == len(g["param_reasons"]) for g in groups)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    torch.optim.SGD(groups)  # the group format of torch.optim


def test_a_group_may_be_split() -> None:
    """By whoever gives one half another learning rate; a half has no reasons, which were given for all."""
    groups = steepest.param_groups(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 4)))
    matrices, vectors = groups
    halves = [{**matrices, "params": matrices["params"][:1], "lr": 0.1}, {**matrices, "params": matrices["params"][1:]}]
    optimizer = steepest.Muon([*halves, vectors])
    assert [group["lr"] for group in optimizer.param_groups[:2]] == [0.1, optimizer.defaults["lr"]]
    text = optimizer.describe()
    assert text.count("use_muon=True in its group") == 3
    assert text.count("1-D of Linear") == 3


def test_groups_without_a_weight_decay_or_with_one_of_an_override() -> None:
    assert len(param_groups(GPT(), adamw={"lr": 1e-3})) == 2
    overrides = {"*.ln_1.bias": {"rule": "adamw", "weight_decay": 0.3}}
    groups = param_groups(GPT(), overrides=overrides, adamw={"weight_decay": 0.1})
    assert [g.get("weight_decay") for g in groups] == [None, 0.1, 0.0, 0.3]


def test_groups_of_bare_tensors_have_no_names() -> None:
    tensors = [torch.zeros(4, 3, requires_grad=True), torch.zeros(4, requires_grad=True)]
    groups = param_groups(iter(tensors))
    assert [[p is t for p in g["params"]] for g, t in zip(groups, tensors, strict=True)] == [[True], [True]]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.ModuleDict({"head": nn.Linear(4, 4)}),
            (
                "none of 2 parameters goes to the matrix method (1 x head, by the name pattern 'head'; "
                "1 x 1-D of Linear). Use torch.optim.AdamW, or send one to the matrix "
                "method: overrides={'head.weight': \"matrix\"}"
            ),
        ),
        (
            nn.LayerNorm(4),
            "none of 2 parameters goes to the matrix method (2 x 1-D of LayerNorm). Use torch.optim.AdamW",
        ),
        (nn.Linear(4, 4).requires_grad_(False), "no trainable parameter among 2: all are frozen"),
        (nn.Linear(4, 4).state_dict(), "pass model.named_parameters()"),
    ],
)
def test_no_matrix_is_an_error_with_a_way_out(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        param_groups(model)


@pytest.mark.parametrize("side", ["matrix", "adamw"])
def test_bad_hyperparameters(side: str) -> None:
    with pytest.raises(TypeError, match=f"{side} must be a mapping of hyperparameters"):
        param_groups(GPT(), **{side: 0.02})
    with pytest.raises(ValueError, match=f"{side} cannot set 'use_muon'"):
        param_groups(GPT(), **{side: {"use_muon": True}})


# The warning


def test_bare_tensors_like_a_vocabulary_warn_once_and_name_the_way_out() -> None:
    tensors = [torch.empty(50304, 768, device="meta"), torch.empty(768, 8192, device="meta"), torch.empty(64, 64)]
    with pytest.warns(
        UserWarning, match=r"param_0 \(50304, 768\), param_1 \(768, 8192\)\..*model.named_parameters"
    ) as seen:
        route(tensors)
    assert len(seen) == 1


def test_a_head_with_an_unknown_name_warns_until_an_override_chooses() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"last": nn.Linear(64, 50304)})
    with pytest.warns(UserWarning, match=r'last.weight \(50304, 64\).*overrides=\{"NAME": "adamw"\}'):
        route(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        route(model, overrides={"last.weight": "matrix"})


def test_hidden_layers_do_not_warn() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"up": nn.Linear(4096, 14336), "gate_up": nn.Linear(2048, 16384 - 8)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        route(model)


# Bad input


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ("model", TypeError, "should be an iterable of Tensors or dicts, but got str: pass a model"),
        (torch.zeros(3, 3), TypeError, "should be an iterable of Tensors or dicts, but got Tensor"),
        ({torch.zeros(3, 3)}, TypeError, "should be an iterable of Tensors or dicts, but got set"),
        (3, TypeError, "should be an iterable of Tensors or dicts, but got int"),
        ([], ValueError, "optimizer got an empty parameter list: no parameters in list"),
        (nn.ReLU(), ValueError, "no parameters in ReLU"),
        ([3.0], TypeError, "optimizer can only optimize Tensors, but 'param_0' is float"),
        ({"w": 3.0}, TypeError, "optimizer can only optimize Tensors, but 'w' is float"),
        ([{"params": []}], TypeError, "parameter groups (dict) are already routed"),
        ([("w", torch.zeros(3, 3)), torch.zeros(3, 3)], ValueError, "Some param names are missing"),
        ([("w", torch.zeros(3, 3)), ("w", torch.zeros(3))], ValueError, "two parameters have the same name"),
        (nn.LazyLinear(4), ValueError, "parameter 'weight' has no shape yet (lazy module)"),
    ],
)
def test_bad_input(params: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        route(params)


def test_route_by_shape_is_route() -> None:
    tensors = [torch.zeros(4, 3), torch.zeros(7), torch.zeros(5, 4, 3)]
    with pytest.warns(DeprecationWarning, match=r"call steepest\.routing\.route"):
        routes = route_by_shape(tensors)
    assert [(r.name, r.rule, r.reason, dict(r.values)) for r in routes] == [
        (r.name, r.rule, r.reason, dict(r.values)) for r in route(tensors)
    ]


# Text


def test_summary() -> None:
    def routes(*sizes: tuple[int, ...]) -> list[Route]:
        tensors: list[Tensor] = [torch.empty(size, device="meta") for size in sizes]
        return route(tensors)

    text = summary(routes((2048, 3072), (4, 3), (39, 1000, 1), (7,)), "MuAdam")
    assert text == "2 matrices (6.3M) by MuAdam, 2 others (39.0K) by AdamW"
    assert summary(routes((4, 3)), "Muon") == "1 matrix (12) by Muon"


def test_format_table_aligns_and_rounds() -> None:
    text = format_table([("a", 0.0123456, None), ("long", 1.0, "cuda")], ("name", "lr", "backend"))
    assert text.splitlines() == ["name       lr  backend", "a     0.01235  -", "long        1  cuda"]


def test_format_table_refuses_a_ragged_row() -> None:
    with pytest.raises(ValueError, match="a row has 2 cells for 6 columns"):
        format_table([("a", 1)])


def test_groups_without_names_hold_tensors_and_every_number_of_adamw() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.LayerNorm(6))
    groups = param_groups(model, names=False, matrix={"lr": 0.02}, adamw={"weight_decay": 0.1})
    adamw = {"use_muon": False, "lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8}
    assert [{key: value for key, value in group.items() if key != "params"} for group in groups] == [
        {"use_muon": True, "lr": 0.02},
        {**adamw, "weight_decay": 0.1},
        {**adamw, "weight_decay": 0.0},
    ]
    assert [list(map(id, group["params"])) for group in groups] == [
        [id(model[1].weight)],
        [id(model[0].weight)],
        [id(model[1].bias), id(model[2].weight), id(model[2].bias)],
    ]
    assert param_groups(model, names=False, adamw={"lr": 0.1, "betas": (0.8, 0.9)})[1]["lr"] == 0.1


@pytest.mark.parametrize("cls", [steepest.Muon, steepest.MuAdam])
def test_groups_without_names_have_the_numbers_of_the_optimizers(cls: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
    with_names, without = (cls(param_groups(model, names=names)).param_groups for names in (True, False))
    drop = {"param_names"}
    for one, other in zip(with_names, without, strict=True):
        assert {k: v for k, v in one.items() if k not in drop | {"params"}} == {
            k: v for k, v in other.items() if k != "params"
        }
