"""`small_fc` as a `torch.optim.Optimizer`; it needs no JAX.

    from lolo.torch import LoLO

    optimizer = LoLO(model.parameters())

The same function as `lolo.small_fc`, computed features-first and in blocks that stay in cache: 16 inputs per
entry, those of the row and column moments in their own smaller spaces, normalisation folded into the first weights and
time into the first bias. Small tensors of equal shape share a block, so that many leaves cost little. Written in plain
torch operations, which any device has, and tuned for CPUs (docs/performance.md has a GPU's times).
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lolo.optimizers import small_fc_spec as spec
from lolo.optimizers import weights_file
from lolo.torch.blocks import (
    Batch,
    BlockLayout,
    Network,
    Rule,
    Workspace,
    arrange,
    as_weights,
    layout,
    network_from,
    restore,
    step_batch,
)
from lolo.torch.precision import full_precision

SMALLEST_RATE = 0.02  # of an lr that is no mistake
# What AdamW and SGD take and LoLO has no use for, and why.
SETTINGS = ("lr", "weights", "weight_decay", "clock_limit", "step_decay", "maximize", "freeze_unseen")
OTHERS = {
    **dict.fromkeys(
        ("betas", "eps", "momentum", "dampening", "nesterov", "amsgrad"), "its averages come with the weights"
    ),
    **dict.fromkeys(
        ("fused", "foreach", "capturable", "differentiable"), "there is one implementation for all devices"
    ),
    "decoupled_weight_decay": "its weight decay is always decoupled",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHARDED = {"DTensor", "FlatParameter", "ShardedTensor"}


def check_parameter(param: Any) -> None:
    """Raise TypeError for what LoLO can't move. What is no tensor at all is torch's to refuse."""
    if not isinstance(param, torch.Tensor):
        return
    if any(kind.__name__ in SHARDED for kind in type(param).__mro__) or getattr(param, "_fsdp_flattened", False):
        raise TypeError(
            f"LoLO got a sharded parameter ({type(param).__name__}, FSDP or tensor parallel): its normalisation needs "
            "means over the whole tensor. Use DistributedDataParallel, or keep these parameters unsharded."
        )
    if param.dtype not in DTYPES:
        cure = " Optimize torch.view_as_real of it." if param.is_complex() else ""
        raise TypeError(f"LoLO got a parameter of {param.dtype}; it moves {', '.join(map(str, DTYPES))}.{cure}")
    if param.layout != torch.strided:
        raise TypeError(f"LoLO got a parameter of layout {param.layout}; it needs dense ones.")


def check_gradient(param: torch.Tensor) -> None:
    """Raise RuntimeError for gradients that are not plain dense tensors."""
    grad = param.grad
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"LoLO got a gradient of layout {grad.layout} for a parameter of shape {tuple(param.shape)}; it needs "
            "dense ones: build the embedding with sparse=False, or call grad.to_dense()."
        )
    if any(kind.__name__ in SHARDED for kind in type(grad).__mro__):
        raise RuntimeError("LoLO got a sharded gradient: its normalisation needs means over the whole tensor.")


def refuse_others(given: Iterable[str]) -> None:
    """Raise TypeError for arguments of other optimizers."""
    for name in given:
        if name in OTHERS:
            raise TypeError(f"LoLO has no {name}: {OTHERS[name]}. Leave it out; all that LoLO needs is its parameters.")


def as_float32(grad: torch.Tensor) -> torch.Tensor:
    """A gradient in float32, in which finite numbers stay finite."""
    if grad.dtype != torch.float64:
        return grad.float()
    largest = torch.finfo(torch.float32).max
    return torch.where(grad.isinf(), grad, grad.clamp(-largest, largest)).float()


def limited(grad: torch.Tensor) -> torch.Tensor:
    """The gradient, finite entries within ±LARGEST_GRADIENT; infinite ones become ∞, and NaN stays, to be seen."""
    # Nearly always nothing is to do; on an accelerator to ask would cost more than a copy.
    if grad.device.type == "cpu" and float(torch.linalg.vector_norm(grad, math.inf)) <= spec.LARGEST_GRADIENT:
        return grad
    inside = grad.clamp(-spec.LARGEST_GRADIENT, spec.LARGEST_GRADIENT)
    return inside.masked_fill_(grad.isinf(), math.inf)


def state_shapes(place: BlockLayout) -> dict[str, tuple[int, ...]]:
    """The moments kept for one tensor, [3, K, A, B] and smaller."""
    kept, other, last = place.shape
    momentum, over_last, over_other = (3, kept, other, last), (3, kept, other, 1), (3, kept, 1, last)
    if not place.factored:
        return {"momentum": momentum, "rms": place.shape, "row": momentum}
    row, column = (over_last, over_other) if place.last_is_largest else (over_other, over_last)
    return {"momentum": momentum, "rms": place.shape, "row": row, "column": column}


def own_keys(param: torch.Tensor) -> set[str]:
    """What LoLO keeps in a parameter's state; other keys are of wrappers."""
    return {"step", *state_shapes(layout(tuple(param.shape)))}


