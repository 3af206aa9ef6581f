"""Convert the bytes of an image to the input of a model, and say where in that input the picture lies.

``crop`` has the arithmetic of torchvision's ``ImageClassification`` preset on a PIL image, to the last bit.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from serve_app.core.contract import Axis, Contract, TensorSpec
from serve_app.core.task import ImageInput
from serve_app.errors import InvalidRequest
from serve_app.tasks.base import TaskModel
from serve_app.tasks.tensors import NUMPY_TYPES

FORMATS = ("JPEG", "PNG", "WEBP")

#: Beyond this ratio of the sides only the cropped part is resized: an image one pixel high must not cost gigabytes.
MAX_RATIO = 32

#: The margin of a letterbox: the gray that detectors are trained with.
_MARGIN = 114

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a picture lies in the input of a model.

    Attributes:
        width, height: of the picture, in its own pixels.
        input_width, input_height: of the input.
        scale_x, scale_y: pixels of the input for one of the picture.
        left, top: of the picture in the input; negative where it is cut.
    """

    width: int
    height: int
    input_width: int
    input_height: int
    scale_x: float
    scale_y: float
    left: float
    top: float

    def to_picture(self, boxes: NDArray[np.floating]) -> NDArray[np.float64]:
        """Convert boxes (x1, y1, x2, y2) from pixels of the input to pixels of the picture, cut at its edges.

        Args:
            boxes: shape (n, 4).
        """
        offset = np.array([self.left, self.top, self.left, self.top])
        scale = np.array([self.scale_x, self.scale_y, self.scale_x, self.scale_y])
        corners: NDArray[np.float64] = (boxes - offset) / scale
        return np.clip(corners, 0, np.array([self.width, self.height, self.width, self.height], np.float64))


