"""What one trial asks for against what the cluster has: how many run at once, or why none can."""

import math

from cluster.runtime import Runtime


class PlacementError(ValueError):
    """The cluster can never hold one trial as asked for. The text says what is short and what would do."""


def fitting_trials(runtime: Runtime, *, cpus_per_trial: int, gpus_per_trial: float, wanted: int | None = None) -> int:
    """How many trials run at once: as many as fit, at most `wanted`. Raises PlacementError if none does."""
    where = "this machine" if runtime.address == "local" else f"the cluster at {runtime.address}"
    if cpus_per_trial > runtime.num_cpus:
        raise PlacementError(
            f"a trial asks for {cpus_per_trial} CPUs and {where} has {runtime.num_cpus:g}; "
            f"set resources.cpus_per_trial = {max(1, int(runtime.num_cpus))} or lower"
        )
    if gpus_per_trial > runtime.num_gpus:
        has = f"{runtime.num_gpus:g}" if runtime.num_gpus else "none"
        mend = f"{runtime.num_gpus:g}" if runtime.num_gpus else "0"
        raise PlacementError(
            f"a trial asks for {gpus_per_trial:g} GPU and {where} has {has}; "
            f"set resources.gpus_per_trial = {mend} or add a GPU"
        )
    fitting = math.floor(runtime.num_cpus / cpus_per_trial)
    if gpus_per_trial:
        # Ray never splits one share over two devices: a share of 0.4 fits twice on each GPU, not 2.5 times
        per_device = math.floor(1 / gpus_per_trial + 1e-9) if gpus_per_trial <= 1 else 1 / gpus_per_trial
        fitting = min(fitting, math.floor(runtime.num_gpus * per_device))
    return max(1, fitting if wanted is None else min(fitting, wanted))
