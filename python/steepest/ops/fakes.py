"""What torch.compile is told of the ops: what they write, and that no metadata changes.

A fake is a kernel for tensors without memory. `torch.library.register_fake` says the same and looks for the caller's
source besides, which takes a tenth of the time that it takes to import this package.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Fake = Callable[..., None]

_library = torch.library.Library("steepest", "IMPL", "Meta")


def register_fake(name: str) -> Callable[[Fake], Fake]:
    """Makes the decorated function the fake of `torch.ops.steepest.NAME`."""

    def register(fake: Fake) -> Fake:
        _library.impl(name, fake)
        return fake

    return register
