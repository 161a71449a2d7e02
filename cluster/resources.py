"""What one trial asks for against what the cluster has: how many run at once, or why none can; how many share a GPU."""

import math
from dataclasses import dataclass

from cluster.runtime import Node, Runtime

HEADROOM = 1.2  # over the memory that was measured: fragments, and kernels that are loaded later
MOST_ON_A_GPU = 16  # beyond that they only wait for each other


class PlacementError(ValueError):
    """The cluster can never hold one trial as asked for. The text says what is short and what would do."""


def fitting_trials(
    runtime: Runtime,
    *,
    cpus_per_trial: int,
    gpus_per_trial: float,
    wanted: int | None = None,
    is_growing: bool = False,
) -> int:
    """How many trials run at once: as many as fit, at most `wanted`. Raises PlacementError if none does.

    A trial has all that it asks for on one node. is_growing: nodes come when trials wait, so that all `wanted`
    are asked for, whatever fits now.
    """
    if is_growing and wanted is not None and runtime.address != "local":
        return wanted
    fitting = sum(trials_on(node, cpus_per_trial, gpus_per_trial) for node in runtime.nodes)
    if not fitting:
        raise PlacementError(_what_is_short(runtime, cpus_per_trial, gpus_per_trial))
    return fitting if wanted is None else min(fitting, wanted)


def trials_on(node: Node, cpus_per_trial: int, gpus_per_trial: float) -> int:
    """How many trials a node holds at once."""
    by_cores = math.floor(node.num_cpus / cpus_per_trial)
    if not gpus_per_trial:
        return by_cores
    # Ray never splits one share over two devices: a share of 0.4 fits twice on each GPU, not 2.5 times
    per_device = math.floor(1 / gpus_per_trial + 1e-9) if gpus_per_trial <= 1 else 1 / gpus_per_trial
    return min(by_cores, math.floor(node.num_gpus * per_device))


def _what_is_short(runtime: Runtime, cpus_per_trial: int, gpus_per_trial: float) -> str:
    where = "this machine" if runtime.address == "local" else f"the cluster at {runtime.address}"
    one = "" if len(runtime.nodes) == 1 else " on one node"
    cpus = max((node.num_cpus for node in runtime.nodes), default=0)
    gpus = max((node.num_gpus for node in runtime.nodes), default=0)
    if cpus < 1:
        return (
            f"a trial asks for {cpus_per_trial} CPUs and {where} has none for trials; "
            f"add a node or, where nodes come when trials wait, set resources.autoscaling = true"
        )
    if cpus_per_trial > cpus:
        return (
            f"a trial asks for {cpus_per_trial} CPUs and {where} has {cpus:g}{one}; "
            f"set resources.cpus_per_trial = {int(cpus)} or lower"
        )
    if gpus_per_trial > gpus:
        has, mend = (f"{gpus:g}{one}", f"{gpus:g}") if gpus else ("none", "0")
        return (
            f"a trial asks for {gpus_per_trial:g} GPU and {where} has {has}; "
            f"set resources.gpus_per_trial = {mend} or add a GPU"
        )
    return (
        f"a trial asks for {cpus_per_trial} CPUs and {gpus_per_trial:g} GPU, and no node of {where} has both; "
        f"lower resources.cpus_per_trial or resources.gpus_per_trial"
    )


@dataclass(frozen=True)
class Packing:
    """How many trials share one GPU, each with its part of the memory."""

    trials: int

    @property
    def share(self) -> float:
        """What Ray is asked for. Rounded down, so that all of them fit: Ray counts in ten-thousandths."""
        return math.floor(1e4 / self.trials) / 1e4

    def with_fewer(self) -> "Packing":
        """For when the memory turned out to be too little."""
        return Packing(max(1, self.trials // 2))


def packing(peak_bytes: int, total_bytes: int, cpus_per_gpu: float, cpus_per_trial: int) -> Packing:
    """As many as the memory holds, by what the largest configuration was measured to take, and as the cores feed."""
    by_memory = int(total_bytes / (HEADROOM * peak_bytes))
    by_cores = int(cpus_per_gpu / cpus_per_trial)
    return Packing(max(1, min(by_memory, by_cores, MOST_ON_A_GPU)))
