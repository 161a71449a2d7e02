"""Pictures of examples: their shades, their order and size, and which are too large."""

import numpy as np
import pytest
from PIL import Image

from vae.config import InputError
from vae.images import num_that_fit, save_grid, save_reconstructions, shades


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize("image_shape", [None, (2, 2)])
def test_shades_of_any_data_fill_the_range_whatever_the_outliers(image_shape, logarithmic):
    rng = np.random.default_rng(0)
    train = rng.poisson([1, 20, 300, 5000], (500, 4)).astype(np.float32)
    train[0, 1] = 1e6
    drawn = shades(train, train, image_shape, logarithmic)
    assert np.isfinite(drawn).all()
    inside = (drawn >= 0) & (drawn <= 1)
    assert inside.mean() > 0.95
    columns = drawn.clip(0, 1).std(axis=0)
    assert (columns > 0.1).all() if image_shape is None else drawn.clip(0, 1).std() > 0.1


def test_shades_of_a_constant_and_of_a_rare_column_are_drawn():
    train = np.zeros((1000, 3), dtype=np.float32)
    train[:, 0], train[7, 1], train[:, 2] = 5, 9, np.linspace(-3, 3, 1000)
    drawn = shades(train, train, None)
    assert (drawn[:, 0] == 0).all()
    assert (drawn[7, 1], drawn[8, 1]) == (1, 0)


def test_rows_in_the_unit_interval_are_drawn_as_they_are():
    rows = np.random.default_rng(0).random((5, 4), dtype=np.float32) / 2
    assert shades(rows, rows, None) is rows


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_a_grid_shows_small_images_enlarged_and_in_order(tmp_path):
    rows = np.zeros((5, 4), dtype=np.float32)
    rows[3] = 1  # the first of the second line
    save_grid(rows, (2, 2), tmp_path / "grid.png", columns=3)
    image = pixels(tmp_path / "grid.png")
    assert image.shape[0] >= 2 * 64
    assert image.shape[1] >= 3 * 64
    white = np.argwhere((image == 255).all(axis=-1))
    assert len(white) == 64 * 64
    assert white[:, 0].min() > image.shape[0] // 2
    assert white[:, 1].max() < image.shape[1] // 3


@pytest.mark.parametrize("image_shape", [(6, 8), (6, 8, 1), (4, 4, 3), (6, 4, 2), None])
def test_every_kind_of_row_can_be_drawn(tmp_path, image_shape):
    rows = np.random.default_rng(0).random((7, 48), dtype=np.float32)
    save_grid(rows, image_shape, tmp_path / "grid.png")
    save_reconstructions(rows, rows, image_shape, tmp_path / "pairs.png")
    assert pixels(tmp_path / "pairs.png").shape[0] > pixels(tmp_path / "grid.png").shape[0]


def test_colours_keep_their_channels(tmp_path):
    save_grid(np.array([[1.0, 0.0, 0.0]], dtype=np.float32), (1, 1, 3), tmp_path / "red.png")
    assert pixels(tmp_path / "red.png")[10, 10].tolist() == [255, 0, 0]


def test_reconstructions_stand_below_their_originals(tmp_path):
    originals, reconstructions = np.ones((3, 4), np.float32), np.zeros((3, 4), np.float32)
    save_reconstructions(originals, reconstructions, (2, 2), tmp_path / "pairs.png", columns=2)
    image = pixels(tmp_path / "pairs.png")
    height = image.shape[0] // 4
    lines = [image[index * height + height // 2, image.shape[1] // 4, 0] for index in range(4)]
    assert lines == [255, 0, 255, 0]


def test_images_of_a_megapixel_fit_into_pictures_and_what_is_asked_for_beyond_is_refused(tmp_path):
    assert 8 <= num_that_fit(1117 * 1117, (1117, 1117)) < 64
    assert num_that_fit(1117 * 1117, (1117, 1117), tiles=2) * 2 < 80
    assert num_that_fit(10**8, (10**4, 10**4)) == 1
    with pytest.raises(InputError, match="ask for fewer"):
        save_grid(np.broadcast_to(np.float32(0), (64, 1117 * 1117)), (1117, 1117), tmp_path / "grid.png")
