"""Large pictures: views, token orders and labels agree with what the model code does with the same pictures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from llava.mm_utils import get_anyres_image_grid_shape
from llava.model.assemble import arrange_crops
from playground.tiny.build import benchmarks as mb
from playground.tiny.train import wide
from playground.tiny.train.common import train_rng
from playground.tiny.train.packing import attributes as square_attributes
from playground.tiny.world.scenes import CELL, COLORS, GRID, IMAGE, PATCH, RGB, WIDE, render, sample_scene, sample_wide

LAYOUTS = (*WIDE, (4, 4))


@pytest.mark.parametrize("merge", wide.MERGES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_order_is_that_of_the_model(layout: tuple[int, int], merge: str) -> None:
    rows, cols = layout
    size = (CELL * cols, CELL * rows)
    grid = get_anyres_image_grid_shape(size, wide.PINPOINTS, IMAGE, "effective")
    expected = arrange_crops(merge, GRID * GRID, 1 + grid[0] * grid[1], grid, size)
    np.testing.assert_array_equal(wide.order(rows, cols, merge), expected.source_N.numpy())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_cell_is_cut_or_scaled_on_the_canvas(layout: tuple[int, int]) -> None:
    scene = sample_scene(np.random.default_rng(3), 4, 6, held_out=False, layouts=(layout,))
    width, height = wide.canvas(scene)
    views = wide.views(scene)
    across = width // IMAGE
    tiles = views[1:].reshape(height // IMAGE, across, IMAGE, IMAGE, 3).transpose(0, 2, 1, 3, 4)
    whole = tiles.reshape(height, width, 3)
    top, left = (height - CELL * scene.rows) // 2, (width - CELL * scene.cols) // 2
    inner = whole[top : top + CELL * scene.rows, left : left + CELL * scene.cols]
    np.testing.assert_array_equal(inner, render(scene))
    assert (whole.sum() - inner.sum()) == 0, "the padding is black"
    for thing in scene.things:  # every cell lies in one crop
        y, x = top + CELL * thing.row, left + CELL * thing.col
        assert y // IMAGE == (y + CELL - 1) // IMAGE and x // IMAGE == (x + CELL - 1) // IMAGE


@pytest.mark.parametrize("merge", wide.MERGES)
def test_labels_stand_where_the_views_show_the_objects(merge: str) -> None:
    rng = np.random.default_rng(4)
    for _ in range(6):
        scene = sample_wide(rng, 4, 8, held_out=False)
        table, places = wide.attributes(scene, merge), wide.order(scene.rows, scene.cols, merge)
        assert table.shape == (len(places), 6)
        assert not table[places == wide.NEWLINE].any()
        views = wide.views(scene)
        centers = np.flatnonzero(table[:, 5])
        assert len(centers) == len(scene.things), "one center for every object"
        for thing in scene.things:
            own = np.flatnonzero((table[:, 0] == thing.color + 1) & (table[:, 1] == thing.shape + 1))
            in_crops = own[places[own] >= GRID * GRID]
            assert len(own) > len(in_crops) >= 8
            assert np.isin(own, centers).sum() == 1
            wanted = np.clip(RGB[thing.color] + thing.shade, 0, 255)
            near = 0
            for token in in_crops:
                view, patch = divmod(int(places[token]), GRID * GRID)
                y, x = PATCH * (patch // GRID), PATCH * (patch % GRID)
                pixels = views[view, y : y + PATCH, x : x + PATCH].reshape(-1, 3).astype(int)
                near += bool((abs(pixels - wanted).max(1) == 0).any())
            # A patch that lies inside the band of a word may show nothing of the color.
            assert near >= 0.6 * len(in_crops), COLORS[thing.color]


def test_squares_are_labelled_as_without_crops() -> None:
    """On a 4 x 4 picture the crops of the spatial raster show what the plain 24 x 24 patches show."""
    scene = sample_scene(np.random.default_rng(5), 4, 6, held_out=False, layouts=((4, 4),))
    plain = square_attributes(scene)
    raster = wide.attributes(scene, "spatial_unpad")[GRID * GRID :].reshape(GRID, GRID + 1, 6)[:, :-1].reshape(-1, 6)
    same = (plain[:, :2] == raster[:, :2]).all(1)
    assert same.mean() > 0.99  # patches shared by two objects may differ
    np.testing.assert_array_equal(plain[:, 5] > 0, raster[:, 5] > 0)


def test_wide_benchmarks_are_held_out() -> None:
    build = mb.build_wide()
    assert len(build.items) >= 250
    assert all(scene.held_out() for scene in build.images.values())
    assert {(s.rows, s.cols) for s in build.images.values()} == set(WIDE)
    rng = train_rng("anyres")
    for _ in range(50):
        assert not sample_wide(rng, 4, 8, held_out=False).held_out()


def test_words_cannot_be_read_in_the_squeezed_view() -> None:
    """The band of a word is 9 pixels high; squeezed to half it has less than the 7 rows of its letters."""
    for rows, cols in WIDE:
        scale = min(IMAGE / (CELL * rows), IMAGE / (CELL * cols))
        assert 9 * scale < 7, (rows, cols)
    scene = sample_wide(np.random.default_rng(6), 4, 8, held_out=False)
    small = np.asarray(Image.fromarray(render(scene)).resize((IMAGE, IMAGE)))
    np.testing.assert_array_equal(wide.views(scene)[0], small)
