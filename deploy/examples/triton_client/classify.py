"""Inference with NVIDIA's ``tritonclient``, which speaks the Open Inference Protocol as every location does.

Run it while ``edgeserve up`` serves::

    pip install 'tritonclient[http]'
    python deploy/examples/triton_client/classify.py --url 127.0.0.1:8000/paris --model resnet50
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import tritonclient.http as triton


def classify(url: str, model: str, seed: int) -> tuple[np.ndarray, str]:
    """Send one random image as a binary tensor.

    Args:
        url: host, port and the path of a location, without ``http://``.
        model: a model or a family of the catalog.
        seed: of the image.

    Returns:
        Logits of shape (1, classes), and the name of the model that answered.
    """
    with triton.InferenceServerClient(url, network_timeout=60.0, connection_timeout=60.0) as client:
        if not client.is_server_ready():
            raise SystemExit(f"no worker is ready at {url}; see edgeserve status")
        described = client.get_model_metadata(model)
        tensor, logits = described["inputs"][0], described["outputs"][0]
        shape = [1, *tensor["shape"][1:]]
        image = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
        given = triton.InferInput(tensor["name"], shape, tensor["datatype"])
        given.set_data_from_numpy(image, binary_data=True)
        wanted = triton.InferRequestedOutput(logits["name"], binary_data=True)
        answer = client.infer(model, [given], outputs=[wanted])
        return answer.as_numpy(logits["name"]), answer.get_response()["model_name"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print which model answered, and its five best classes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", default="127.0.0.1:8000/paris", help="host:port/location")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    logits, name = classify(options.url, options.model, options.seed)
    best = np.argsort(logits[0])[::-1][:5]
    print(f"{name}: classes {', '.join(str(index) for index in best)}")


if __name__ == "__main__":
    main()
