"""How weights move: AdamW without what surrounds it in torch, the learning rate's schedule, averaged weights."""

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from vae.config import LrSchedule

LR_WARMUP_SHARE = 0.05  # of all steps, with lr_schedule = warmup_cosine


class AdamW(torch.optim.AdamW):
    """torch's, its step alone without what surrounds it there: checks, lists and a profiler's hook.

    And without the guards against torch.compile, for which torch (2.13) imports all of it at the first call: 1.6 s.
    """

    @torch.no_grad()
    def step(self, skipped: Tensor | None = None) -> None:  # type: ignore[override]  # nobody has a closure
        """Moves all parameters that have a gradient; none, nor anything else, where `skipped` () is 1 and not 0."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            states = [self.state[p] or self._begin(p) for p in parameters]
            steps = states[0]["step"].add_(1)
            for state in states:
                state["step"] = steps  # one for all, which move together: numbers of their own take as many kernels
            torch._fused_adamw_(
                parameters,
                [p.grad for p in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [steps] * len(parameters),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                found_inf=skipped,
            )
            if skipped is not None:
                steps.sub_(skipped)

    step.hooked = True  # type: ignore[attr-defined]  # or torch wraps it, for a profiler

    def _begin(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        state["step"] = torch.zeros((), device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)


def lr_factor(step: int, total_steps: int, schedule: LrSchedule) -> float:
    """What the learning rate is multiplied by in step `step` (from 0) of a training of `total_steps`."""
    if schedule == "constant":
        return 1.0
    warmup = LR_WARMUP_SHARE * total_steps if schedule == "warmup_cosine" else 0.0
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (total_steps - warmup))))


def ema_weight(step: int, decay: float) -> float:
    """The weight of what was averaged so far after `step` steps: `decay`, less while there is little to average."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def average(averaged: nn.Module, model: nn.Module, share: float | Tensor) -> None:
    """averaged <- (1 - share) * averaged + share * model; running statistics too, counters are copied."""
    pairs = list(zip(averaged.state_dict().values(), model.state_dict().values(), strict=True))
    floats = [(old, new) for old, new in pairs if old.is_floating_point()]
    weights = [share] * len(floats) if isinstance(share, Tensor) else share  # of a tensor, torch takes lists alone
    torch._foreach_lerp_([old for old, _ in floats], [new for _, new in floats], weights)
    for old, new in pairs:
        if not old.is_floating_point():
            old.copy_(new)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight matrices, which decay, and the rest: decay has no business with biases and learned slopes."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
