"""Learned optimizers as a `torch.optim.Optimizer`; it needs no JAX.

    from lolo.torch import LoLO

    optimizer = LoLO(model.parameters())

What is particular to an architecture lies in `small_fc` and `norm_fc`, which `architecture` names; here is what all
have: param groups, state, saving and loading. Written in plain torch operations, which any device has, and tuned for
CPUs (docs/performance.md has a GPU's times). `norm_fc` has kernels too: `kernel`, `triton_kernel`.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lolo.optimizers import weights_file
from lolo.torch import rounds, sharding
from lolo.torch.architecture import ABSENT, ARCHITECTURES, TorchArchitecture, as_weights, settings_of
from lolo.torch.blocks import MOMENTS, Workspace, moved
from lolo.torch.checks import (
    DTYPES,
    check_flag,
    check_gradient,
    check_number,
    check_parameter,
    refuse_others,
    warn_of_rates,
)
from lolo.torch.precision import full_precision
from lolo.torch.rounds import Rounds

COMMON = ("lr", "weights", "weight_decay", "maximize")
SETTINGS = (*COMMON, *ABSENT)
DTYPES_BY_NAME = {str(dtype): dtype for dtype in DTYPES}


class LoLO(torch.optim.Optimizer):
    """The learned optimizer instead of `torch.optim.AdamW`, or of `torch.optim.Muon`.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> optimizer = LoLO(model.parameters())
    >>> model(torch.ones(3, 4)).square().mean().backward()
    >>> optimizer.step()

    The weights say which architecture it is. That of the default ones, `norm_fc`, chooses directions:
    θ ← θ − lr·(step + weight_decay·θ), a matrix's step as large as `step_rms` says. Vectors and scalars get
    AdamW (.9, adam_beta2, 1e-8) at lr·adam_scale, and so should embeddings and output layers, which you name:

    >>> groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "is_matrix": False}]
    >>> optimizer = LoLO(groups, lr=1.6e-2, weight_decay=0.1)

    `small_fc` (`lolo-anytime`) has no hyper-parameter to tune:
    θ ← θ − lr·λ1/√(1 + t/step_decay)·(d·exp(λ2·m) + weight_decay·θ), (d, m) the network's outputs for an entry (Eq. 7).

    Args:
      params: parameters, named parameters or param groups; a group may have all settings below for itself. float32,
        bfloat16, float16 or float64, of any rank; all of it computed in float32.
      weights: name of shipped weights, path of a weights file, a `weights_file.WeightsFile`, or a dict of φ's arrays
        (then with the default settings of its architecture: λ1 = λ2 = 1e-3, or a learning rate of 1e-3).
      lr: None: 1 for `small_fc`, the learning rate in the metadata for `norm_fc`. In `small_fc` it multiplies the step
        that came with the weights, so that AdamW's 1e-3 is a thousand times too small. Schedulers may change it.
      weight_decay: decoupled; None: as shipped with the weights, 0: none.
      clock_limit: of `small_fc`: the time inputs see min(t, clock_limit); None: as shipped, math.inf: no limit.
      step_decay: of `small_fc`: steps after which updates have shrunk by √2; None: as shipped, math.inf: never.
      maximize: climb instead of descend.
      freeze_unseen: of `small_fc`: entries that never had a gradient do not move, by weight decay neither. Without it
        padding rows, rows never looked up, and masked weights drift: about 0.02 to 0.15 in 1,000 steps.
        Gradients below about 1e-22 count as none, since their squares are 0.
        (`norm_fc` gives such entries no step; weight decay reaches them.)
      step_rms: of `norm_fc`: "one": a matrix's step has root mean square lr; "adam": lr times that of AdamW's step,
        which wants about eight times the lr; None: as shipped.
      adam_scale: of `norm_fc`: AdamW's learning rate in units of lr; None: as shipped.
      adam_beta2: of `norm_fc`: the decay of the second moment in vectors' AdamW; None: as shipped.
      is_matrix: of `norm_fc`: whether the network moves the tensors of a group; None: those of two axes or more; False:
        AdamW; True: vectors too. Axis 0 is a matrix's output, all others are its input, as in torch's layers.
      state_dtype: of `norm_fc`: torch.float32, or torch.bfloat16 for the momenta, which takes a third off the state.
      kernel: of `norm_fc`: "plain": torch's operations; None or "auto": a kernel, for tensors of at most 32 bits: on a
        CPU where the installation has one, for float32 momenta; on NVIDIA's GPUs Triton's, where Triton can compile
        them. $LOLO_KERNEL=0 says no.

    State per parameter: `step` (int64, on the CPU; `norm_fc`'s of a CUDA parameter beside it) and `momentum`, `rms`,
    `row`, `column`, float32: 4 numbers per entry and the factored moments, 7 per entry below two axes; on `norm_fc`'s
    AdamW `momentum` and `rms` only. A tensor's moments lie as [K, A, B], A and B its two largest axes;
    `load_state_dict` brings them back bit for bit, whatever the parameters' dtype, and refuses the state of other
    weights. Parameters without a gradient are skipped, and their clock with them.

    A weight matrix [out, in] here is [in, out] in JAX, a convolution [out, in, h, w] is [h, w, in, out]. Both get the
    same update from `norm_fc`, transposed; from `small_fc` if their sides differ in length. For equal ones its row and
    column moments swap roles, since the later axis counts as the larger.

    Data parallel (DDP): gradients are averaged before the step, so every process makes the same update; nothing to set.
    Sharded parameters (FSDP2's `fully_shard`, DTensor): cut along axis 0, or replicated; the step is that of whole
    tensors, and its state is divided as they are (docs/several_devices.md: collectives, checkpoints, what was tested).
    The CPU kernel leaves tensors that are cut to torch's operations. All processes must step together, with gradients
    of the same parameters. FSDP1's flat parameters and DTensors placed otherwise are refused.
    `torch.compile` around a training step works; the optimizer's part runs as it is, uncompiled (a graph break, so
    not under fullgraph=True). Steps of `norm_fc` by Triton's kernels never wait for the GPU and can be captured in a
    CUDA graph once one was taken outside; an lr that is to change there must be a CUDA tensor.
    Default dtype, default device, autocast, and the precision that torch is told for float32 products do not change a
    step. Finite gradients beyond ±2⁴⁸ (`norm_fc`: ±2²⁴) count as that; one that is not finite shows as NaN in its
    tensor.

    Raises ValueError for weights or numbers that make no sense and for settings that the weights' architecture does not
    have, TypeError for parameters it can't move and for arguments of other optimizers, RuntimeError for gradients it
    can't use. Warns of each group's lr of `small_fc` below 0.02 and of `norm_fc` above 0.1.
    """

    _complete = True  # not while torch's own __init__ adds the groups

    def __init__(
        self,
        params: Iterable[Any],
        weights: str | Path | weights_file.WeightsFile | Mapping[str, Any] = weights_file.DEFAULT_WEIGHTS,
        lr: float | torch.Tensor | None = None,
        weight_decay: float | None = None,
        clock_limit: float | None = None,
        step_decay: float | None = None,
        *,
        maximize: bool = False,
        freeze_unseen: bool = False,
        step_rms: str | None = None,
        adam_scale: float | None = None,
        adam_beta2: float | None = None,
        is_matrix: bool | None = None,
        state_dtype: torch.dtype | None = None,
        kernel: str | None = None,
        **others: Any,
    ):
        refuse_others(others)
        for name in others:
            raise TypeError(f"LoLO has no {name!r}; its settings are {', '.join(SETTINGS)}.")
        if isinstance(weights, int | float | torch.Tensor):
            raise TypeError(f"weights={weights!r} is a number. LoLO's step is scaled by lr=..., and 1 is as shipped.")
        self._networks: dict[str, tuple[str, Any]] = {}  # architecture and network by the weights' sha256
        self._spaces: dict[torch.device, Workspace] = {}
        small_fc = {"clock_limit": clock_limit, "step_decay": step_decay, "freeze_unseen": freeze_unseen}
        norm_fc = {"step_rms": step_rms, "adam_scale": adam_scale, "adam_beta2": adam_beta2}
        norm_fc |= {"is_matrix": is_matrix, "state_dtype": state_dtype, "kernel": kernel}
        common = {"lr": lr, "weights": weights, "weight_decay": weight_decay, "maximize": maximize}
        self._complete = False
        super().__init__(params, {**common, **small_fc, **norm_fc})
        self._complete = True
        warn_of_rates(self.param_groups, stacklevel=2)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with settings of their own where given. See `torch.optim.Optimizer.add_param_group`."""
        group = dict(param_group)
        refuse_others(group)
        if not isinstance(group["params"], torch.Tensor | set):
            group["params"] = list(group["params"])
        members = [group["params"]] if isinstance(group["params"], torch.Tensor) else group["params"]
        for index, param in enumerate(members):
            name, param = param if isinstance(param, tuple) else (index, param)
            check_parameter(param, name)
        given = {**self.defaults, **group}
        for name in ("maximize", "freeze_unseen"):
            check_flag(name, given[name])
        learned = as_weights(given["weights"])
        row, sha256 = ARCHITECTURES[learned.architecture], learned.file.sha256
        common = {
            "lr": row.lr(learned.learner) if given["lr"] is None else given["lr"],
            "weight_decay": learned.learner.weight_decay if given["weight_decay"] is None else given["weight_decay"],
        }
        for name, value in common.items():
            check_number(name, value)
        named = isinstance(given["weights"], str | Path)
        weights = {"weights": str(given["weights"]) if named else "given as arrays", "weights_sha256": sha256}
        group |= {**common, "maximize": given["maximize"], **settings_of(learned, given), **weights}
        super().add_param_group(group)
        for name in set(ABSENT) - set(row.arguments):  # torch fills in what it finds among the defaults
            del self.param_groups[-1][name]
        if sha256 not in self._networks:
            self._networks[sha256] = learned.architecture, row.network(learned.file.meta_params)
        if self._complete:
            warn_of_rates(self.param_groups[-1:], stacklevel=2)

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient. Returns: the closure's loss, None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [param for group in self.param_groups for param in group["params"]]
        kinds = {param.device.type for param in params} | sharding.kinds(params)
        with full_precision(kinds):
            rounds.run(itertools.chain.from_iterable(map(self._steps_of, self.param_groups)))
        return loss

    def _steps_of(self, group: dict[str, Any]) -> Iterator[Rounds]:
        """The steps of a group's tensors."""
        row, by_device = self._architecture(group), defaultdict(list)
        for index, param in enumerate(group["params"]):
            if param.grad is not None and param.numel() and sharding.lies_here(param):
                check_gradient(param)
                if "step" not in self.state[param]:
                    self._begin(param, group, index)
                by_device[param.device].append(param)
        for device, params in by_device.items():
            space = self._spaces.setdefault(device, Workspace(device))
            local, state, shares = sharding.opened(params, self.state, lambda param: row.zeros(param, group))
            yield from row.step(local, state, group, self._network(group, space), space, shares)

    def _begin(self, param: torch.Tensor, group: dict[str, Any], index: int) -> None:
        """Zero moments, and a clock that counts this parameter's steps, beside what wrappers keep in its state."""
        check_parameter(param, group.get("param_names", {index: index})[index])  # wrappers exchange parameters
        self.state[param]["step"] = torch.zeros((), dtype=torch.int64, device=self._counter(param, group))
        for name, place in self._architecture(group).zeros(param, group).items():
            self.state[param][name] = sharding.zeros_beside(param, place)

    def _counter(self, param: torch.Tensor, group: dict[str, Any]) -> torch.device:
        """Where a parameter's step count lies."""
        beside = self._architecture(group).counts_on_gpu and param.is_cuda
        return param.device if beside else torch.device("cpu")

    def _architecture(self, group: dict[str, Any]) -> TorchArchitecture:
        return ARCHITECTURES[self._networks[group["weights_sha256"]][0]]

    def _network(self, group: dict[str, Any], space: Workspace) -> Any:
        """φ on the device of a workspace."""
        sha256 = group["weights_sha256"]
        if sha256 not in space.networks:
            space.networks[sha256] = moved(self._networks[sha256][1], space.device)
        return space.networks[sha256]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of states saved before there were all of today's settings."""
        super().__setstate__(state)
        for name, absent in ABSENT.items():
            self.defaults.setdefault(name, absent)
        for group in self.param_groups:
            for name, value in self._architecture(group).added.items():
                group.setdefault(name, value)
            if "state_dtype" in group:
                group["state_dtype"] = DTYPES_BY_NAME.get(group["state_dtype"], group["state_dtype"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_networks": self._networks, "_spaces": {}}

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with dtypes among the settings by name: `torch.distributed.checkpoint` gathers none."""
        found = super().state_dict()
        for group in found["param_groups"]:
            group |= {name: str(value) for name, value in group.items() if isinstance(value, torch.dtype)}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state exactly. Raises ValueError for the state of other weights, parameters or optimizers.

        torch casts a state to its parameter's dtype, which for bfloat16 loses most of it: here it stays as it was. What
        others keep in a parameter's state comes back as torch brings it back.
        """
        loaded: dict[str, Any] = {}

        def before(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:  # comes after the user's own hooks
            self._check_state_dict(given)
            loaded.update(given)

        def after(_: torch.optim.Optimizer) -> None:  # comes before the user's own hooks
            for name, param, group in self._named_by(loaded):
                state = loaded["state"].get(name, {})
                if "step" in state:
                    self.state[param]["step"] = (
                        state["step"].detach().clone().to(self._counter(param, group), torch.int64)
                    )
                for key, place in self._architecture(group).zeros(param, group).items():
                    if key in state:
                        self.state[param][key] = sharding.taken_up(state[key], param, place)

        handles = [
            self.register_load_state_dict_pre_hook(before),
            self.register_load_state_dict_post_hook(after, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _named_by(self, state_dict: dict[str, Any]) -> Iterator[tuple[Any, torch.Tensor, dict[str, Any]]]:
        """The names that a state dict has for the parameters, the parameters, and their groups."""
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False):
            for name, param in zip(saved["params"], group["params"], strict=False):
                yield name, param, group

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
            for name in ("orthogonal", "baseline", "step_rms"):  # of the architecture, which training does not change
                if saved.get(name, group.get(name)) != group.get(name):
                    raise ValueError(
                        f"param group {index} was saved with {name}={saved[name]!r} (weights {saved['weights']!r}); "
                        f"this optimizer has {group[name]!r} (weights {group['weights']!r}). Build it as that one was."
                    )
        for name, param, group in self._named_by(state_dict):
            state = state_dict["state"].get(name)
            own = self._architecture(group).zeros(param, group)
            expected = {"step": (), **{key: place.shape for key, place in own.items()}}
            kept = {key: value for key, value in (state or {}).items() if key in (*MOMENTS, "step")}
            found = {key: tuple(getattr(value, "shape", ("no tensor",))) for key, value in kept.items()}
            for key, place in own.items():  # as it lies beside a DTensor
                if key in found and found[key] == sharding.divisible_shape(place, param.shape):
                    found[key] = place.shape
            if kept and found != expected:
                raise ValueError(
                    f"the saved state of parameter {name!r} of shape {tuple(param.shape)} has {found}; "
                    f"expected {expected}." + (" Was is_matrix another one?" if "is_matrix" in group else "")
                )
            for key, place in own.items():
                sharding.check_division(kept.get(key), param, place)
