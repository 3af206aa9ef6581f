"""Pictures of any kind and size become the input of a model, and boxes find their way back."""

import numpy as np
import pytest
from PIL import Image
from task_support import encoded, tensor

from serve_app.core.contract import Axis, Contract
from serve_app.core.task import ImageInput
from serve_app.errors import InvalidRequest
from serve_app.tasks.images import decode_image, fit_image

LIMIT = 1_000_000


def fitted(image: Image.Image, preset: ImageInput, height: int, width: int, **limits: Axis):
    sides = ("h" if height < 0 else "", "w" if width < 0 else "")
    spec = tensor("x", "FP32", 1, preset.channels, height, width, axes=("", "", *sides))
    contract = Contract(inputs=(spec,), outputs=(tensor("y", "FP32", 1),), axes=tuple(limits.values()))
    return fit_image(image, preset, spec, contract)


def plain(fit: str, size: int, channels: int = 3) -> ImageInput:
    return ImageInput(crop_px=size, mean=(0.0,) * channels, std=(1.0,) * channels, fit=fit)


def test_sixteen_bits_keep_their_upper_eight() -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    image = decode_image(encoded(Image.fromarray(values)), LIMIT)
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    assert image.mode == "RGB"


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_png_has_the_channels_of_the_model(mode: str, channels: int) -> None:
    image = Image.new("RGB", (6, 4), (255, 255, 255)).convert(mode)
    pixels = np.asarray(decode_image(encoded(image), LIMIT, channels))
    assert pixels.shape == ((4, 6) if channels == 1 else (4, 6, 3))
    assert pixels.min() == 255


def test_the_orientation_of_exif_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(Image.new("RGB", (6, 4)), "JPEG", exif=exif), LIMIT).size == (6, 4)


@pytest.mark.parametrize("data", [b"", b"no image", encoded(Image.new("RGB", (9, 9)))[:40]])
def test_what_is_no_image_is_refused_with_what_is_expected(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"JPEG, PNG or WebP|send it again whole"):
        decode_image(data, LIMIT)


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (7, 7), (1, 90)])
@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
def test_a_box_around_the_picture_comes_back_as_the_whole_picture(size: tuple[int, int], fit: str) -> None:
    pixels, place = fitted(Image.new("RGB", size, (255, 0, 0)), plain(fit, 32), 32, 32)
    assert pixels.shape == (3, 32, 32)
    rows, columns = np.nonzero(pixels[0] == 1)
    box = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]], np.float64)
    assert place.to_picture(box)[0] == pytest.approx([0, 0, *size])


def test_the_margin_of_a_letterbox_is_gray_and_on_both_sides() -> None:
    pixels, place = fitted(Image.new("L", (32, 16), 255), plain("letterbox", 32, 1), 32, 32)
    assert (place.left, place.top) == (0, 8)
    assert pixels[0, :8].max() == pixels[0, 24:].max() == np.float32(114 / 255)


def test_a_letterbox_of_free_sides_is_no_larger_than_its_multiple_demands() -> None:
    sides = {name: Axis(name=name, least=32, most=320, multiple=32) for name in ("h", "w")}
    pixels, _ = fitted(Image.new("RGB", (640, 300)), plain("letterbox", 320), -1, -1, **sides)
    assert pixels.shape == (3, 160, 320)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((100, 60), (64, 96)), ((4000, 2000), (128, 256)), ((3, 3), (32, 32)), ((256, 257), (256, 256))],
)
def test_a_native_picture_keeps_its_size_as_far_as_the_model_takes_it(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    sides = {name: Axis(name=name, least=32, most=256, multiple=16) for name in ("h", "w")}
    pixels, _ = fitted(Image.new("RGB", size), plain("native", 1), -1, -1, **sides)
    assert pixels.shape[1:] == expected


def test_a_crop_knows_where_the_picture_lies() -> None:
    image = Image.new("RGB", (200, 100))
    _, place = fitted(image, ImageInput(resize_px=50, crop_px=40, mean=(0, 0, 0), std=(1, 1, 1)), 40, 40)
    assert place.to_picture(np.array([[0.0, 0, 40, 40]]))[0] == pytest.approx([60, 10, 140, 90])
