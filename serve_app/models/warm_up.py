"""Do once what a first request does, so that libraries have taken their memory before a worker measures its own.

Code that runs for the first time, thread pools and buffers take tens of megabytes, which no eviction gives back.
"""

from __future__ import annotations

import io
import logging

from PIL import Image

from serve_app.core.catalog import Catalog, PublishedModel
from serve_app.core.forms import key_of_tier
from serve_app.models.loader import ModelLoader
from serve_app.tasks.images import decode_image
from serve_app.tasks.tensors import probe

logger = logging.getLogger(__name__)

_PHOTO_PX = (640, 480)


def warm_up(loader: ModelLoader, catalog: Catalog) -> None:
    """Decode a photo, and load and run the model of each runtime that takes the least memory,
    and the same of the forms that models go over to.

    A model that fails is logged; its own requests report the error.
    """
    encoded = io.BytesIO()
    Image.effect_noise(_PHOTO_PX, 64).convert("RGB").save(encoded, "JPEG")
    decode_image(encoded.getvalue(), _PHOTO_PX[0] * _PHOTO_PX[1])
    smallest: dict[str, PublishedModel] = {}
    for model in sorted(catalog.models, key=lambda model: model.weights_bytes + model.workspace_bytes):
        smallest.setdefault(model.runtime, model)
    keys = {model.model_id: model for model in smallest.values()}
    others: dict[str, PublishedModel] = {}
    for form in sorted(
        (each for forms in catalog.faster.values() for each in forms), key=lambda form: form.weights_bytes
    ):
        others.setdefault(form.runtime, form)
    keys |= {key_of_tier(form.model_id, form.profile.tier): form for form in others.values()}
    for key, model in keys.items():
        try:
            loaded = loader.load(key)
            try:
                loaded.run(probe(model.contract, tuple(axis.smallest for axis in model.contract.axes)))
            finally:
                loaded.unload()
        except Exception as error:
            # Foreign modules raise what they like, and a worker that starts cold serves all the same.
            logger.warning("the worker starts cold: model %s: %s", model.model_id, error)
