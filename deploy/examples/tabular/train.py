"""Bring a random forest of scikit-learn to EdgeServe: train it, and write it as ``iris-forest.onnx``.

In this folder::

    pip install scikit-learn skl2onnx
    python train.py
    edgeserve publish --edge edge.yaml

XGBoost and LightGBM go the same way, with the converters of ``onnxmltools``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODEL = "iris-forest.onnx"


def train() -> Any:
    """Return a forest that tells three kinds of iris apart by four lengths in cm."""
    from sklearn.datasets import load_iris
    from sklearn.ensemble import RandomForestClassifier

    features, kinds = load_iris(return_X_y=True)
    return RandomForestClassifier(n_estimators=50, random_state=0).fit(features, kinds)


def write(forest: Any, path: Path) -> None:
    """Write a classifier of scikit-learn with four features as an ONNX graph."""
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType

    graph = to_onnx(
        forest,
        initial_types=[("X", FloatTensorType([None, 4]))],
        # Otherwise probabilities are a list of dictionaries, which is no tensor.
        options={"zipmap": False},
        target_opset=17,
    )
    path.write_bytes(graph.SerializeToString())


if __name__ == "__main__":
    write(train(), Path(MODEL))
    print(f"{MODEL} is written; now run: edgeserve publish --edge edge.yaml")
