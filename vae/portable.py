"""Encoder and decoder as programs for other runtimes: torch.export (.pt2) and ONNX (.onnx), checked once written.

They take and give rows in the model's own space: what leads there and back stands in config.json. A file is read again
in a new process and must give what the model gives, or it is removed and named.
"""

import copy
import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vae.config import InputError
from vae.model import VAE
from vae.objective import fixed_noise

TOLERANCES: Mapping[str, float] = {".pt2": 1e-6, ".onnx": 1e-5}
"""How far an output may lie from the model's: so much, times the output where that is greater than 1."""

BATCH_SIZES = (1, 3, 257)
"""Rows at a time that each file is checked with."""

_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_HOW_TO_GET_ONNX = "pip install 'vaesearch[onnx]'"
_INPUTS = {"encoder": "x", "decoder": "z"}
FILES = tuple(f"{side}{suffix}" for side in _INPUTS for suffix in TOLERANCES)
"""The names of all that can be written."""

_OUTPUTS = {"encoder": ("mu", "logvar"), "decoder": ("means",)}  # no operator's name, which nodes of ONNX have
_CHECK_TIMEOUT_S = 600
_EXAMPLE_ROWS = 2  # 1 would be taken for a constant
# They tell at every export of operators that no model here has.
_CHATTY = ("torch.onnx._internal.exporter._registration", "onnxscript.optimizer._constant_folding")


@dataclass(frozen=True, slots=True)
class Portable:
    """What became of an export, fit for JSON."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> inputs, outputs, tolerance, deviation
    refused: dict[str, str] = field(default_factory=dict)  # name -> why


def missing_onnx_packages() -> list[str]:
    """Those of the extra `onnx` that are not installed."""
    return [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]


def how_to_get_onnx() -> str:
    """In words, for somebody who lacks them."""
    return f"ONNX needs {', '.join(missing_onnx_packages())}: {_HOW_TO_GET_ONNX}"


def write(model: VAE, folder: Path, rows: np.ndarray, *, onnx: bool) -> Portable:
    """encoder and decoder as .pt2, and with `onnx` as .onnx, into `folder`. Those that fail are refused, not raised.

    rows (N, X), N >= 1, real ones, as the model takes them: what the files are checked on. InputError: a package of
    the extra `onnx` is missing.
    """
    if onnx and missing_onnx_packages():
        raise InputError(how_to_get_onnx())
    model = copy.deepcopy(model).cpu().eval()
    sides = {
        "encoder": _Encoder(_without(model, "decoder", "outputs")),
        "decoder": _Decoder(_without(model, "encoder", "mu", "logvar")),
    }
    refused: dict[str, str] = {}
    with _quiet(), torch.no_grad():
        for name, side in sides.items():
            width = model.config.input_dim if name == "encoder" else model.config.latent_dim
            refused |= _write_side(name, side, width, folder, onnx)
        given = _given(model, rows)
        live = {
            f"{name}.{size}.{index}": value.numpy()
            for name, side in sides.items()
            for size in BATCH_SIZES
            for index, value in enumerate(_tuple(side(torch.from_numpy(given[name][:size]))))
        }
    suffixes = TOLERANCES if onnx else (".pt2",)
    names = [f"{name}{suffix}" for name in sides for suffix in suffixes if f"{name}{suffix}" not in refused]
    deviations = _checked_elsewhere(folder, names, given | live)
    files: dict[str, dict[str, Any]] = {}
    for file in names:
        name, tolerance, found = Path(file).stem, TOLERANCES[Path(file).suffix], deviations[file]
        if isinstance(found, str):
            refused[file] = found
        elif not found <= tolerance:
            refused[file] = f"differs from the model by {found:.2g}, and {tolerance:g} is allowed"
        else:
            inputs, outputs = [_INPUTS[name]], list(_OUTPUTS[name])
            files[file] = {"inputs": inputs, "outputs": outputs, "tolerance": tolerance, "deviation": found}
    for file in refused:
        (folder / file).unlink(missing_ok=True)
    return Portable(files, refused)


def _without(model: VAE, *names: str) -> VAE:
    """Without the other side's layers, whose weights would be written, too."""
    half = copy.deepcopy(model)
    for name in names:
        delattr(half, name)
    return half


class _Encoder(nn.Module):
    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.encode(x)


class _Decoder(nn.Module):
    """With the link: z -> means of p(x|z), of counts at size factor 1."""

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor) -> Tensor:
        return self.model.likelihood.mean(self.model.decode(z))


# ---- writing


