"""upscale_array: tiles, alpha, grey, memory running out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sr_kernels import inference
from sr_kernels.inference import upscale_array

RNG = np.random.default_rng(0)


def picture(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
    return RNG.integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def repeated(image: np.ndarray, scale: int = 4) -> np.ndarray:
    return image.repeat(scale, 0).repeat(scale, 1)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("rgb_range", [1.0, 255.0])
@pytest.mark.parametrize("shape", [(7, 9, 3), (1, 1, 3), (7, 9, 1), (7, 9), (1, 33, 3)])
def test_levels_come_back_exactly(
    nearest_class: Any, shape: tuple[int, ...], rgb_range: float, dtype: Any
) -> None:
    image = picture(*shape, dtype=dtype)
    result = upscale_array(nearest_class(rgb_range=rgb_range), image)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, repeated(image))


@pytest.mark.parametrize(("tile", "overlap"), [(16, 4), (17, 4), (24, 8), (40, 5), (100, 0)])
@pytest.mark.parametrize("size", [(50, 61), (16, 100), (9, 9), (1, 70)])
def test_tiles_equal_the_whole(
    nearest_class: Any, size: tuple[int, int], tile: int, overlap: int
) -> None:
    """A receptive radius not above the overlap: equal to the last bit."""
    image = picture(*size, 3)
    whole = upscale_array(nearest_class(reach=overlap), image, tile=None)
    net = nearest_class(reach=overlap)
    tiled = upscale_array(net, image, tile=tile, overlap=overlap)
    np.testing.assert_array_equal(tiled, whole)
    assert max(max(seen) for seen in net.seen) <= max(tile, 0)


def test_too_small_an_overlap_shows(nearest_class: Any) -> None:
    """The test above can fail."""
    image = picture(50, 61, 3)
    whole = upscale_array(nearest_class(reach=6), image, tile=None)
    tiled = upscale_array(nearest_class(reach=6), image, tile=24, overlap=2)
    assert (whole != tiled).any()


def test_tiles_begin_at_multiples(nearest_class: Any) -> None:
    class Windowed(nearest_class):  # type: ignore[misc, valid-type]
        """Its result depends on where the windows of 16 pixels lie, as ELAN's does."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            height, width = x.shape[2:]
            padded = torch.nn.functional.pad(x, (0, -width % 16, 0, -height % 16), mode="replicate")
            means = torch.nn.functional.avg_pool2d(padded, 16)
            means = means.repeat_interleave(16, 2).repeat_interleave(16, 3)
            return super().forward(means[:, :, :height, :width])

    image = picture(100, 131, 3)
    whole = upscale_array(Windowed(multiple=16), image, tile=None)
    for tile, overlap in ((64, 16), (70, 1), (48, 0), (128, 32)):
        net = Windowed(multiple=16)
        np.testing.assert_array_equal(upscale_array(net, image, tile=tile, overlap=overlap), whole)
        assert len(net.seen) > 1


@pytest.mark.parametrize("limit", [40 * 40, 30 * 30, 17 * 17])
def test_memory_running_out_halves_the_tile(nearest_class: Any, limit: int) -> None:
    image = picture(90, 70, 3)
    told: list[str] = []
    net = nearest_class(limit=limit, reach=3)
    result = upscale_array(net, image, tile=None, overlap=3, notify=told.append)
    np.testing.assert_array_equal(result, upscale_array(nearest_class(reach=3), image, tile=None))
    assert told
    assert all("memory ran out" in text for text in told)


def test_memory_running_out_midway(nearest_class: Any) -> None:
    """What is done stays done: progress never goes back and ends at the whole."""
    net = nearest_class(reach=3)
    steps: list[int] = []

    def progress(done: int, total: int) -> None:
        assert total == 90 * 70
        steps.append(done)
        if len(steps) == 3:
            net.limit = 400

    image = picture(90, 70, 3)
    result = upscale_array(net, image, tile=32, overlap=3, progress=progress)
    np.testing.assert_array_equal(result, upscale_array(nearest_class(reach=3), image, tile=None))
    assert steps == sorted(steps)
    assert steps[-1] == 90 * 70


def test_memory_running_out_for_good(nearest_class: Any) -> None:
    with pytest.raises(inference.OutOfMemoryError, match="even with a tile"):
        upscale_array(nearest_class(limit=4), picture(40, 40, 3), tile=32, overlap=4)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"),
    ],
)
def test_what_counts_as_memory_running_out(error: Exception) -> None:
    assert inference.is_out_of_memory(error)


def test_torch_says_it_as_we_expect() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert inference.is_out_of_memory(caught.value)
    assert not inference.is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_another_error_passes_through(nearest_class: Any) -> None:
    class Broken(nearest_class):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("a kernel failed")

    with pytest.raises(RuntimeError, match="a kernel failed"):
        upscale_array(Broken(), picture(8, 8, 3))


