"""TorchTune: its own single-device recipe, with the optimizer after backward and in it, and resume."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

torchtune = pytest.importorskip("torchtune", reason="torchtune is not installed (make test-trainers)")


from omegaconf import OmegaConf  # noqa: E402
from torchtune import config  # noqa: E402
from torchtune.models.llama3 import llama3  # noqa: E402

import steepest  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
NUMBERS = {"adjust_lr_fn": "match_rms_adamw", "lr": 3e-4, "weight_decay": 0.1}


def model() -> torch.nn.Module:
    sizes = {"vocab_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 16}
    return llama3(**sizes, max_seq_len=32, intermediate_dim=24)


class Tokenizer:
    pad_id = 0


class Data(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, tokenizer: Tokenizer) -> None:
        pass

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        ids = [(3 * i + j) % 64 for j in range(9)]
        return {"tokens": ids, "labels": ids}


class StoppedError(Exception):
    pass


@pytest.fixture
def recipe() -> Iterator[Any]:
    """The recipe's class; its folder is no package, and the parts that a configuration names are this file's."""
    path = Path(torchtune.__file__).parents[1] / "recipes" / "full_finetune_single_device.py"
    spec = importlib.util.spec_from_file_location("a_recipe", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["parts_of_a_recipe"] = sys.modules[__name__]
    yield module.FullFinetuneRecipeSingleDevice
    del sys.modules["parts_of_a_recipe"]


def ran(cls: Any, folder: Path, name: str = "MuAdam", *, resume: bool = False, stop: int = 9, **options: Any) -> Any:
    """The recipe after its epochs, or after those before `stop`."""
    torch.manual_seed(0)
    (folder.parent / "base").mkdir(exist_ok=True)
    torch.save(model().state_dict(), folder.parent / "base" / "model.pt")
    files = {"checkpoint_dir": str(folder.parent / "base"), "output_dir": str(folder), "model_type": "LLAMA3"}
    files["checkpoint_files"] = ["epoch_0/model-00001-of-00001.bin" if resume else "model.pt"]
    parts = {"model": "model", "tokenizer": "Tokenizer", "dataset": "Data"}
    cfg = OmegaConf.create(
        {
            **{part: {"_component_": f"parts_of_a_recipe.{part_of}"} for part, part_of in parts.items()},
            "optimizer": {"_component_": f"steepest.{name}", **NUMBERS},
            "checkpointer": {"_component_": "torchtune.training.FullModelTorchTuneCheckpointer", **files},
            "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
            "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": str(folder)},
            "output_dir": str(folder),
            "seed": 0,
            "shuffle": False,
            "batch_size": 4,
            "epochs": 2,
            "max_steps_per_epoch": None,
            "gradient_accumulation_steps": 1,
            "clip_grad_norm": None,
            "optimizer_in_bwd": False,
            "resume_from_checkpoint": resume,
            "compile": False,
            "device": "cpu",
            "dtype": "fp32",
            **options,
        }
    )

    class Recipe(cls):  # type: ignore[misc]
        def save_checkpoint(self, epoch: int) -> None:
            super().save_checkpoint(epoch)
            if epoch + 1 == stop:
                raise StoppedError

    made = Recipe(cfg)
    made.setup(cfg)
    with contextlib.suppress(StoppedError):
        made.train()
    made.cleanup()
    return made


SCHEDULE = "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup"
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "SOAP": {"name": "SOAP"},
    "bf16, accumulated and clipped": {"dtype": "bf16", "gradient_accumulation_steps": 2, "clip_grad_norm": 1.0},
    "scheduled": {"lr_scheduler": {"_component_": SCHEDULE, "num_warmup_steps": 1}},
    "in backward": {"optimizer_in_bwd": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_resume_is_the_same_bit_for_bit(recipe: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    whole = ran(recipe, tmp_path / "whole", **options)
    ran(recipe, tmp_path / "begun", stop=1, **options)
    resumed = ran(recipe, tmp_path / "begun", resume=True, **options)
    untrained = torch.load(tmp_path / "base" / "model.pt")
    trained = whole._model.state_dict()
    assert all(torch.equal(p, resumed._model.state_dict()[name]) for name, p in trained.items())
    assert not any(torch.equal(p, untrained[name].to(p.dtype)) for name, p in trained.items() if p.ndim > 1)


def test_two_learning_rates_are_more_than_a_recipe_can_log(recipe: Any, tmp_path: Path) -> None:
    """Why the page says one number twice."""
    cls = type("Recipe", (recipe,), {"_setup_optimizer": lambda self, **_: steepest.MuAdam(self._model, lr=2e-3)})
    with pytest.raises(RuntimeError, match="LR Schedulers are different across all param groups"):
        ran(cls, tmp_path / "whole")


@pytest.mark.parametrize("named", [False, True])
def test_names_route_embeddings_and_heads(named: bool) -> None:
    network = model()
    cfg = OmegaConf.create({"_component_": "steepest.MuAdam", **NUMBERS})
    optimizer = config.instantiate(cfg, network.named_parameters() if named else network.parameters())
    kinds = {p: group["use_muon"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: kinds[p] for name, p in network.named_parameters()}
    assert found["layers.0.attn.q_proj.weight"]
    assert not found["layers.0.sa_norm.scale"]
    assert found["tok_embeddings.weight"] is found["output.weight"] is not named
