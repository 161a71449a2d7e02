"""Shared by all tests: one torch thread, and one Ray for those that need it."""

from collections.abc import Iterator

import pytest
import torch

from cluster.runtime import Runtime, ray_runtime


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Two cores are shared with Ray's workers: torch's default of all cores is slower by far there."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_here() -> Iterator[Runtime]:
    """The one Ray of this test run: two CPUs, no GPU, on loopback. `run_study` uses it as it finds it."""
    with ray_runtime(num_cpus=2, num_gpus=0) as runtime:
        yield runtime
