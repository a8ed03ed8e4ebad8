"""What this machine can run: versions, devices, the compiled part and every backend, as data and as text."""

from __future__ import annotations

import platform
from typing import Any

import torch

from steepest._version import __version__
from steepest.ops import backend


def diagnose() -> dict[str, Any]:
    """What `doctor` prints before its checks, as plain data: versions, devices, the compiled part and every backend."""
    return {
        "steepest": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "driver_cuda": backend.driver_cuda(),
        "devices": [_device(index) for index in range(torch.cuda.device_count())],
        "triton": _triton_version(),
        "compiled": backend.extension.build_info() if backend.extension is not None else None,
        "compiled_reason": backend.extension_reason,
        "forced": None if backend.forced == "auto" else backend.forced,
        "backends": {name: {"available": ok, "reason": reason} for name, (ok, reason) in backend.backends().items()},
    }


def describe(facts: dict[str, Any]) -> str:
    """`diagnose()` as text for a person."""
    driver = f"CUDA {facts['driver_cuda']}" if facts["driver_cuda"] else "not asked (torch sees no CUDA device)"
    lines = [
        f"steepest  {facts['steepest']}",
        f"python    {facts['python']}",
        f"torch     {facts['torch']} (CUDA {facts['torch_cuda'] or 'none'}; driver: {driver})",
        f"triton    {facts['triton'] or 'not installed'}",
        f"devices   {', '.join(facts['devices']) or 'no CUDA device'}",
        *(f"compiled  {line}" for line in _describe_build(facts)),
        "backends  (in order of preference)",
    ]
    for name, state in facts["backends"].items():
        lines.append(f"  {name:<7} {'yes' if state['available'] else 'no '}  {state['reason']}")
    if facts["forced"]:
        known = facts["forced"] in facts["backends"]
        then = (
            "every op that has kernels uses it, or fails" if known else "no backend has this name, and every op fails"
        )
        lines.append(f"STEEPEST_BACKEND={facts['forced']} is set: {then}")
    return "\n".join(lines)


def _describe_build(facts: dict[str, Any]) -> list[str]:
    info = facts["compiled"]
    if info is None:
        return [f"no: {facts['compiled_reason']}"]
    cuda = f"CUDA {info['cuda']} for {', '.join(info['architectures'])}" if info["cuda"] else "without CUDA"
    commit = f", commit {info['commit']}" if info["commit"] else ""
    hopper = f"{'with' if info['hopper'] else 'without'} products for Hopper"
    lines = [f"{info['version']} {cuda}, {hopper}; torch {info['torch']} headers, {info['compiler']}{commit}"]
    if not info["hopper"] and any("_90" in name for name in info["architectures"]):
        lines.append(f"WARNING: {backend.NO_HOPPER}")
    return lines


def _device(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} ({major}.{minor})"


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)
