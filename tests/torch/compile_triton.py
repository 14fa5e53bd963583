"""Compile every launch of a step for a GPU, which needs none: run by test_triton_compiles.py, without the interpreter.

Prints as JSON the names of the kernels, and of those that keep numbers of a thread in memory how many bytes.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lolo.torch import LoLO, kernel, triton_kernel

TYPES = {torch.int64: "*i64", torch.int32: "*i32", torch.float32: "*fp32"}
OPTIONS = ("num_warps", "enable_fp_fusion", "maxnreg")


class Recorder:
    """Stands where a kernel does: a launch compiles it for the arguments that it gets, as a launch on a GPU would."""

    def __init__(self, function, target, found):
        self.function, self.target, self.found = function, target, found

    def __getitem__(self, grid):
        assert all(n > 0 for n in grid)
        return self

    def __call__(self, *args, **kwargs):
        names = self.function.arg_names
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        assert sorted(values) == sorted(names), "an argument is missing, or too many"
        kinds = {name: self.kind(name, value) for name, value in values.items()}
        constants = {name: value for name, value in values.items() if kinds[name] == "constexpr"}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if kinds[name][0] == "*"}
        source = ASTSource(self.function, {name: kinds[name] for name in names}, constants, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", self.target, 32), options=options)
        spilled = self.found.setdefault(self.function.__name__, [])
        spilled.append(stack(compiled.asm["cubin"]))

    def kind(self, name, value):
        if name.isupper():
            return "constexpr"
        return TYPES[value.dtype] if isinstance(value, torch.Tensor) else {float: "fp32", int: "i32"}[type(value)]


def stack(cubin):
    """Bytes of a thread's numbers that lie in memory."""
    path = Path(sys.argv[2]) / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", said)[1])


def steps(found, target):
    """Steps that launch every kernel, and the one of the network in each of its forms."""
    from drawn import norm_fc_file

    jit = {name: x for name, x in vars(triton_kernel.kernels()).items() if isinstance(x, triton.JITFunction)}
    recorders = {name: Recorder(function, target, found) for name, function in jit.items()}
    own = type(triton_kernel.kernels())(**recorders, tl=triton.language)
    triton_kernel.kernels = lambda: own
    kernel.form = lambda group, space: triton_kernel.FORM
    for dtype, settings, arguments in (
        (torch.float32, {"orthogonal": False}, {}),
        (torch.bfloat16, {"step_rms": "adam"}, {"state_dtype": torch.bfloat16, "is_matrix": True}),
    ):
        params = [torch.randn(shape, dtype=dtype) for shape in ((8, 64), (40, 40), (7, 33), (12,), (5,))]
        for param in params:
            param.grad = torch.randn_like(param)
        LoLO(params, norm_fc_file(**settings), **arguments).step()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    found = {}
    steps(found, int(sys.argv[1]))
    print(json.dumps(found))
