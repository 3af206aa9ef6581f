import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_support import vision
from PIL import Image

from serve_app.core.task import ImageInput
from serve_app.errors import InvalidRequest
from serve_app.models.builders.registry import metadata
from serve_app.models.torchvision_compat import import_torchvision
from serve_app.tasks.classes import top_k
from serve_app.tasks.images import decode_image, preprocess

models = import_torchvision().models
LIMIT = 1_000_000


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise over a gradient."""
    noise = np.random.default_rng(seed).integers(0, 200, (height, width, 3))
    gradient = np.linspace(0, 55, width)[None, :, None]
    return Image.fromarray((noise + gradient).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


SIZES = [(500, 375), (375, 500), (256, 256), (224, 224), (100, 257), (32, 20), (1, 1), (1024, 33), (7, 200)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3"])
def test_preprocessing_is_that_of_torchvision(name: str, size: tuple[int, int]) -> None:
    image = picture(*size)
    expected = models.get_model_weights(name).DEFAULT.transforms()(image).numpy()
    actual = preprocess(image, metadata(vision(name)).task.image)
    assert actual.dtype == np.float32
    assert actual.flags.c_contiguous
    assert actual.shape == expected.shape
    assert np.max(np.abs(actual - expected)) < 1e-6


@pytest.mark.parametrize("resize_px", [40, 41, 50, 51])
@pytest.mark.parametrize("size", [(45, 30), (30, 45), (33, 33)])
def test_crop_larger_than_the_resized_image_is_padded_as_torchvision_does(
    resize_px: int, size: tuple[int, int]
) -> None:
    image = picture(*size)
    preset = import_torchvision().transforms._presets.ImageClassification
    expected = preset(crop_size=50, resize_size=resize_px)(image).numpy()
    actual = preprocess(image, ImageInput(resize_px=resize_px, crop_px=50))
    assert np.max(np.abs(actual - expected)) < 1e-6


@pytest.mark.parametrize("size", [(4000, 10), (10, 4000)])
def test_very_long_image_costs_no_more_than_its_middle(size: tuple[int, int]) -> None:
    image = picture(*size)
    expected = models.ResNet18_Weights.DEFAULT.transforms()(image).numpy()
    actual = preprocess(image, ImageInput())
    assert np.max(np.abs(actual - expected)) < 0.05, "at most one step of 1/255 apart"
    line = Image.new("RGB", (1, 60_000) if size[0] < size[1] else (60_000, 1), "white")
    assert preprocess(line, ImageInput()).shape == (3, 224, 224)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_three_formats_are_recognized_by_content(kind: str) -> None:
    data = encoded(picture(30, 20), kind)
    image = decode_image(data, LIMIT)
    assert (image.mode, image.size) == ("RGB", (30, 20))
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK"])
def test_every_color_mode_becomes_rgb(mode: str) -> None:
    source = picture(30, 20).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        source = Image.fromarray(np.asarray(source).astype(np.uint16) * 257)
    image = decode_image(encoded(source, "JPEG" if mode == "CMYK" else "PNG"), LIMIT)
    assert (image.mode, image.size) == ("RGB", (30, 20))


def test_palette_with_transparency_keeps_its_colors() -> None:
    source = picture(30, 20).quantize(16)
    data = encoded(source, "PNG", transparency=bytes(range(16)))
    assert np.array_equal(np.asarray(decode_image(data, LIMIT)), np.asarray(source.convert("RGB")))


def test_orientation_of_exif_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    assert decode_image(encoded(picture(30, 20), "JPEG", exif=exif), LIMIT).size == (30, 20)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(InvalidRequest, match="not a JPEG, PNG or WebP"):
        decode_image(encoded(picture(30, 20), kind), LIMIT)


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 100, b"<svg/>", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP"]
)
def test_data_that_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        decode_image(data, LIMIT)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_image_is_refused(kind: str, share: float) -> None:
    data = encoded(picture(60, 60), kind)
    with pytest.raises(InvalidRequest, match=r"damaged or truncated|not a JPEG"):
        decode_image(data[: int(len(data) * share)], LIMIT)


def png_claiming(width: int, height: int) -> bytes:
    """A small PNG whose header claims a size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(1001, 1000), (10_000, 10_000), (12_000, 12_000), (60_000, 60_000)])
def test_image_over_the_pixel_limit_is_refused_before_it_is_decoded(size: tuple[int, int]) -> None:
    with pytest.raises(InvalidRequest, match="1000000"):
        decode_image(png_claiming(*size), LIMIT)


def test_image_at_the_pixel_limit_is_decoded() -> None:
    assert decode_image(encoded(picture(100, 50), "PNG"), 5_000).size == (100, 50)
    with pytest.raises(InvalidRequest, match="100x50 pixels, more than the limit of 4999"):
        decode_image(encoded(picture(100, 50), "PNG"), 4_999)


@given(
    st.sampled_from(["JPEG", "PNG", "WEBP"]), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=8)
)
def test_damaged_image_is_decoded_or_refused_but_nothing_else(kind: str, damages: list[tuple[float, int]]) -> None:
    data = bytearray(encoded(picture(20, 20), kind))
    for place, value in damages:
        data[int(place * len(data))] = value
    try:
        image = decode_image(bytes(data), LIMIT)
    except InvalidRequest:
        return
    assert image.mode == "RGB"


def test_best_classes_come_first_with_their_softmax() -> None:
    best = top_k(np.array([1.0, 3.0, 2.0, 3.0], np.float32), ["a", "b", "c"], 3)
    assert [(item.label, item.index) for item in best] == [("b", 1), ("3", 3), ("c", 2)]
    total = np.exp([1, 3, 2, 3]).sum()
    assert best[0].probability == pytest.approx(np.exp(3) / total)
    assert sum(item.probability for item in top_k(np.arange(10, dtype=np.float32), (), 99)) == pytest.approx(1)


def test_softmax_of_huge_logits_is_stable() -> None:
    best = top_k(np.array([1e38, -1e38, 1e38], np.float32), (), 3)
    assert [item.probability for item in best] == [0.5, 0.5, 0.0]


def test_top_k_below_one_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="top_k must be at least 1"):
        top_k(np.zeros(3, np.float32), (), 0)
