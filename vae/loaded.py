"""An exported model in use: rows in the data's own units go in, and rows in those units come out.

The scaling, the binarisation and the link of the outputs travel with the model. Neither ray nor optuna is needed.
"""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from vae.config import SUPPORTS, InputError
from vae.data import MAX_COUNT, VALIDATION_STREAM, bernoulli, check_finite, first_bad, generator_of
from vae.export import load as load_vae
from vae.export import read_config, units_of
from vae.model import VAE
from vae.objective import CHUNK_ROWS, elbo_terms, fixed_noise

Rows = TypeVar("Rows", np.ndarray, Tensor)
"""What comes in as a NumPy array goes out as one, and a tensor as a tensor on the device it was on."""

# Shapes: N rows, X input features, Z latent dimensions, (H, W) or (H, W, C) an image.


class Model:
    """A trained VAE with all that stands between it and the data's own units.

    `rows` are (N, X), or (N, H, W[, C]) for a model of images, of any real dtype and any N: the network works through
    them in parts, and beside it a few copies of all rows in float32 or float64 are held. Results are float32; float64
    for rows of data that were shifted, since float32 loses small spans far from 0, and for `nelbo`. ValueError
    (`vae.InputError`) for rows that the model was not made for.

    Grey values of a model trained on binarised data: under binarize = threshold they are cut as the model's own were,
    and what comes out are probabilities of being above the threshold. Under static and dynamic, `encode` and
    `reconstruct` take them as the probabilities that they are, and `nelbo` draws zeros and ones from them by its seed.

    Under scale = minmax rows end at the range of the model's own training data, as those did: what lies beyond counts
    as the end of the range, and `nelbo` cannot tell how far beyond it was.
    """

    def __init__(self, vae: VAE, config: dict[str, Any]) -> None:
        """config: that of the exported model's config.json."""
        data = config.get("data") or {}
        shape = data.get("image_shape") or vae.config.image_shape
        columns = data.get("columns")
        self.vae = vae.eval()
        self.config = config
        self.units = units_of(config)
        self.columns: tuple[str, ...] | None = None if columns is None else tuple(columns)
        self.image_shape: tuple[int, ...] | None = None if shape is None else tuple(shape)
        self.latent_dim = vae.config.latent_dim
        self.input_dim = vae.config.input_dim
        self._support = SUPPORTS[vae.config.likelihood]
        self._binarize = (data.get("config") or {}).get("binarize", "none")

    @property
    def device(self) -> torch.device:
        return self.vae.device

    def __repr__(self) -> str:
        body = self.vae.config
        return f"vae.Model({body.body}, {self.input_dim} features, {self.latent_dim} latents, {body.likelihood})"

    def encode(self, rows: Rows) -> tuple[Rows, Rows]:
        """rows in their own units -> mu, logvar of q(z|x), each (N, Z)."""
        x = self._prepared(rows)
        mu, logvar = self._in_parts(self.vae.encode, x, widths=(self.latent_dim, self.latent_dim))
        return _like(rows, mu), _like(rows, logvar)

    def decode(self, z: Rows, *, generator: torch.Generator | None = None) -> Rows:
        """z (N, Z) -> means of p(x|z) in the data's own units, (N, X); of counts at size factor 1.

        generator: on the model's device; draws from p(x|z) by it, in place of means.
        """
        latents = np.array(_array(z, "latents"), dtype=np.float32)
        if latents.ndim != 2 or latents.shape[1] != self.latent_dim:
            raise InputError(f"latents of shape {latents.shape}: expected (N, {self.latent_dim})")
        if latents.size:
            check_finite("latents", latents, None)
        function = self._means if generator is None else partial(self._drawn, generator)
        (values,) = self._in_parts(function, latents, widths=(self.input_dim,))
        return _like(z, self._own(values))

    def reconstruct(self, rows: Rows, *, generator: torch.Generator | None = None) -> Rows:
        """rows -> means of p(x|z) at z = E[z|x], in the data's own units, (N, X). Means of counts keep a row's total.

        generator: on the model's device; draws by it of z, and then of x, in place of means. Draws of counts have a
        row's size factor.
        """

        def drawn(part: Tensor) -> Tensor:
            mu, logvar = self.vae.encode(part)
            noise = torch.randn(mu.shape, generator=generator, device=mu.device)
            return self._drawn(generator, mu + (logvar / 2).exp() * noise, part)

        function = self.vae.reconstruct if generator is None else drawn
        (values,) = self._in_parts(function, self._prepared(rows), widths=(self.input_dim,))
        return _like(rows, self._own(values))

    def sample(self, n: int, *, seed: int | None = None, mean: bool = True) -> np.ndarray:
        """(n, X) from the prior, in the data's own units: means of p(x|z), or draws from it.

        The same `seed` gives the same latents, for means and for draws; without one torch's own generator draws.
        """
        if n < 0:
            raise InputError(f"n must be at least 0, got {n}")
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        z = torch.randn(n, self.latent_dim, generator=generator, device=self.device)
        function = self._means if mean else partial(self._drawn, generator)
        (rows,) = self._in_parts(function, z, widths=(self.input_dim,))
        return self._own(rows)

    def nelbo(self, rows: Rows, *, seed: int = 0) -> Rows:
        """rows -> the negative evidence lower bound, (N,) float64 nats per example, with one z a row.

        The noise depends on `seed` and N alone. With the seed of the study's data (`data.seed`), the mean over its
        validation rows, in their order, is the value that the study recorded.
        """
        x = self._prepared(rows)
        noise = fixed_noise(len(x), self.latent_dim, seed)
        draws = generator_of(seed, VALIDATION_STREAM)

        def bound(part: Tensor, eps: Tensor) -> Tensor:
            if self._binarize in ("static", "dynamic"):
                part = torch.from_numpy(bernoulli(part.cpu().numpy(), draws)).to(part.device)
            return elbo_terms(self.vae, part, eps).nelbo.unsqueeze(-1)

        (bounds,) = self._in_parts(bound, x, noise, widths=(1,), dtype=np.float64)
        return _like(rows, bounds[:, 0])

    # ---- between the data's own units and the model's

    def _prepared(self, rows: np.ndarray | Tensor) -> np.ndarray:
        """Checked, scaled and cut: (N, X) float32 as the model was trained on, but for static and dynamic draws."""
        own = self._flat(_array(rows, "rows"))
        if not own.size:
            return np.empty(own.shape, np.float32)
        check_finite("rows", own, self.columns)
        if self._support == "counts":
            self._check(own, (own < 0) | (own != np.floor(own)), "and counts are whole numbers from 0")
            self._check(own, own > MAX_COUNT, f"beyond the {MAX_COUNT} to which float32 counts exactly")
        scaled = self.units.scale(own)
        self._check(own, ~np.isfinite(scaled), "beyond float32 in the model's scale")
        if self._support == "unit":
            self._check_unit(own, scaled)
        return (scaled > 0.5).astype(np.float32) if self._binarize == "threshold" else scaled

    def _flat(self, rows: np.ndarray) -> np.ndarray:
        """(N, X), or images of the model's shape, -> (N, X)."""
        image = self.image_shape
        shapes: list[tuple[int, ...]] = [(self.input_dim,)]
        if image is not None:
            shapes += [image, (*image, 1)] if len(image) == 2 else [image]
        if rows.ndim < 2 or rows.shape[1:] not in shapes:
            known = " or ".join(f"(N, {', '.join(map(str, shape))})" for shape in shapes)
            raise InputError(f"rows of shape {rows.shape}: expected {known}; one row x goes in as x[None]")
        return rows.reshape(len(rows), self.input_dim)

    def _check_unit(self, own: np.ndarray, scaled: np.ndarray) -> None:
        factor = 1.0 if self.units.factor is None else float(self.units.factor.max())
        self._check(own, (scaled < 0) | (scaled > 1), f"outside the 0 to {factor:g} of the model's own data")
        if own.dtype.kind == "f" and not self.units.clip and factor > 1 and 0 < own.max() <= 1:
            warnings.warn(
                f"no value of the rows is above 1, and the model's own data went up to {factor:g}", stacklevel=4
            )

    def _check(self, own: np.ndarray, bad: np.ndarray, why: str) -> None:
        if bad.any():
            place, value = first_bad("rows", own, bad, self.columns)
            raise InputError(f"{place} is {value}, {why}")

    def _means(self, z: Tensor) -> Tensor:
        return self.vae.likelihood.mean(self.vae.decode(z))

    def _drawn(self, generator: torch.Generator | None, z: Tensor, x: Tensor | None = None) -> Tensor:
        return self.vae.likelihood.sample(self.vae.decode(z), generator, x)

    def _own(self, values: np.ndarray) -> np.ndarray:
        """(N, X) means or draws -> in the data's own units."""
        if self._binarize == "threshold":  # what was cut is a class, not a place on a scale
            return values
        own = self.units.restore(values)
        is_shifted = self.units.shift is not None and self.units.shift.any()
        return own if is_shifted else own.astype(np.float32)

    @torch.no_grad()
    def _in_parts(
        self,
        function: Callable[..., Tensor | tuple[Tensor, ...]],
        *inputs: np.ndarray | Tensor,
        widths: tuple[int, ...],
        dtype: type[np.floating] = np.float32,
    ) -> list[np.ndarray]:
        """inputs, each (N, ...) -> a result (N, width) for each of `widths`, so many rows at a time."""
        num_rows = len(inputs[0])
        results: list[np.ndarray] = [np.empty((num_rows, width), dtype) for width in widths]
        for start in range(0, num_rows, CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            given = function(*(torch.as_tensor(value[part]).to(self.device) for value in inputs))
            for result, values in zip(results, (given,) if isinstance(given, Tensor) else given, strict=True):
                result[part] = values.cpu().numpy()
        return results


def load(path: str | Path, device: str | torch.device = "cpu") -> Model:
    """The model exported to the folder `path`, ready for rows in the data's own units.

    InputError: the folder holds no exported model, or a damaged one, or there is no such device.
    """
    config = read_config(path)  # once: weights and units are to be of one model
    return Model(load_vae(path, device, config), config)


def _array(values: np.ndarray | Tensor, what: str) -> np.ndarray:
    """A NumPy array of real numbers, without copying where that can be."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values
        array = values.numpy() if not values.is_complex() else np.empty(0, complex)
    else:
        array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise InputError(f"{what} of {array.dtype}: expected real numbers, such as float32 or uint8")
    return array.astype(np.int8) if array.dtype.kind == "b" else array


def _like(given: Rows, result: np.ndarray) -> Rows:
    """The result as what was given: a tensor on its device, or a NumPy array."""
    return torch.from_numpy(result).to(given.device) if isinstance(given, Tensor) else result
