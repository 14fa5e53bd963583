"""`small_fc` in textbook form in PyTorch: one [*shape, 39] tensor per parameter, tensor by tensor.

Independent of `lolo.torch`: the reference for its values and its speed.
"""

import numpy as np
import torch

DECAYS = torch.tensor([0.9, 0.99, 0.999])
TIMESCALES = torch.tensor([1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5])


class Textbook:
    """meta_params: dict of arrays w0, b0, w1, b1, w2, b2 and optionally decay offsets."""

    def __init__(
        self,
        params,
        meta_params,
        step_mult=1e-3,
        exp_mult=1e-3,
        weight_decay=0.0,
        clock_limit=float("inf"),
        step_decay=float("inf"),
    ):
        self.params, self.phi = list(params), {n: torch.tensor(np.array(x)) for n, x in meta_params.items()}
        self.step_mult, self.exp_mult, self.weight_decay = step_mult, exp_mult, weight_decay
        self.clock_limit, self.step_decay, self.clock = clock_limit, step_decay, 0
        self.momentum_decay = self.shifted(DECAYS, "momentum_decays")
        self.rms_decay = self.shifted(torch.tensor([0.999]), "rms_decays")
        self.factored_decay = self.shifted(DECAYS, "adafactor_decays")
        self.state = [self.begin(p.reshape(-1) if p.ndim == 0 else p) for p in self.params]

    def shifted(self, decay, name):
        offset = self.phi.get(name, torch.zeros(1))
        return (1 - (1 - decay) * torch.exp(10 * offset)).clamp(0, 1)

    def begin(self, p):
        return [
            torch.zeros(*p.shape, 3),
            torch.zeros(p.shape),
            [torch.zeros(*x.shape, 3) for x in factored_means(torch.zeros(p.shape))],
        ]

    @torch.no_grad()
    def step(self):
        time = torch.tanh(min(self.clock, self.clock_limit) / TIMESCALES - 1)
        for index, param in enumerate(self.params):
            g, p = (x.reshape(1) if x.ndim == 0 else x for x in (param.grad, param))
            m, v, factored = self.state[index]
            m = self.momentum_decay * m + (1 - self.momentum_decay) * g[..., None]
            v = self.rms_decay * v + (1 - self.rms_decay) * g**2
            factored = [
                self.factored_decay * old + (1 - self.factored_decay) * new[..., None]
                for old, new in zip(factored, factored_means(g**2 + 1e-30), strict=True)
            ]
            self.state[index] = [m, v, factored]
            x = torch.cat([inputs(g, p, m, v, factored), time.expand(*g.shape, 11)], dim=-1)
            h = torch.relu(x @ self.phi["w0"] + self.phi["b0"])
            h = torch.relu(h @ self.phi["w1"] + self.phi["b1"])
            direction, magnitude = (h @ self.phi["w2"] + self.phi["b2"]).unbind(-1)
            change = direction * torch.exp(self.exp_mult * magnitude) + self.weight_decay * p
            scale = self.step_mult / (1 + self.clock / self.step_decay) ** 0.5
            param.add_((-scale * change).reshape(param.shape))
        self.clock += 1


def inputs(g, p, m, v, factored):
    """Columns 1-28, each divided by its root mean square over the tensor. Returns: [*shape, 28]."""
    axes = two_largest_axes(g.shape)
    if axes is None:
        (f,) = factored
        row = column = f
        factor, momentum_factor = torch.rsqrt((f + 1e-9).clamp(min=1e-9)), torch.rsqrt(f + 1e-6)
    else:
        d0, d1 = axes
        row, column = (x.unsqueeze(axis) for x, axis in zip(factored, axes, strict=True))
        mean = row.mean(dim=d1, keepdim=True)
        factor = torch.rsqrt((row / (mean + 1e-9)).clamp(min=1e-9)) * torch.rsqrt(column.clamp(min=1e-9))
        momentum_factor = factor
        row, column = (x.expand(*g.shape, 3) for x in (row, column))
    root = torch.rsqrt(v + 1e-6)[..., None]
    columns = [
        *(g[..., None], p[..., None], m, v[..., None], m * root, root, g[..., None] * factor, row, column),
        *(torch.rsqrt(row + 1e-8), torch.rsqrt(column + 1e-8), m * momentum_factor),
    ]
    x = torch.cat(columns, dim=-1)
    return x * torch.rsqrt(1e-5 + (x**2).mean(dim=tuple(range(g.ndim)), keepdim=True))


def two_largest_axes(shape):
    """(d0, d1): axes of the largest and second largest extent; among equals the later is the larger. None below 2."""
    if len(shape) < 2:
        return None
    order = np.argsort(tuple(shape), kind="stable")
    return int(order[-1]), int(order[-2])


def factored_means(squared):
    axes = two_largest_axes(squared.shape)
    return [squared] if axes is None else [squared.mean(dim=axis) for axis in axes]
