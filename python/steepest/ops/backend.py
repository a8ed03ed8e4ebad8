"""Which backend an op runs on: compiled CUDA kernels, Triton, compiled host code or plain torch, in this order.

An op asks `choose` with the reasons, if any, why each backend cannot take the call. The caller's `backend=` argument
or the environment variable STEEPEST_BACKEND forces one; a forced backend that cannot run is an error that names the
reason. Under "auto" the first that can run is taken, and the first time an op falls back to it, the reason is logged
(logger "steepest"; a warning when the tensors are on a GPU). Kernels that fail their self-check have a reason as well.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from . import selfcheck
from .environment import switch
from .extension import LIBRARY, Extension, OtherSourcesError
from .tracing import assume_constant_result

NAMES = ("cuda", "triton", "cpu", "torch")
MINIMUM_TORCH = (2, 10)
OLDEST_DEVICE = (8, 0)
NO_HOPPER = (
    "the products for Hopper were not built, and a Hopper GPU takes the slower route, products one by one in Triton; "
    "for the fast one `pip install --no-deps nvidia-cutlass` and rebuild with STEEPEST_CUDA=1"
)

logger = logging.getLogger("steepest")
# Read once: looking at the environment in every step would cost more than some of the launches.
forced = os.environ.get("STEEPEST_BACKEND") or "auto"
# Whether a matrix' bits may not depend on which others share its launches; see `steepest.ops.polar_chain`.
batch_invariant = switch("STEEPEST_BATCH_INVARIANT", False)
_logged: set[tuple[str, str, str]] = set()


def _load_extension() -> tuple[Extension | None, str | None]:
    """The compiled library, or the reason why there is none and what to do."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MINIMUM_TORCH:
        return None, f"torch {torch.__version__} is older than 2.10, which the compiled part needs; upgrade torch"
    if not LIBRARY.exists():
        return None, "the compiled part is not built; run `pip install --no-build-isolation .` in the source tree"
    try:
        return Extension(LIBRARY, _interface()), None
    except OtherSourcesError:
        return None, "the compiled part is not of these sources; run `pip install --no-build-isolation -e .` again"
    except OSError as error:
        return None, f"the compiled part does not load ({error}); rebuild it against torch {torch.__version__}"


def _interface() -> str | None:
    """A hash of what the sources that this file lies among declare; None where there are none."""
    source = Path(__file__).parents[3] / "csrc" / "library.cpp"
    return hashlib.sha256(source.read_bytes()).hexdigest() if source.exists() else None


extension, extension_reason = _load_extension()


def has_cpu_products(bf16: bool = False) -> bool:
    """Whether products of the library's own, of fp32 or of bf16, are compiled for this processor."""
    return extension is not None and _has_products(extension, bf16)


@functools.cache
def _has_products(library: Extension, bf16: bool) -> bool:
    return library.cpu_products(bf16)


def wants_cpu_calls() -> bool:
    """Whether nothing says at present that torch's operations are to do what the library does on a CPU."""
    return requested("auto") in ("auto", "cpu")


def takes_cpu_products() -> bool:
    """Whether fp32 products are there for this processor, and nothing says that torch's are to be taken."""
    return wants_cpu_calls() and has_cpu_products()


def target(architecture: str) -> tuple[int, int]:
    """The compute capability of "sm_80", "sm_90a" or "compute_120"."""
    major, minor = divmod(int(architecture.partition("_")[2].rstrip("af")), 10)
    return major, minor


def covers(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether a binary with these targets ("sm_80", "sm_90a", "compute_120") runs on a device of this capability.

    sm_XY runs on the same major version with at least that minor one, the suffixed sm_90a on exactly that device;
    compute_XY (PTX) is compiled by the driver for anything newer, a suffixed one again only for its own.
    """
    for name in architectures:
        built = target(name)
        if built == capability:
            return True
        if name[-1].isdigit() and built < capability and (name.startswith("compute") or built[0] == capability[0]):
            return True
    return False


@assume_constant_result
def cuda_reason(index: int | None = None) -> str | None:
    """Why the compiled CUDA kernels cannot run on this device (None: the current one); None when they can."""
    if index is None and torch.cuda.is_available():
        index = torch.cuda.current_device()  # before the cache: the answer belongs to the device, not to "current"
    return _cuda_reason(index)


@functools.cache
def _cuda_reason(index: int | None) -> str | None:
    if torch.version.hip is not None:
        return _not_cuda()
    if extension is None:
        return extension_reason
    if not torch.cuda.is_available():  # first: nothing that is to be built or installed would help
        return _no_device()
    info = extension.build_info()
    if info["cuda"] is None:
        return (
            "the compiled part was built without CUDA; install the CUDA toolkit (nvcc in CUDA_HOME/bin, on PATH or in "
            "/usr/local/cuda/bin) and rebuild with STEEPEST_CUDA=1"
        )
    if (reason := _driver_reason(info["cuda"])) is not None:
        return reason
    capability = torch.cuda.get_device_capability(index)
    wanted = ".".join(str(part) for part in capability)
    if capability < OLDEST_DEVICE:
        return f"the kernels are for compute capability {OLDEST_DEVICE[0]}.{OLDEST_DEVICE[1]} and newer, not {wanted}"
    if not covers(info["architectures"], capability):
        built = ", ".join(info["architectures"])
        return f"built for {built} and the device is {wanted}; rebuild with TORCH_CUDA_ARCH_LIST={wanted}"
    return None


def _driver_reason(built: str) -> str | None:
    """Machine code runs on drivers of its own CUDA major version, whatever the minor one, and on newer ones."""
    driver = driver_cuda()
    if driver is None:
        return None
    ours, theirs = (tuple(int(part) for part in version.split(".")[:2]) for version in (built, driver))
    arguments = (12, 1)  # from here on a launch may carry 32 KB, and ours do
    if ours[0] <= theirs[0] and not (ours >= arguments > theirs):
        return None
    built = ".".join(built.split(".")[:2])
    return f"built with CUDA {built}, the driver takes {driver}; update the driver or rebuild with an older toolkit"


def driver_cuda() -> str | None:
    """The newest CUDA version the driver supports ("12.8"), as torch sees it; None where torch sees no CUDA device."""
    if not torch.cuda.is_available():
        return None
    number = int(torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]
    return f"{number // 1000}.{number % 1000 // 10}"


@assume_constant_result
def triton_reason() -> str | None:
    """Why the Triton kernels cannot run on this machine; None when they can."""
    return _triton_reason()


@functools.cache
def _triton_reason() -> str | None:
    if torch.version.hip is not None:
        return _not_cuda()
    if not torch.cuda.is_available():
        return _no_device()
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; `pip install triton` (Linux)"
    if importlib.util.find_spec("steepest.kernels") is None:
        return "steepest.kernels is not importable; install the package instead of only pointing PYTHONPATH at it"
    return None


def _not_cuda() -> str:
    """A device of ROCm is "cuda" to torch, and its capability numbers look like NVIDIA's."""
    return (
        f"torch {torch.__version__} is a build for ROCm {torch.version.hip}, and the kernels are for NVIDIA GPUs; "
        "steps run in torch operations"
    )


def _no_device() -> str:
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a build without CUDA; on a machine with a GPU install a CUDA build of torch"
        )
    return "no CUDA device; `nvidia-smi` shows whether the driver sees one"