class LoLO(torch.optim.Optimizer):
    """The learned optimizer instead of `torch.optim.AdamW`, with no hyper-parameter to tune.

        optimizer = LoLO(model.parameters())

    θ ← θ − lr·λ1/√(1 + t/step_decay)·(d·exp(λ2·m) + weight_decay·θ), (d, m) the network's outputs for an entry (Eq. 7).

    Args:
      params: parameters, named parameters or param groups; a group may have its own `lr`, `weights`, `weight_decay`,
        `clock_limit`, `step_decay`, `maximize` and `freeze_unseen`. float32, bfloat16, float16 or float64, of any
        rank; all of it computed in float32.
      weights: name of shipped weights, path of a weights file, a `weights_file.WeightsFile`, or a dict of φ's arrays
        (then λ1 = λ2 = 1e-3, no weight decay, no limit, no step decay).
      lr: the step's scale; 1 is as shipped with the weights, and AdamW's 1e-3 a thousand times too small. Schedulers
        may change it.
      weight_decay: decoupled; None: as shipped with the weights, 0: none.
      clock_limit: the time inputs see min(t, clock_limit); None: as shipped, math.inf: no limit.
      step_decay: steps after which updates have shrunk by √2; None: as shipped, math.inf: they don't shrink.
      maximize: climb instead of descend.
      freeze_unseen: entries that never had a gradient do not move, by weight decay neither. Without it padding rows,
        rows never looked up, and weights behind a mask drift: about 0.02 to 0.15 in 1,000 steps.

    State per parameter: `step`, `momentum`, `rms`, `row`, `column`, all float32 (`step` int64, on the CPU): 4 numbers
    per entry and the factored moments, 7 per entry below two axes. A tensor's moments lie as [K, A, B], A and B its two
    largest axes; `load_state_dict` brings them back bit for bit, whatever the parameters' dtype, and refuses the state
    of other weights. Parameters without a gradient are skipped, and their clock with them.

    A weight matrix [out, in] here is [in, out] in JAX. Sides of unequal length give the same update, transposed;
    for square ones the row and column moments swap roles, since the later axis counts as the larger.

    Data parallel (DDP): gradients are averaged before the step, so every process makes the same update; nothing to set.
    Sharded parameters (FSDP, DTensor) are refused: normalisation needs means over the whole tensor.
    `torch.compile` around a training step works; the optimizer's part runs as it is, uncompiled (a graph break, so
    not under fullgraph=True).
    Default dtype, default device, autocast, and the precision that torch is told for float32 products do not change a
    step. Finite gradients beyond ±2⁴⁸ count as ±2⁴⁸; one that is not finite shows as NaN in its tensor.

    Raises ValueError for weights or numbers that make no sense, TypeError for parameters it can't move and for
    arguments of other optimizers, RuntimeError for gradients it can't use. Warns if every lr is below 0.02.
    """

    def __init__(
        self,
        params: Iterable[Any],
        weights: str | Path | weights_file.WeightsFile | Mapping[str, Any] = weights_file.DEFAULT_WEIGHTS,
        lr: float | torch.Tensor = 1.0,
        weight_decay: float | None = None,
        clock_limit: float | None = None,
        step_decay: float | None = None,
        *,
        maximize: bool = False,
        freeze_unseen: bool = False,
        **others: Any,
    ):
        refuse_others(others)
        for name in others:
            raise TypeError(f"LoLO has no {name!r}; its settings are {', '.join(SETTINGS)}.")
        if isinstance(weights, int | float | torch.Tensor):
            raise TypeError(f"weights={weights!r} is a number. LoLO's step is scaled by lr=..., and 1 is as shipped.")
        self._networks: dict[str, Network] = {}  # by the weights' sha256
        self._spaces: dict[torch.device, Workspace] = {}
        deployment = {"weight_decay": weight_decay, "clock_limit": clock_limit, "step_decay": step_decay}
        flags = {"maximize": maximize, "freeze_unseen": freeze_unseen}
        super().__init__(params, {"lr": lr, "weights": weights, **deployment, **flags})
        rate = max(float(group["lr"]) for group in self.param_groups)
        if 0 < rate < SMALLEST_RATE:
            warnings.warn(
                f"lr={rate:g} is a multiple of the step that the weights were meta-trained with, and 1 is as shipped. "
                f"Training will be {1 / rate:,.0f} times slower; leave lr out.",
                stacklevel=2,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with settings of their own where given. See `torch.optim.Optimizer.add_param_group`."""
        group = dict(param_group)
        refuse_others(group)
        if not isinstance(group["params"], torch.Tensor | set):
            group["params"] = list(group["params"])
        for param in [group["params"]] if isinstance(group["params"], torch.Tensor) else group["params"]:
            check_parameter(param[1] if isinstance(param, tuple) else param)
        given = {**self.defaults, **group}
        weights = as_weights(given["weights"])
        learner = weights.learner
        if given["weight_decay"] is None:
            given["weight_decay"] = learner["weight_decay"]
        for name in ("clock_limit", "step_decay"):
            if given[name] is None:
                given[name] = math.inf if learner.get(name) is None else learner[name]
        for name in ("lr", "weight_decay", "clock_limit", "step_decay"):
            finite = math.isfinite(float(given[name])) or name in ("clock_limit", "step_decay")
            if not float(given[name]) >= 0 or not finite:
                raise ValueError(f"{name}={given[name]!r}; expected a number that is not negative.")
        if not given["step_decay"]:
            raise ValueError(f"step_decay={given['step_decay']!r}; expected a positive number of steps.")
        named = isinstance(given["weights"], str | Path)
        group |= {
            **{name: given[name] for name in SETTINGS if name != "weights"},
            "weights": str(given["weights"]) if named else "given as arrays",
            "weights_sha256": weights.sha256,
            "step_mult": float(learner["step_mult"]),
            "exp_mult": float(learner["exp_mult"]),
        }
        super().add_param_group(group)
        self._networks.setdefault(weights.sha256, network_from(weights.meta_params))

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient. Returns: the closure's loss, None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        kinds = {param.device.type for group in self.param_groups for param in group["params"]}
        with full_precision(kinds):
            for group in self.param_groups:
                self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        alike = defaultdict(list)
        for param in group["params"]:
            if param.grad is not None and param.numel():
                check_gradient(param)
                state = self.state[param]
                if "step" not in state:
                    self._begin(param)
                alike[param.device, layout(tuple(param.shape)), int(state["step"])].append(param)
        rules: dict[tuple[torch.device, int], Rule] = {}
        for (device, place, step), params in alike.items():
            if (device, step) not in rules:
                rules[device, step] = self._rule(group, device, step)
            space = self._spaces[device]
            size = math.prod(place.shape)
            together = max(1, space.block // size) if size <= space.block // 4 else 1
            for start in range(0, len(params), together):
                self._step_alike(params[start : start + together], place, rules[device, step], space, group["maximize"])

    def _begin(self, param: torch.Tensor) -> None:
        """Zero moments, and a clock that counts this parameter's steps, beside what wrappers keep in its state."""
        self.state[param]["step"] = torch.zeros((), dtype=torch.int64, device="cpu")
        for name, shape in state_shapes(layout(tuple(param.shape))).items():
            self.state[param][name] = torch.zeros(shape, device=param.device, dtype=torch.float32)

    def _rule(self, group: dict[str, Any], device: torch.device, step: int) -> Rule:
        space = self._spaces.setdefault(device, Workspace(device))
        sha256 = group["weights_sha256"]
        if sha256 not in space.networks:
            space.networks[sha256] = self._networks[sha256].to(device)
        network = space.networks[sha256]
        clock = float(min(step, group["clock_limit"]))
        bias = network.first_bias + network.time @ torch.tanh(clock / network.timescales - 1)
        scale = float(group["lr"]) * group["step_mult"] / math.sqrt(1 + step / group["step_decay"])
        return Rule(network, bias, scale, group["exp_mult"], float(group["weight_decay"]), group["freeze_unseen"])

    def _step_alike(
        self, params: list[torch.Tensor], place: BlockLayout, rule: Rule, space: Workspace, maximize: bool
    ) -> None:
        """One step of T tensors of one layout, dtype apart; alone in its batch a tensor is worked on where it lies."""
        states = [self.state[param] for param in params]
        grads = [as_float32(arrange(param.grad, place)) for param in params]
        values = [arrange(param, place).float() for param in params]
        moments = {name: [state[name] for state in states] for name in state_shapes(place)}
        if len(params) == 1:
            grad, value = grads[0].unsqueeze(0), values[0].unsqueeze(0)
            together = {name: moment[0].unsqueeze(-4) for name, moment in moments.items()}
        else:
            grad, value = torch.stack(grads), torch.stack(values)
            together = {name: torch.stack(moment, dim=-4) for name, moment in moments.items()}
        batch = Batch(
            -limited(grad) if maximize else limited(grad),
            value,
            *(together.get(name) for name in ("momentum", "rms", "row", "column")),
        )
        in_place = value.data_ptr() == params[0].data_ptr()
        step_batch(batch, place, rule, space, in_place)
        if not in_place:
            for param, change in zip(params, value, strict=True):
                param.add_(restore(change, place, param.shape))
        if len(params) > 1:
            for name, moment in together.items():
                torch._foreach_copy_(moments[name], moment.unbind(-4))
        for state in states:
            state["step"] += 1

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of states saved before there was a step_decay, or freeze_unseen."""
        super().__setstate__(state)
        self.defaults.setdefault("step_decay", None)
        self.defaults.setdefault("freeze_unseen", False)
        for group in self.param_groups:
            group.setdefault("step_decay", math.inf)
            group.setdefault("freeze_unseen", False)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_networks": self._networks, "_spaces": {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state exactly. Raises ValueError for the state of other weights, parameters or optimizers.

        torch casts a state to its parameter's dtype, which for bfloat16 loses most of it: here it stays float32. What
        others keep in a parameter's state comes back as torch brings it back.
        """
        loaded: dict[str, Any] = {}

        def before(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:  # comes after the user's own hooks
            self._check_state_dict(given)
            loaded.update(given)

        def after(_: torch.optim.Optimizer) -> None:  # comes before the user's own hooks
            for name, param in self._named_by(loaded):
                state = loaded["state"].get(name)
                for key in own_keys(param) & set(state or ()):
                    place = ("cpu", torch.int64) if key == "step" else (param.device, torch.float32)
                    self.state[param][key] = state[key].detach().clone().to(*place)

        handles = [
            self.register_load_state_dict_pre_hook(before),
            self.register_load_state_dict_post_hook(after, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _named_by(self, state_dict: dict[str, Any]) -> Iterator[tuple[Any, torch.Tensor]]:
        """The parameters beside the names that a state dict has for them."""
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False):
            yield from zip(saved["params"], group["params"], strict=False)

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        for index, (saved, group) in enumerate(zip(state_dict["param_groups"], self.param_groups, strict=False)):
            if "weights_sha256" not in saved:
                raise ValueError("this state is of another optimizer: its param groups name no weights of LoLO.")
            if saved["weights_sha256"] != group["weights_sha256"]:
                raise ValueError(
                    f"param group {index} was saved with the weights {saved['weights']!r} (sha256 "
                    f"{saved['weights_sha256'][:12]}…), this optimizer has {group['weights']!r} "
                    f"({group['weights_sha256'][:12]}…). Build it with LoLO(params, weights=...) of the saved ones."
                )
        for name, param in self._named_by(state_dict):
            state = state_dict["state"].get(name)
            expected = {"step": (), **state_shapes(layout(tuple(param.shape)))}
            own = {key: value for key, value in (state or {}).items() if key in expected}
            found = {key: tuple(getattr(value, "shape", ("no tensor",))) for key, value in own.items()}
            if own and found != expected:
                raise ValueError(
                    f"the saved state of parameter {name!r} of shape {tuple(param.shape)} has {found}; "
                    f"expected {expected}."
                )
