"""Do once what a first request does, so that libraries have taken their memory before a worker measures its own.

Code that runs for the first time, thread pools and buffers take tens of megabytes, which no eviction gives back.
"""

from __future__ import annotations

import io
import logging

from PIL import Image

from serve_app.core.catalog import Catalog
from serve_app.errors import EdgeServeError
from serve_app.models.loader import ModelLoader
from serve_app.tasks.image_classification import decode_image, preprocess

logger = logging.getLogger(__name__)

_PHOTO_PX = (640, 480)


def warm_up(loader: ModelLoader, catalog: Catalog) -> None:
    """Decode a photo, and load and run the model that takes the least memory; do nothing where there is no model.

    A model that fails is logged; its own requests report the error.
    """
    model = min(catalog.models, key=lambda model: model.weights_bytes + model.workspace_bytes, default=None)
    if model is None:
        return
    encoded = io.BytesIO()
    Image.effect_noise(_PHOTO_PX, 64).convert("RGB").save(encoded, "JPEG")
    image = decode_image(encoded.getvalue(), _PHOTO_PX[0] * _PHOTO_PX[1])
    try:
        loaded = loader.load(model.model_id)
        try:
            loaded.infer(preprocess(image, model.image)[None])
        finally:
            loaded.unload()
    except EdgeServeError as error:
        logger.warning("the worker starts cold: %s", error)
