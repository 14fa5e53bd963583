"""Time of one optimizer step on a 1.00M-parameter MLP: ours, the textbook form, and torch's AdamW.

    python tests/torch/bench_torch.py [seconds per optimizer]

Best step of several, one thread, in turns, so that all see the same machine. Prints milliseconds and ratios.
"""

import sys
import time

import numpy as np
import torch
from textbook_torch import Textbook

from lolo import small_fc_spec as spec
from lolo.torch import LoLO

WIDTHS = (784, 640, 640, 136, 10)


def draw_meta_params(hidden=32, seed=0, learn_decays=False):
    """φ with biases, and decay offsets, that are not zero, so that none can be forgotten."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=shape) / np.sqrt(shape[0] if name[0] == "w" else 100)).astype(np.float32) * scale
        for name, shape in spec.weight_shapes(hidden, learn_decays=learn_decays).items()
        for scale in [np.float32(0.5 if name.endswith("decays") else 1.0)]
    }


def following_momentum():
    """φ that needs no meta-training: d is the normalised momentum of decay 0.999."""
    phi = {name: np.zeros(shape, np.float32) for name, shape in spec.weight_shapes(2).items()}
    phi["w0"][4], phi["w1"][0, 0], phi["w1"][1, 1], phi["w2"][:, 0] = (1, -1), 1, 1, (1, -1)
    return phi


def mlp(widths=WIDTHS):
    layers = [torch.nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
    generator = torch.Generator().manual_seed(0)
    for param in (params := [p for layer in layers for p in layer.parameters()]):
        param.grad = torch.randn(param.shape, generator=generator) * 0.01
    return params


def measure(seconds=3.0, widths=WIDTHS):
    """Best seconds of one step for each optimizer, and the number of parameters."""
    torch.set_num_threads(1)
    meta_params = draw_meta_params()
    steps = {
        "lolo": LoLO(mlp(widths), weights=meta_params).step,
        "textbook": Textbook(mlp(widths), meta_params).step,
        "adamw foreach": torch.optim.AdamW(mlp(widths), foreach=True).step,
        "adamw fused": torch.optim.AdamW(mlp(widths), fused=True).step,
    }
    best = dict.fromkeys(steps, float("inf"))
    for step in steps.values():
        step()
    end = time.perf_counter() + seconds * len(steps)
    while time.perf_counter() < end:
        for name, step in steps.items():
            for _ in range(1 if name == "textbook" else 3):
                start = time.perf_counter()
                step()
                best[name] = min(best[name], time.perf_counter() - start)
    return best, sum(p.numel() for p in mlp(widths))


if __name__ == "__main__":
    best, parameters = measure(*map(float, sys.argv[1:]))
    print(f"torch {torch.__version__}, one thread, {parameters:,} parameters, best step")
    for name, value in best.items():
        print(f"{name:14} {1e3 * value:9.2f} ms   {best['textbook'] / value:7.1f}x the textbook's speed")
    print(f"lolo takes {best['lolo'] / best['adamw foreach']:.1f} times AdamW(foreach=True)")
