"""Triton's interpreter, which executes kernels on the CPU: in a new process, and with what it gets wrong mended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parents[1]


def run_interpreted(file: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python FILE ARGUMENTS...` in a new process: Triton reads TRITON_INTERPRET when it decorates a kernel."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, file, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


def mend_the_interpreter() -> None:
    """bf16 as on GPUs, rounded to nearest instead of cut and its subnormals exact; and numpy 2.4 for Triton 3.6."""
    import triton.language as tl
    from triton.runtime import interpreter

    cut, patch = interpreter._convert_float, interpreter._patch_lang_tensor

    def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(data.copy()).to(torch.bfloat16).view(torch.int16).numpy().view("uint16")
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.view("uint16").astype("uint32") << 16
        return cut(data, source, target, mode)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._convert_float, interpreter._patch_lang_tensor = convert, patch_tensor


def multiply_in_bf16() -> None:
    """numpy has no bf16: the interpreter would multiply its bits as integers."""
    import triton.language as tl
    from triton.runtime import interpreter

    dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, *given: Any) -> Any:
        factors = [
            interpreter.TensorHandle((x.data.view("uint16").astype("uint32") << 16).view("float32"), tl.float32)
            if x.dtype.scalar == tl.bfloat16
            else x
            for x in given[:2]
        ]
        return dot(self, *factors, *given[2:])

    interpreter.InterpreterBuilder.create_dot = create_dot
