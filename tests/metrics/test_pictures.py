import numpy as np
import pytest

from pipeline.metrics.pictures import labelled_grid, neighbours_picture

WHITE = (255, 255, 255)


def solid(*color, height=5, width=7):
    return np.full((height, width, 3), color, np.uint8)


def boxes_of(picture, color):
    """(left, top, right, bottom) of all pixels of this colour; right and bottom exclusive."""
    rows, columns = np.nonzero((np.asarray(picture) == color).all(axis=2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def ink(picture):
    """The box around everything that isn't white, and the picture's size."""
    rows, columns = np.nonzero((np.asarray(picture) != WHITE).any(axis=2))
    return (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1), picture.size


RED, GREEN, BLUE = solid(200, 0, 0), solid(0, 200, 0), solid(0, 0, 200)


def test_grid_without_texts_is_tiles_and_margins():
    picture = labelled_grid([("", [RED, GREEN]), ("", [BLUE])], scale=3)
    assert picture.mode == "RGB"
    assert picture.size == (24 + 21 + 4 + 21 + 24, 24 + 15 + 4 + 15 + 24)
    assert boxes_of(picture, (200, 0, 0)) == (24, 24, 24 + 21, 24 + 15)
    assert boxes_of(picture, (0, 200, 0)) == (49, 24, 49 + 21, 24 + 15)
    assert boxes_of(picture, (0, 0, 200)) == (24, 43, 24 + 21, 43 + 15)


def test_grid_keeps_every_pixel():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    picture = np.asarray(labelled_grid([("", [image])], scale=2))
    np.testing.assert_array_equal(picture[24:34:2, 24:38:2], image)
    np.testing.assert_array_equal(picture[25:35:2, 25:39:2], image)


@pytest.mark.parametrize("scale", [1, 2, 6])
@pytest.mark.parametrize("title", [None, "T", "A title far wider than the pictures that it stands above"])
def test_nothing_is_clipped(scale, title):
    rows = [("a", [RED, RED]), ("a long, yjgpq label", [GREEN])]
    for picture in (
        labelled_grid(rows, scale, title),
        neighbours_picture(np.stack([RED, BLUE]), np.stack([GREEN, RED]), np.array([[0], [1]]), scale, title),
    ):
        (left, top, right, bottom), (width, height) = ink(picture)
        assert min(left, top, width - right, height - bottom) >= 20  # texts may reach a little into a margin


def test_labels_end_beside_their_row():
    picture = labelled_grid([("one", [RED]), ("another", [GREEN])], scale=6, title="Title")
    left, top, _, bottom = boxes_of(picture, (0, 200, 0))
    label = np.asarray(picture)[top:bottom, : left - 1]
    rows, columns = np.nonzero((label != WHITE).any(axis=2))
    assert columns.min() >= 23
    assert 14 <= left - 1 - columns.max() <= 18
    assert abs((rows.min() + rows.max()) / 2 - (bottom - top) / 2) <= 3
    assert boxes_of(picture, (200, 0, 0))[0] == left  # tiles of all rows share their columns


def test_a_title_only_moves_the_grid_down():
    plain, titled = labelled_grid([("x", [RED])], 4), labelled_grid([("x", [RED])], 4, "Ti")
    shift = titled.size[1] - plain.size[1]
    assert shift > 24
    left, top, right, bottom = boxes_of(plain, (200, 0, 0))
    assert boxes_of(titled, (200, 0, 0)) == (left, top + shift, right, bottom + shift)


def test_each_sample_stands_beside_its_neighbours():
    picture = neighbours_picture(np.stack([RED, BLUE]), np.stack([GREEN, RED]), np.array([[1, 0], [0, 0]]), 10)
    pixels = np.asarray(picture)
    sample_left, top, _, _ = boxes_of(picture, (0, 0, 200))
    assert sample_left == 24
    first_row = boxes_of(picture, (200, 0, 0))
    assert first_row[:2] == (24, top - 54)
    greens = boxes_of(picture, (0, 200, 0))
    train_left = first_row[2] - 70  # the red training image is the rightmost red
    assert greens == (train_left, top - 54, train_left + 74 + 70, top + 50)
    assert tuple(pixels[top - 54 + 25, train_left + 35]) == (200, 0, 0)
    assert tuple(pixels[top - 54 + 25, train_left + 74 + 35]) == (0, 200, 0)
    assert picture.size[1] == top + 50 + 24
    assert picture.size[0] >= train_left + 144 + 24  # the heading is wider than two tiles


def test_what_cannot_be_drawn_says_why():
    with pytest.raises(ValueError, match="at least one row"):
        labelled_grid([])
    with pytest.raises(ValueError, match="row 'b' has no images"):
        labelled_grid([("a", [RED]), ("b", [])])
    with pytest.raises(ValueError, match="row 'b' holds images of shape"):
        labelled_grid([("a", [RED]), ("b", [solid(0, 0, 0, height=6)])])
    with pytest.raises(ValueError, match="row 'a' must be uint8 images"):
        labelled_grid([("a", [RED / 255])])
    with pytest.raises(ValueError, match="scale must be at least 1, got 0"):
        labelled_grid([("a", [RED])], scale=0)
    samples = RED[None]
    with pytest.raises(ValueError, match=r"shape \[1, k\], one row per sample, got \[2, 1\]"):
        neighbours_picture(samples, samples, np.zeros((2, 1), np.int64))
    with pytest.raises(ValueError, match=r"nearest_indices must be in 0\.\.0"):
        neighbours_picture(samples, samples, np.ones((1, 1), np.int64))
