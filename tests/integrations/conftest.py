"""Real packages, small models from configs, real training loops: `make test-integrations` installs what they need."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch

#: Operators that a torchvision without its compiled part wants to describe on import.
OPERATORS = ("nms", "qnms")
defined: list[torch.library.Library] = []


def pytest_configure() -> None:
    """timm imports torchvision, whose wheel asks for a torch with CUDA. Beside one without it does not load, and the
    import ends at the first operator that is not there: they are declared, which is all that the import asks for.
    """
    _without_sound()
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    try:
        torch.ops.load_library(Path(found.origin).with_name("_C.so"))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in OPERATORS:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        defined.append(library)


def _without_sound() -> None:
    """LLaMA-Factory imports torchaudio, which has no wheel for a torch without CUDA, and uses it for sound alone."""
    if importlib.util.find_spec("llamafactory") is not None and importlib.util.find_spec("torchaudio") is None:
        sys.modules["torchaudio"] = ModuleType("torchaudio")
        sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)
