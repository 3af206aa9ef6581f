"""What ``edgeserve infer`` prints of an answer, and draws into a picture."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from serve_app.cli.drawing import color_of, draw
from serve_app.cli.infer import print_answer
from serve_app.errors import EdgeServeError


def printed(**answer: Any) -> list[str]:
    out = Console(file=io.StringIO(), width=120)
    print_answer(answer, out)
    return [" ".join(line.split()) for line in out.file.getvalue().splitlines()]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


BOX = {"label": "[cat]", "index": 3, "score": 0.876, "box": [4.4, 8, 20, 30.6]}


def test_every_answer_is_printed_for_people() -> None:
    prediction = {"label": "cat [sic]", "index": 1, "probability": 0.5}
    assert printed(predictions=[prediction]) == ["50.00% cat [sic]"]
    assert printed(detections=[BOX])[1] == "0.88 [cat] 4 8 20 31"
    assert printed(detections=[]) == ["nothing is detected"]
    assert printed(classes=[{"label": "road", "index": 1, "share": 0.25}]) == ["25.00% road"]
    speech = {
        "speech": [{"start_s": 0.5, "end_s": 2}],
        "speech_share": 0.5,
        "duration_s": 3,
        "probability": {"largest": 1},
    }
    assert printed(**speech) == ["0.50 s to 2.00 s", "speech in 50.0% of 3.00 s, largest probability 1.000"]
    assert printed(embeddings=[[0.5] * 9]) == ["9 dimensions: " + "0.5000 " * 8 + "..."]
    assert printed(outputs={"y": [1, None]}, labels=["b"]) == ["y: [1, null]", "labels: b"]


def test_boxes_are_drawn_where_they_are() -> None:
    picture = np.asarray(draw(png(Image.new("RGB", (64, 64), "black")), {"detections": [BOX]}))
    assert picture[30, 12].tolist() == picture[20, 4].tolist() == list(color_of(3))
    assert not picture[25, 12].any()
    assert not picture[40:].any()


def test_a_mask_colors_everything_but_the_background() -> None:
    classes = Image.fromarray(np.array([[0, 1], [2, 0]], np.uint8))
    mask = {"encoding": "png;base64", "data": base64.b64encode(png(classes)).decode()}
    picture = np.asarray(draw(png(Image.new("RGB", (2, 2), "white")), {"mask": mask}))
    assert picture[0, 0].tolist() == picture[1, 1].tolist() == [255, 255, 255]
    assert picture[0, 1] == pytest.approx((np.array(color_of(1)) + 255) / 2, abs=1)
    assert picture[0, 1].tolist() != picture[1, 0].tolist()


def test_other_answers_cannot_be_drawn() -> None:
    with pytest.raises(EdgeServeError, match="model m has the task embedding, whose answer cannot be drawn"):
        draw(b"", {"model": "m", "task": "embedding"})