def test_not_finite(nearest_class: Any) -> None:
    class Overflowing(nearest_class):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * float("nan")

    with pytest.raises(RuntimeError, match="NaN"):
        upscale_array(Overflowing(), picture(8, 8, 3))


def test_wrong_shape(nearest_class: Any) -> None:
    net = nearest_class()
    net.forward = lambda x: x
    with pytest.raises(RuntimeError, match=r"shape \(1, 3, 8, 8\)"):
        upscale_array(net, picture(8, 8, 3))


def test_out_of_range_is_clipped(nearest_class: Any) -> None:
    class Loud(nearest_class):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 4 - 1.6

    image = np.array([[[0, 128, 255]]], np.uint8)
    assert upscale_array(Loud(), image)[0, 0].tolist() == [0, 104, 255]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("colours", [1, 3])
def test_opaque_stays_opaque_and_clear_stays_clear(
    nearest_class: Any, colours: int, dtype: Any
) -> None:
    peak = np.iinfo(dtype).max
    image = picture(30, 40, colours + 1, dtype=dtype)
    image[..., -1] = peak
    image[:, 20:, -1] = 0
    result = upscale_array(nearest_class(), image, tile=16, overlap=4)
    assert (result[:, : 4 * 17, -1] == peak).all()
    assert (result[:, 4 * 23 :, -1] == 0).all()
    visible = result[:, :80, :-1]
    np.testing.assert_array_equal(visible, repeated(image[:, :20, :-1]))


def test_no_fringe(nearest_class: Any) -> None:
    """A red disc on transparent black: a network that looks around must not see the black."""
    y, x = np.mgrid[:40, :40]
    disc = (y - 20) ** 2 + (x - 20) ** 2 < 100
    image = np.zeros((40, 40, 4), np.uint8)
    image[disc] = (200, 30, 10, 255)
    result = upscale_array(nearest_class(reach=3), image)
    visible = result[..., 3] > 0
    assert np.abs(result[visible][:, :3].astype(int) - (200, 30, 10)).max() <= 1


def test_alpha_in_strips_equals_alpha_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "STRIP_PIXELS", 5 * 16 * 11)
    alpha = picture(37, 11, 1)
    target = np.zeros((148, 44, 1), np.uint8)
    inference._enlarge_alpha(alpha, target, 4)
    whole = torch.nn.functional.interpolate(
        torch.from_numpy(alpha[None, None, :, :, 0].astype(np.float32)),
        scale_factor=4,
        mode="bicubic",
    )
    expected = whole[0, 0].clamp(0, 255).round().numpy()
    np.testing.assert_array_equal(target[..., 0], expected)


def test_grey_comes_back_grey(nearest_class: Any) -> None:
    """Channels that the network changes differently come back as their luma."""

    class Tinting(nearest_class):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * x.new_tensor([1.0, 0.5, 0.0]).view(1, 3, 1, 1)

    image = np.full((4, 4, 1), 100, np.uint8)
    result = upscale_array(Tinting(), image)
    assert result.shape == (16, 16, 1)
    assert (result == round(100 * (0.299 + 0.5 * 0.587))).all()


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        ([[1, 2]], TypeError, "numpy array"),
        (np.zeros((4, 4, 3), np.float32), TypeError, "uint8 or uint16"),
        (np.zeros((4,), np.uint8), ValueError, "shape"),
        (np.zeros((4, 4, 5), np.uint8), ValueError, "1 to 4 channels"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "empty"),
        (np.zeros((1, 4, 4, 3), np.uint8), ValueError, "shape"),
    ],
)
def test_bad_images(nearest_class: Any, image: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        upscale_array(nearest_class(), image)


@pytest.mark.parametrize(
    ("tile", "overlap", "error", "words"),
    [
        (0, None, ValueError, "at least 1"),
        (-5, None, ValueError, "at least 1"),
        (2.5, None, TypeError, "whole number"),
        ("big", None, TypeError, "whole number"),
        (True, None, TypeError, "whole number"),
        (8, None, ValueError, "16 pixels or more"),
        (64, -1, ValueError, "negative"),
        (64, 64, ValueError, "leaves nothing"),
        (64, 32, ValueError, "overlap at most 16"),
        (64, 1.5, TypeError, "whole number"),
    ],
)
def test_bad_tiles(
    nearest_class: Any, tile: Any, overlap: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        upscale_array(nearest_class(multiple=16), picture(99, 99, 3), tile=tile, overlap=overlap)


def test_automatic_tile_follows_memory(nearest_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = []
    for free in (1 << 20, 64 << 20, 1 << 40):
        monkeypatch.setattr(inference, "available_memory", lambda device="cpu", free=free: free)
        sides.append(inference.choose_tile(nearest_class(multiple=16)))
    assert sides == sorted(sides)
    assert sides[0] >= 32
    assert all(side % 16 == 0 for side in sides)


def test_available_memory_is_plausible() -> None:
    assert 1 << 20 < inference.available_memory() < 1 << 50
