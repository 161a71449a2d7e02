"""How many trials share a GPU: by the memory that the largest configuration of the space was measured to take there."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from cluster.resources import Packing, packing
from cluster.runtime import Node, Runtime
from search.spec import StudySpec, largest
from vae.config import ModelConfig, TrainConfig
from vae.data import Dataset

PROBE_TIMEOUT_S = 180.0  # a worker's start, an epoch, and the wait for a GPU that others use

LONGEST_REASON = 200  # characters of what Ray says


class Memory(NamedTuple):
    """Of a GPU, in bytes."""

    peak: int  # what the largest configuration took, CUDA's own context included
    total: int


def packing_for(spec: StudySpec, data: Dataset, runtime: Runtime, say: Callable[[str], None]) -> Packing | None:
    """How many trials share a GPU, where that is to be measured and there is one. A GPU left idle is told of."""
    if spec.resources.gpus_per_trial == "auto":
        if runtime.num_gpus:
            return measured_packing(spec, data, runtime, say)
        say("gpus_per_trial = auto: there is no GPU, so trials train on CPUs")
    elif not spec.resources.gpus_per_trial and runtime.num_gpus:
        say("trials train on CPUs, and what there is of GPUs is idle; --gpus-per-trial auto, or 1, trains on them")
    return None


def measured_packing(spec: StudySpec, data: Dataset, runtime: Runtime, say: Callable[[str], None]) -> Packing:
    """The packing that fits every GPU node. One trial a GPU where nothing could be measured, which is said."""
    nodes = [node for node in runtime.nodes if node.num_gpus >= 1]
    found = []
    for node, memory in zip(nodes, _measure(spec, data, nodes), strict=True):
        if isinstance(memory, str):
            say(f"gpus_per_trial = auto: {node.host}: {memory}; so one trial a GPU")
            return Packing(1)
        found.append(packing(memory.peak, memory.total, node.num_cpus / node.num_gpus, spec.resources.cpus_per_trial))
        say(
            f"gpus_per_trial = auto: the largest configuration takes {memory.peak / 2**20:,.0f} of "
            f"{memory.total / 2**20:,.0f} MiB on {node.host}; {found[-1].trials} trials a GPU"
        )
    return min(found, key=lambda one: one.trials, default=Packing(1))


def largest_configuration(spec: StudySpec, row_shape: tuple[int, ...]) -> tuple[ModelConfig, TrainConfig]:
    """The model with the most weights in the largest batches, for one epoch."""
    from vae.model import num_parameters  # torch

    params = {"batch_size": largest(spec.batch_sizes)}
    train = dataclasses.replace(spec.train_config_for(params), max_epochs=1, kl_warmup_epochs=0)
    return max(spec.largest_models(row_shape), key=num_parameters), train


def _measure(spec: StudySpec, data: Dataset, nodes: list[Node]) -> list[Memory | str]:
    """On a whole GPU of each node at once: what was measured, or why nothing was."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe: Any = ray.remote(max_calls=1)(_peak_memory)  # then its worker ends, and frees what it holds of the GPU
    stored = ray.put(data)
    tasks = [
        probe.options(
            num_cpus=spec.resources.cpus_per_trial,
            num_gpus=1,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False),
        ).remote(spec, stored)
        for node in nodes
    ]
    ready, late = ray.wait(tasks, num_returns=len(tasks), timeout=PROBE_TIMEOUT_S) if tasks else ([], [])
    for task in late:
        ray.cancel(task, force=True)
    return [_outcome(ray, task) if task in ready else "no GPU became free to measure on" for task in tasks]


def _outcome(ray: Any, task: Any) -> Memory | str:
    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[-1][:LONGEST_REASON]


def _peak_memory(spec: StudySpec, data: Dataset) -> Memory | str:
    """In a worker that has a GPU to itself."""
    import torch

    from search.attempt import ran_out_of_memory
    from vae.adversarial import make_trainer

    if not torch.cuda.is_available():
        return "torch sees no GPU there"
    model, train = largest_configuration(spec, data.row_shape)
    try:
        trainer = make_trainer(model, train, data, seed=0, device="cuda")
        trainer.train_epoch()
        trainer.diagnose()
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        return "the largest configuration needs more than all of its memory"
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    return Memory(context + torch.cuda.max_memory_reserved(), total)