def _write_side(name: str, side: nn.Module, width: int, folder: Path, onnx: bool) -> dict[str, str]:
    """Files of the encoder, or of the decoder, unchecked. Returns those that could not be written, and why."""
    example = torch.zeros(_EXAMPLE_ROWS, width)
    pt2, onnx_file = f"{name}.pt2", f"{name}.onnx"
    # Whatever an operator raises that an exporter does not know, the rest of the export is to be whole.
    try:
        program = torch.export.export(side, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine
        torch.export.save(program, folder / pt2)
    except Exception as error:
        return {file: _reason(error) for file in ((pt2, onnx_file) if onnx else (pt2,))}
    if not onnx:
        return {}
    try:
        written = torch.onnx.export(
            program.run_decompositions(_decompositions()),
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=[_INPUTS[name]],
            output_names=_OUTPUTS[name],
            dynamic_shapes=({0: "batch"},),
        )
        assert written is not None
        written.save(folder / onnx_file)
    except Exception as error:
        return {onnx_file: _reason(error)}
    return {}


def _decompositions() -> dict[Any, Any]:
    """Operators that ONNX or its runtime lacks in the form met here, in terms of some that they have."""

    def softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
        if x.dtype != torch.float64:  # onnxruntime (1.32) has it of float32 alone
            return NotImplemented
        return torch.where(x * beta > threshold, x, torch.log(1 + torch.exp(x * beta)) / beta)

    def attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Tensor:
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])  # of three dimensions torch (2.13) has none
        return scores.softmax(dim=-1) @ value

    return {
        torch.ops.aten.softplus.default: softplus,
        torch.ops.aten.scaled_dot_product_attention.default: attention,
    }


def _given(model: VAE, rows: np.ndarray) -> dict[str, np.ndarray]:
    """What the checks feed in: real rows, and latents from their posteriors, as many as the largest batch."""
    x = np.ascontiguousarray(rows[np.arange(max(BATCH_SIZES)) % len(rows)])
    mu, logvar = model.encode(torch.from_numpy(x))
    z = mu + (logvar / 2).exp() * fixed_noise(len(x), model.config.latent_dim, 0)
    return {"encoder": x, "decoder": z.numpy()}


def _tuple(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"[:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters tell of themselves."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ---- checking


def _checked_elsewhere(folder: Path, names: list[str], arrays: dict[str, np.ndarray]) -> dict[str, float | str]:
    """File -> its deviation, or why there is none, as one new process finds them."""
    if not names:
        return {}
    root = str(Path(__file__).parent.parent)
    with tempfile.TemporaryDirectory(prefix="vaesearch-") as scratch:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "XDG_CACHE_HOME": scratch,  # where onnxruntime (1.32) puts what it wants to tell its makers
        }
        reference = Path(scratch) / "reference.npz"
        np.savez(reference, **arrays)  # type: ignore[arg-type]
        # -P: the current folder is anybody's, and a torch.py in it would be run.
        command = [sys.executable, "-P", "-m", "vae.portable", str(folder), str(reference), *names]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment, timeout=_CHECK_TIMEOUT_S, check=False
            )
            return dict(json.loads(done.stdout))
        except subprocess.TimeoutExpired:
            why = f"could not be checked within {_CHECK_TIMEOUT_S} s"
        except ValueError:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            why = f"could not be checked: {last[:300]}"
    return dict.fromkeys(names, why)


def _main(folder: str, reference: str, *names: str) -> None:
    """In the new process: prints the deviation of each file, or why it has none, as JSON."""
    found: dict[str, float | str] = {}
    with np.load(reference) as stored:
        arrays = dict(stored)
    for file in names:
        try:
            with _quiet():
                found[file] = _deviation(Path(folder) / file, arrays)
        except Exception as error:
            found[file] = _reason(error)
    print(json.dumps(found))


def _deviation(file: Path, arrays: Mapping[str, np.ndarray]) -> float:
    """The greatest of all outputs' distances from the live model's, by the scale of TOLERANCES; infinite for NaN."""
    run = _open_pt2(file) if file.suffix == ".pt2" else _open_onnx(file)
    worst = 0.0
    for size in BATCH_SIZES:
        for index, values in enumerate(run(arrays[file.stem][:size])):
            live = arrays[f"{file.stem}.{size}.{index}"]
            if values.dtype != np.float32 or values.shape != live.shape:
                raise ValueError(f"gives {values.dtype} of shape {values.shape}, the model float32 of {live.shape}")
            distance = float((np.abs(values - live) / np.maximum(np.abs(live), 1)).max())
            worst = max(worst, math.inf if math.isnan(distance) else distance)
    return worst


def _open_pt2(file: Path) -> Any:
    program = torch.export.load(file).module()

    @torch.no_grad()
    def run(rows: np.ndarray) -> list[np.ndarray]:
        return [value.numpy() for value in _tuple(program(torch.from_numpy(rows)))]

    return run


def _open_onnx(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda rows: session.run(None, {name: rows})


if __name__ == "__main__":
    _main(*sys.argv[1:])
