import numpy as np
import pytest

from pipeline.metrics.pictures import (
    amplified_difference,
    interpolations_picture,
    labelled_grid,
    neighbours_picture,
    readable_scale,
    reconstructions_picture,
)

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


def test_columns_are_captioned_and_as_wide_as_their_captions():
    picture = labelled_grid([("x", [RED, GREEN])], 1, columns=["a wide caption\n1", "b"])
    red, green = boxes_of(picture, (200, 0, 0)), boxes_of(picture, (0, 200, 0))
    plain = labelled_grid([("x", [RED, GREEN])], 1)
    assert green[0] - red[0] > 80, "the caption is wider than the tile"
    assert red[1] - boxes_of(plain, (200, 0, 0))[1] >= 40, "two lines stand above"
    above = np.asarray(picture)[24 : red[1] - 4]
    _, columns = np.nonzero((above != WHITE).any(axis=2))
    over_red = columns[columns < (red[0] + green[0]) // 2]
    assert abs((over_red.min() + over_red.max()) / 2 - (red[0] + red[2] - 1) / 2) <= 2
    (left, top, right, bottom), (width, height) = ink(picture)
    assert min(left, top, width - right, height - bottom) >= 20


def test_groups_of_rows_stand_apart():
    rows = [("", [RED]), ("", [GREEN]), ("", [BLUE]), ("", [solid(9, 9, 9)])]
    apart, together = labelled_grid(rows, 3, group_rows=2), labelled_grid(rows, 3)
    tops = [boxes_of(apart, color)[1] for color in ((200, 0, 0), (0, 200, 0), (0, 0, 200), (9, 9, 9))]
    assert np.diff(tops).tolist() == [19, 35, 19]
    assert apart.size[1] == together.size[1] + 16


def test_the_difference_is_signed_and_amplified_as_far_as_it_fits():
    original = np.full((1, 10, 10, 3), 100, np.uint8)
    changed = original.copy()
    changed[0, 0, 0], changed[0, 0, 1] = 110, 90
    difference, factor = amplified_difference(original, changed)
    assert factor == 8, "16 would cut 2 of 100 pixels"
    assert difference[0, 0, 0].tolist() == [208] * 3 and difference[0, 0, 1].tolist() == [48] * 3
    assert (difference[0, 1:] == 128).all()
    assert amplified_difference(original, original)[1] == 64
    assert amplified_difference(np.zeros_like(original), np.full_like(original, 255))[1] == 1


def test_reconstructions_stand_under_their_originals():
    originals, back = np.stack([RED, GREEN]), np.stack([solid(201, 0, 0), solid(0, 199, 0)])
    picture = reconstructions_picture(originals, back, ["worst\n30.1 dB", "best\n40.2 dB"], "Title")
    red, less_green = boxes_of(picture, (200, 0, 0)), boxes_of(picture, (0, 199, 0))
    assert red[2] - red[0] == 7 * readable_scale(originals) == 98
    assert boxes_of(picture, (201, 0, 0))[1] == less_green[1] == red[3] + 4
    assert boxes_of(picture, (192, 128, 128))[:2] == (red[0], less_green[3] + 4), "64 × one level of red"


def test_lines_stand_in_pairs():
    decoded = np.stack([np.stack([RED, GREEN, BLUE])] * 2)
    blended = np.stack([np.stack([solid(1, 2, 3)] * 3)] * 2)
    pixels = np.asarray(interpolations_picture(decoded, blended))
    column = boxes_of(pixels, (200, 0, 0))[0] + 3
    changes = [tuple(c) for c in pixels[:, column] if tuple(c) in ((200, 0, 0), (1, 2, 3))]
    assert changes == ([(200, 0, 0)] * 70 + [(1, 2, 3)] * 70) * 2


@pytest.mark.parametrize(("width", "scale"), [(8, 12), (16, 6), (32, 3), (64, 2), (128, 1), (129, 1), (512, 1)])
def test_small_images_are_shown_larger(width, scale):
    assert readable_scale(np.zeros((1, 4, width, 3), np.uint8)) == scale


def test_what_does_not_fit_says_so():
    with pytest.raises(ValueError, match="1 columns came, one for each of 2 images"):
        labelled_grid([("a", [RED, RED])], columns=["x"])
    with pytest.raises(ValueError, match="group_rows must be at least 1"):
        labelled_grid([("a", [RED])], group_rows=0)
    with pytest.raises(ValueError, match=r"reconstructions \[2, 5, 7, 3\] came, wanted \[1, 5, 7, 3\]"):
        amplified_difference(RED[None], np.stack([RED, RED]))
    with pytest.raises(ValueError, match="S at least 2"):
        interpolations_picture(RED[None, None], RED[None, None])