def decode_image(data: bytes, max_pixels: int, channels: int = 3) -> Image.Image:
    """Decode a JPEG, PNG or WebP, recognized by its content, into an RGB or gray image.

    The orientation of EXIF is not applied, as in torchvision's reference. Of an animation the first frame counts. Of 16
    bits the upper 8 count, and transparency is left out.

    Raises:
        InvalidRequest: it is none of these formats, damaged, truncated, or has more than ``max_pixels`` pixels.
    """
    if not data:
        raise InvalidRequest("the body is empty; send the bytes of a JPEG, PNG or WebP image")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height <= max_pixels:
            return _to_channels(image, channels)
    except UnidentifiedImageError as error:
        raise InvalidRequest("the body is not a JPEG, PNG or WebP image; send one of these") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidRequest(
            f"the image is larger than the limit of {max_pixels} pixels; send a smaller one"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
        raise InvalidRequest(f"the image is damaged or truncated ({error}); send it again whole") from error
    raise InvalidRequest(
        f"the image has {width}x{height} pixels, more than the limit of {max_pixels}; send a smaller one"
    )


def image_input(data: bytes, model: TaskModel) -> tuple[dict[str, NDArray[np.generic]], Placement]:
    """Decode an image for a model with one image as its input; return the input by name, and the place of the picture.

    Raises:
        InvalidRequest: it cannot be decoded, or the model takes no image.
    """
    tensor = model.contract.inputs[0]
    preset = model.task.image
    if preset is None or len(tensor.shape) not in (3, 4):
        raise InvalidRequest(
            f"model {model.model_id!r} takes {tensor.name!r} of shape {list(tensor.shape)}, which is not an image; "
            f"send tensors to /v2/models/{model.model_id}/infer"
        )
    image = decode_image(data, model.max_pixels, preset.channels)
    pixels, placement = fit_image(image, preset, tensor, model.contract)
    array = pixels.astype(NUMPY_TYPES[tensor.datatype], copy=False)
    return {tensor.name: array[None] if len(tensor.shape) == 4 else array}, placement


def preprocess(image: Image.Image, preset: ImageInput) -> NDArray[np.float32]:
    """Resize, crop, scale and normalize an image by a ``crop`` preset.

    Returns:
        float32 of shape (channels, crop_px, crop_px).
    """
    return normalize(_center_crop(_resize(image, preset), preset.crop_px), preset)


def fit_image(
    image: Image.Image, preset: ImageInput, tensor: TensorSpec, contract: Contract
) -> tuple[NDArray[np.float32], Placement]:
    """Bring an image to a size that the input ``tensor`` takes, scale and normalize it.

    Returns:
        float32 of shape (channels, height, width), and the place of the picture in it.
    """
    width, height = image.size
    vertical, horizontal = _side(tensor, -2, contract), _side(tensor, -1, contract)
    if preset.fit == "crop":
        pixels = preprocess(image, preset)
        scale = preset.resize_px / min(width, height)
        left, top = ((preset.crop_px - side * scale) / 2 for side in (width, height))
        return pixels, _placement(image, pixels, scale, scale, left, top)
    if preset.fit == "stretch":
        new_width, new_height = (_allowed(preset.crop_px, side) for side in (horizontal, vertical))
        pixels = normalize(_resized(image, (new_width, new_height), preset), preset)
        return pixels, _placement(image, pixels, new_width / width, new_height / height)
    if preset.fit == "native":
        scale = min(1.0, horizontal.most / width, vertical.most / height)
        new_width = _allowed(width * scale + horizontal.multiple / 2, horizontal)
        new_height = _allowed(height * scale + vertical.multiple / 2, vertical)
        pixels = normalize(_resized(image, (new_width, new_height), preset), preset)
        return pixels, _placement(image, pixels, new_width / width, new_height / height)
    return _letterbox(image, preset, horizontal, vertical)


def normalize(image: Image.Image, preset: ImageInput) -> NDArray[np.float32]:
    """Scale to 0..1 and normalize each channel; return float32 of shape (channels, height, width)."""
    array = np.asarray(image, dtype=np.float32)
    array = array[:, :, None] if array.ndim == 2 else array
    pixels = array.transpose(2, 0, 1) / np.float32(255)
    mean = np.asarray(preset.mean, dtype=np.float32)[:, None, None]
    std = np.asarray(preset.std, dtype=np.float32)[:, None, None]
    return np.ascontiguousarray((pixels - mean) / std)


def _placement(
    image: Image.Image, pixels: NDArray[np.float32], scale_x: float, scale_y: float, left: float = 0, top: float = 0
) -> Placement:
    return Placement(
        width=image.width, height=image.height, input_width=pixels.shape[2], input_height=pixels.shape[1],
        scale_x=scale_x, scale_y=scale_y, left=left, top=top,
    )  # fmt: skip


def _letterbox(
    image: Image.Image, preset: ImageInput, horizontal: Axis, vertical: Axis
) -> tuple[NDArray[np.float32], Placement]:
    """Resize the whole picture in its proportions, and fill up with a margin on both sides."""
    width, height = image.size
    box = [min(preset.crop_px, side.most // side.multiple * side.multiple) for side in (horizontal, vertical)]
    scale = min(box[0] / width, box[1] / height)
    inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    outer = [_allowed(size + side.multiple - 1, side) for size, side in zip(inner, (horizontal, vertical), strict=True)]
    resized = _resized(image, inner, preset)
    left, top = (outer[0] - inner[0]) // 2, (outer[1] - inner[1]) // 2
    canvas = Image.new(image.mode, (outer[0], outer[1]), (_MARGIN,) * len(image.getbands()))
    canvas.paste(resized, (left, top))
    pixels = normalize(canvas, preset)
    return pixels, _placement(image, pixels, inner[0] / width, inner[1] / height, left, top)


def _side(tensor: TensorSpec, position: int, contract: Contract) -> Axis:
    """Return the sizes that one side of an image may have."""
    size, name = tensor.shape[position], tensor.axes[position]
    if not name:
        return Axis(name="fixed", least=size, most=size)
    return next(axis for axis in contract.axes if axis.name == name)


def _allowed(size: float, side: Axis) -> int:
    """Return the largest size up to ``size`` that the side of an input may have; the least one if there is none."""
    least = -(-side.least // side.multiple)
    return min(max(int(size) // side.multiple, least), side.most // side.multiple) * side.multiple


def _resized(image: Image.Image, size: tuple[int, int], preset: ImageInput) -> Image.Image:
    return image if size == image.size else image.resize(size, _RESAMPLING[preset.interpolation])


def _to_channels(image: Image.Image, channels: int) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow cuts 16 bits off at 255.
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        # Gives the same colors as the direct conversion, which warns about transparency given as bytes.
        image = image.convert("RGBA")
    return image.convert("L" if channels == 1 else "RGB")


def _resize(image: Image.Image, preset: ImageInput) -> Image.Image:
    """Resize the shorter side to ``resize_px``; of a very long image keep only the middle."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    new_long = int(preset.resize_px * long / short)
    resampling = _RESAMPLING[preset.interpolation]
    if new_long <= MAX_RATIO * preset.resize_px:
        size = (preset.resize_px, new_long) if width <= height else (new_long, preset.resize_px)
        return image if size == image.size else image.resize(size, resampling)
    kept = max(preset.crop_px, preset.resize_px)
    start = round((new_long - kept) / 2) * long / new_long
    end = start + kept * long / new_long
    if width <= height:
        return image.resize((preset.resize_px, kept), resampling, box=(0, start, width, end))
    return image.resize((kept, preset.resize_px), resampling, box=(start, 0, end, height))


def _center_crop(image: Image.Image, crop_px: int) -> Image.Image:
    """Cut out the middle; pixels outside of a smaller image are black."""
    width, height = image.size
    if width < crop_px or height < crop_px:
        padded = Image.new(image.mode, (max(width, crop_px), max(height, crop_px)))
        padded.paste(image, (max(0, crop_px - width) // 2, max(0, crop_px - height) // 2))
        image, (width, height) = padded, padded.size
    left, top = round((width - crop_px) / 2), round((height - crop_px) / 2)
    return image.crop((left, top, left + crop_px, top + crop_px))
