"""`vaesearch env`: what a report of a fault should say of the machine and of what is installed. No secret is told."""

import os
import platform
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "vaesearch",
    "torch",
    "ray",
    "optuna",
    "numpy",
    "scipy",
    "scikit-learn",
    "pyarrow",
    "duckdb",
    "pydantic",
    "typer",
    "safetensors",
    "plotly",
    "tensorboard",
    "mlflow-skinny",
    "mlflow",
    "wandb",
    "optuna-dashboard",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "pandas",
    "polars",
)
VARIABLES = (
    "VAESEARCH_STORAGE",
    "RAY_ADDRESS",
    "RAY_AUTH_MODE",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "PYTHONPATH",
)
PREFIXES = ("RAY_", "TUNE_", "AWS_", "TORCH", "PYTORCH", "MLFLOW_", "WANDB_")
"""Variables that begin so are named where they are set, without their values, which may be keys."""


def describe() -> dict[str, dict[str, Any]]:
    """Sections of what is found, fit for JSON. None: not installed, or nobody can tell."""
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "python": {"version": platform.python_version(), "executable": sys.executable, "prefix": sys.prefix},
        "machine": {
            "system": platform.platform(),
            "cpu": _cpu_model(),
            "cpus": os.cpu_count(),
            "cpus_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_bytes": memory_bytes(),
            "shared_memory_bytes": _shared_memory_bytes(),
        },
        "torch": _torch(),
        "variables": {name: _without_keys(os.environ[name]) for name in VARIABLES if name in os.environ},
        "also_set": {
            "names": sorted(name for name in os.environ if name.startswith(PREFIXES) and name not in VARIABLES)
        },
    }


def environment_lines(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """For people, and to be pasted."""
    for section, values in found.items():
        yield f"{section.replace('_', ' ')}:"
        for name, value in values.items():
            if name.endswith("_bytes") and value is not None:
                name, value = name.removesuffix("_bytes"), f"{value / 2**30:.1f} GiB"
            if isinstance(value, list):
                value = ", ".join(value) or "none"
            yield f"  {name}: {'none' if value is None else value}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def memory_bytes() -> int | None:
    """Of this machine; None where nobody can tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _shared_memory_bytes() -> int | None:
    """Where Ray's object store lies; containers often have 64 MiB."""
    try:
        found = os.statvfs("/dev/shm")
    except (AttributeError, OSError):
        return None
    return found.f_frsize * found.f_blocks


def _without_keys(value: str) -> str:
    """Of a URL, nothing that may be a password: no user, query or fragment, however they are written."""
    scheme, mark, rest = value.partition("://")
    if not mark:
        return value
    place, *hidden = re.split(r"[?#]", rest, maxsplit=1)
    if "@" in "".join(hidden):  # of a query, or behind a password that has one of the two signs in it
        return f"{scheme}://..."
    if "@" in place:
        place = f"...{place[place.rfind('@') :]}"
    return f"{scheme}://{place}{'?...' if hidden else ''}"


def _torch() -> dict[str, Any]:
    """What a torch that cannot be loaded says instead is what the report may be about."""
    try:
        import torch
    except Exception as error:
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cuda": torch.version.cuda,
        "devices": devices,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
