"""The way that a step with factors goes on a GPU, with tensors that have a device and no values.

They refuse to be read. Streams are stand-ins.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steepest
from steepest.linalg.basis import WANTS_EXACT
from steepest.ops import streams
from steepest.parts import Kronecker
from steepest.parts.precondition import rotated
from steepest.recipe import CLOCK

METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "shampoo": (steepest.Shampoo, {"max_preconditioner_dim": 4}),
    "shampoo, newton": (steepest.Shampoo, {"inverse_root": "newton"}),
    "one-sided, newton": (steepest.OneSidedShampoo, {"inverse_root": "newton", "norm": "sign"}),
    "kl-shampoo": (steepest.KLShampoo, {}),
    "kl-shampoo, newton": (steepest.KLShampoo, {"inverse_root": "newton"}),
    "soap": (steepest.SOAP, {}),
    "soap, authors": (steepest.SOAP, {"parity": "authors"}),
    "soap, rotations": (steepest.SOAP, {"refresh": "jr"}),
    "soap, 16 bits": (steepest.SOAP, {"factor_dtype": torch.bfloat16}),
    "soap, no factors": (steepest.SOAP, {"max_preconditioner_dim": 1}),
    "splus": (steepest.SPlus, {"average_rate": 0.0, "refresh": "auto"}),
}


class Log:
    """What was asked of the streams, and every refresh's methods."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        refresh = rotated.eigh_refresh

        def read(tensors: Sequence[Tensor]) -> list[int]:
            assert all(t.device.type == "meta" and t.dtype == torch.int32 for t in tensors)
            self.events.append("read")
            return [WANTS_EXACT if i % 2 else 0 for i in range(sum(len(t) for t in tensors))]

        def beside(device: torch.device, tensors: Any) -> Any:
            assert all(t.device == device for t in tensors)
            self.events.append("beside")
            return nullcontext()

        def refreshed(p: Tensor, q: Tensor, **how: Any) -> Any:
            self.events.append(how["method"])
            return refresh(p, q, **how)

        patch.setattr(rotated, "eigh_refresh", refreshed)
        patch.setattr(streams, "read", read)
        patch.setattr(streams, "beside", beside)
        patch.setattr(streams, "join", lambda tensors=None: self.events.append("join"))
        patch.setattr(streams, "written", lambda tensors: self.events.append("written"))


@pytest.mark.parametrize(
    ("name", "delay"),
    [
        *(pytest.param(name, 2, marks=() if name == "soap" else pytest.mark.slow) for name in METHODS),
        ("soap", 0),
        ("shampoo, newton", 0),
    ],
)
def test_a_step_keeps_to_the_device(name: str, delay: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (cls, options), log = METHODS[name], Log(monkeypatch)
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in ((8, 5), (5, 5), (8, 5))]
    optimizer = cls(params, **{"precondition_frequency": 3, "refresh_delay": delay, **options})
    happened = []
    for _ in range(6):  # a refresh in the first step and the fourth, taken with the last where there is a delay
        for p in params:
            p.grad = torch.empty_like(p)
        log.events.clear()
        optimizer.step()
        happened.append(list(log.events))
    devices = {(key == CLOCK, t.device.type) for state in optimizer.state.values() for key, t in state.items()}
    assert devices == {(True, "cpu"), (False, "meta")}
    log.events.clear()
    optimizer.state_dict()
    assert log.events == ["join"]
    part: Kronecker = optimizer.recipe(optimizer.param_groups[0]).kronecker
    reads = isinstance(part, rotated.Rotated) and part.method == "auto" and options.get("max_preconditioner_dim") != 1
    for step, events in enumerate(happened):
        phase = part.phase(step)
        assert ("read" in events) == (phase.refreshes and step > 0 and reads)
        assert ("beside" in events) == (phase.refreshes and step > 0 and delay > 0)
        assert ("written" in events) == phase.refreshes
        assert (
            ("join" in events) == phase.commits == (delay > 0 and step > delay and part.phase(step - delay).refreshes)
        )
        if phase.commits:
            assert events[0] == "join"
        if "read" in events:
            assert {"eigh", "auto"} <= set(events)
        if "beside" in events:  # the host reads first; all solving is done there
            assert "read" not in events[events.index("beside") :]
            assert not {"eigh", "auto", "jr", "qr"} & set(events[: events.index("beside")])