def backends() -> dict[str, tuple[bool, str]]:
    """Every backend by name: whether this machine can run it, and why or why not (with what to do)."""
    cuda, triton = cuda_reason(), triton_reason()
    return {
        "cuda": (cuda is None, cuda or "compiled kernels match the device"),
        "triton": (triton is None, triton or "Triton and a CUDA device are there"),
        "cpu": (extension is not None, extension_reason or "the compiled part is there"),
        "torch": (True, f"torch {torch.__version__}"),
    }


def requested(backend: str) -> str:
    """The caller's choice, or STEEPEST_BACKEND where that is "auto". ValueError when either is not a backend's name."""
    for source, name in (("backend", backend), ("STEEPEST_BACKEND", forced)):
        if name != "auto" and name not in NAMES:
            raise ValueError(f"{source}={name!r} is not a backend; use 'auto', 'cuda', 'triton', 'cpu' or 'torch'")
    return forced if backend == "auto" else backend


def choose(op: str, backend: str, reasons: Mapping[str, str | None], device: torch.device, family: str) -> str:
    """The backend that runs this call of `op`.

    reasons: for every backend that the op has a version for, why it cannot take the call, or None. torch always can,
    and takes what is forced to a backend that the op has no version for. family: of the op's kernels, which are checked
    before they are taken for the first time (`steepest.ops.selfcheck`).
    Raises ValueError for an unknown name and RuntimeError, with the reason, when a forced backend cannot run.
    """
    name = requested(backend)
    if name not in reasons and name != "auto":
        return "torch"
    if name == "auto":
        why = dict(reasons)
        for chosen in NAMES:
            if why.get(chosen, "") is None:
                why[chosen] = selfcheck.reason(family, chosen, device)
            if chosen == "torch" or why.get(chosen, "") is None:
                break
        log_once(op, chosen, why, device)
        return chosen
    if (reason := reasons.get(name) or selfcheck.reason(family, name, device)) is not None:
        raise RuntimeError(f"{op}: backend={name!r} cannot run: {reason}. {_way_out(backend)}")
    return name


def compiled_wanted() -> bool:
    """Whether an op without a `backend=` of its own asks the compiled kernels: not where torch.compile traces torch's
    operations instead, nor where another backend is forced."""
    return not torch.compiler.is_compiling() and requested("auto") in ("auto", "cuda")


def checked(family: str, device: torch.device, name: str = "cuda") -> str | None:
    """Why an op without a `backend=` of its own does not take kernels that nothing else speaks against: they failed
    their self-check. RuntimeError where STEEPEST_BACKEND forces them."""
    reason = selfcheck.reason(family, name, device)
    if reason is not None and requested("auto") == name:
        raise RuntimeError(f"{family}: backend={name!r} cannot run: {reason}. {_way_out('auto')}")
    return reason


def _way_out(backend: str) -> str:
    """What to do where a backend cannot run that the caller, or else the environment, forces."""
    if backend == "auto":
        return "STEEPEST_BACKEND forces it; unset it to take one that can"
    return "backend='auto' takes one that can"


def prepare(families: Iterable[str], device: torch.device) -> None:
    """The kernels of these families that a GPU's next steps may ask for are checked now."""
    for family in families if selfcheck.enabled and device.type == "cuda" else ():
        for name in selfcheck.FAMILIES[family]:
            if requested("auto") in ("auto", name) and selfcheck.check_of(family).static(name, device) is None:
                checked(family, device, name)


def log_once(op: str, chosen: str, reasons: Mapping[str, str | None], device: torch.device) -> None:
    """The first time that an op falls back to this backend."""
    best = "cpu" if device.type == "cpu" else NAMES[0]
    if torch.compiler.is_compiling() or chosen == best or (op, device.type, chosen) in _logged:
        return
    _logged.add((op, device.type, chosen))
    why = "; ".join(f"{name}: {reasons[name]}" for name in NAMES[: NAMES.index(chosen)] if name in reasons)
    level = logging.WARNING if device.type == "cuda" else logging.INFO
    logger.log(level, "%s runs on %s (%s)", op, chosen, why)
