"""Whether the kernels of a family compute what they should on this device: checked once, before they are used.

    reason("elementwise", "cuda", device)     None, or why these kernels are not used in this process

A check (`steepest.ops.checks`) runs the kernels on small fixed inputs, with every edge that has code of its own, and
compares what they wrote with torch's operations on the same device. It takes milliseconds, plus Triton's compilation,
and reads one flag from the device. A plan asks before its first step writes anything, an op that is called directly at
its first call. Nothing is checked while a CUDA graph is captured, which is an error as long as nothing has been, nor
while torch.compile traces, which traces torch's operations.

Kernels that give wrong numbers, write beside their tensors, do not compile or do not launch get a reason, like a
machine that lacks them: the next backend takes the call, and one warning says what was wrong on which device and
versions. A backend that is forced raises RuntimeError instead. After a CUDA error that leaves the context unusable
nothing can run any more, and RuntimeError says to restart with STEEPEST_BACKEND=torch.

A check does not find races that did not happen while it ran, faults at sizes that it does not have, nor memory that is
read and not used. STEEPEST_SELFCHECK=0 turns all checks off; `steepest doctor` runs every one in a process of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .._version import __version__
from .environment import switch

if TYPE_CHECKING:
    from .checks.comparison import Comparison

logger = logging.getLogger("steepest")
# Read once, as STEEPEST_BACKEND is.
enabled = switch("STEEPEST_SELFCHECK", True)

#: Families of kernels that are checked together, and the backends that have them.
FAMILIES = {
    "elementwise": ("cuda", "triton", "cpu"),
    "normalization": ("cuda", "cpu"),
    "products": ("triton",),
    "fp32 products": ("triton",),
    "polar chain": ("cuda",),
    "weight update": ("cuda",),
    "small polar": ("cuda",),
    "chain numbers": ("cuda",),
    "eigh refresh": ("cuda",),
    "eigenvectors": ("cuda",),
}

_verdicts: dict[tuple[str, str, torch.device], str | None] = {}
_running = threading.local()
_lock = threading.RLock()


@dataclass(frozen=True)
class Check:
    """What is known of a family: `run` calls the kernels of a backend and says what they should have written.

    static: why a backend cannot run on a device, whatever its kernels compute; None where it can.
    """

    static: Callable[[str, torch.device], str | None]
    run: Callable[[str, Comparison], None]


def check_of(family: str) -> Check:
    """The check of a family, whose module is imported when it is first wanted."""
    module = importlib.import_module(".checks." + family.replace(" ", "_"), __package__)
    check: Check = module.CHECK
    return check


def reason(family: str, backend: str, device: torch.device) -> str | None:
    """Why this backend's kernels of a family are not used on this device; None where they are.

    device: with its index. Raises RuntimeError while a CUDA graph is captured and nothing has been checked, and where a
    check left the device unusable.
    """
    if not enabled or torch.compiler.is_compiling() or device.type != ("cpu" if backend == "cpu" else "cuda"):
        return None
    key = (family, backend, device)
    if key in _verdicts:
        return _verdicts[key]
    if getattr(_running, "now", False) or torch._guards.detect_fake_mode() is not None:
        return None
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{family}: a CUDA graph is being captured, and the {backend} kernels have not been checked on {device} "
            "yet; run one step before capturing, or set STEEPEST_SELFCHECK=0"
        )
    with _lock:
        if key not in _verdicts:
            try:
                verdict = run(family, backend, device)
            except torch.OutOfMemoryError:  # which says nothing of the kernels: the next plan asks again
                logger.info("there is no memory left on %s for the self-check of %s by %s", device, family, backend)
                return None
            if verdict is not None:
                logger.warning(report(family, backend, device, verdict))
                verdict = f"its kernels failed their self-check: {verdict}"
            _verdicts[key] = verdict
    return _verdicts[key]


def run(family: str, backend: str, device: torch.device) -> str | None:
    """What is wrong with these kernels by a check that is made now; None where nothing is.

    Raises torch.OutOfMemoryError where memory runs out, and RuntimeError where the check left the device unusable.
    """
    from .checks.comparison import Comparison

    _running.now = True
    try:
        with _undisturbed(device):
            comparison = Comparison(device)
            check_of(family).run(backend, comparison)
            return comparison.verdict()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler's, a launcher's, CUDA's: of many kinds
        if not is_usable(device):
            raise RuntimeError(
                f"the self-check of {family} by {backend} left {device} unusable ({_first_line(error)}): nothing more "
                f"can run there in this process. Restart with STEEPEST_BACKEND=torch, and please report this, with "
                f"{versions(device)}, to {tracker()}"
            ) from error
        return _first_line(error)
    finally:
        _running.now = False


def is_usable(device: torch.device) -> bool:
    """Whether work still runs on a device; after an illegal access, for example, none does.

    Asked twice: an error that is over is reported once, by whatever comes next.
    """
    for _ in range(2):
        with contextlib.suppress(Exception):
            return bool(torch.ones((), device=device).add_(1).item() == 2)
    return False


def report(family: str, backend: str, device: torch.device, verdict: str) -> str:
    """The warning: what failed, where, on which versions, and whom to tell."""
    return (
        f"the {backend} kernels of {family} failed their self-check on {device} and are not used: {verdict}. The next "
        f"backend takes their place. Please report this, with {versions(device)}, to {tracker()}"
    )


def versions(device: torch.device) -> str:
    """What a report should say of device and software."""
    name = f"CPU ({torch.backends.cpu.get_cpu_capability()})"
    if device.type == "cuda":
        name = str(device)
        with contextlib.suppress(Exception):  # also of a device that is unusable
            capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
            driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
            name = f"{torch.cuda.get_device_name(device)} ({capability}), CUDA {torch.version.cuda}, driver {driver}"
    from importlib import metadata

    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return f"{name}, steepest {__version__}, torch {torch.__version__}, Triton {triton}"


def tracker() -> str:
    """The address to report to, from the package's metadata, if there is one."""
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError):
        urls = metadata.metadata("steepest").get_all("Project-URL") or []
        named = dict(url.split(", ", 1) for url in urls)
        for name in ("Issues", "Repository", "Homepage"):
            if name in named:
                return named[name]
    return "the issue tracker of steepest"


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Nothing that the caller has set for his own tensors changes a check, or sees it."""
    current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with (
        _disable_current_modes(),
        torch._C._DisableFuncTorch(),  # type: ignore[attr-defined]
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        current,
    ):
        yield


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
