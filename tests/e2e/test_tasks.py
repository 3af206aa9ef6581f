"""What people send to models of any task, and read of their answers: over HTTP, by OpenAI's client, by the command."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import embedder_model
import httpx
import numpy as np
import pytest
from deployment_support import EMBEDDER, TAGGER

pytestmark = [pytest.mark.ray, pytest.mark.slow]

pytest.importorskip("tokenizers")

TEXT = {"Content-Type": "text/plain"}


def predict(url: str, model: str, content: bytes, headers: dict[str, str], **options: Any) -> httpx.Response:
    params = {"model": model, **options}
    return httpx.post(f"{url}/v1/predict", params=params, content=content, headers=headers, timeout=60)


def check_vector(response: httpx.Response, text: str) -> str:
    assert response.status_code == 200, response.text
    assert np.abs(np.array(response.json()["embeddings"][0]) - embedder_model.vector(text)).max() < 1e-5
    return response.json()["outcome"]


def unload_everywhere(deployment: Any, model: str) -> None:
    for location in ("paris", "tokyo", "virginia"):
        deployment.cli("unload", model, "--location", location, "--url", deployment.url)


def test_a_text_has_its_vector_whatever_the_outcome(deployment: Any) -> None:
    unload_everywhere(deployment, EMBEDDER)
    paris, tokyo = deployment.location("paris"), deployment.location("tokyo")
    assert check_vector(predict(paris, EMBEDDER, b"a cat sleeps", TEXT, forward="never"), "a cat sleeps") == "load"
    assert check_vector(predict(paris, EMBEDDER, b"a dog runs", TEXT, forward="never"), "a dog runs") == "hit"
    check_vector(predict(tokyo, EMBEDDER, b"a dog sleeps", TEXT, forward="prefer"), "a dog sleeps")


def test_simultaneous_first_texts_load_the_model_once(deployment: Any) -> None:
    unload_everywhere(deployment, EMBEDDER)
    loads = deployment.status()["virginia"]["model_loads"]
    texts = ["a cat", "a dog", "a cat runs", "dog sleeps"] * 5

    def ask(text: str) -> str:
        url = deployment.location("virginia")
        return check_vector(predict(url, EMBEDDER, text.encode(), TEXT, forward="never"), text)

    with ThreadPoolExecutor(20) as threads:
        outcomes = list(threads.map(ask, texts))
    assert set(outcomes) <= {"load", "join", "hit"}
    assert outcomes.count("load") <= 1
    assert deployment.status()["virginia"]["model_loads"] <= loads + 1


def test_the_client_of_openai_gets_vectors(deployment: Any) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{deployment.location('paris')}/v1", api_key="none", max_retries=0)
    texts = ["a cat", "a dog sleeps", "runs", "a dog runs", "cat"]
    expected = np.array([embedder_model.vector(text) for text in texts])
    for options in ({}, {"encoding_format": "float"}):
        response = client.embeddings.create(model=EMBEDDER, input=texts, **options)
        assert [each.index for each in response.data] == [0, 1, 2, 3, 4]
        assert np.abs(np.array([each.embedding for each in response.data]) - expected).max() < 1e-5
        assert (response.model, response.usage.prompt_tokens) == (EMBEDDER, 10)
    with pytest.raises(openai.BadRequestError, match="has 13 tokens, more than the limit of 12"):
        client.embeddings.create(model=EMBEDDER, input="cat " * 13)
    with pytest.raises(openai.BadRequestError, match="holds tokens"):
        client.embeddings.create(model=EMBEDDER, input=[[1, 2]])
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.embeddings.create(model="nobody", input="a cat")


def test_a_classifier_answers_predict_as_it_answers_classify(deployment: Any, photo: bytes) -> None:
    url, headers = deployment.location("paris"), {"Content-Type": "image/jpeg"}
    predicted = predict(url, "squeezenet1_1", photo, headers, top_k=3).json()
    classified = httpx.post(
        f"{url}/v1/classify", params={"model": "squeezenet1_1", "top_k": 3}, content=photo, headers=headers, timeout=60
    ).json()
    assert predicted["predictions"] == classified["predictions"]
    assert predicted["task"] == "image-classification"


def test_a_model_without_a_task_takes_json(deployment: Any) -> None:
    import tagger_model

    tokens = np.array([[3, 4, 5]])
    body = json.dumps({"tokens": tokens.tolist()}).encode()
    found = predict(deployment.location("paris"), TAGGER, body, {"Content-Type": "application/json"}).json()["outputs"]
    expected = tagger_model.answer(tokens)
    assert found["best"] == expected["best"].tolist()
    assert np.abs(np.array(found["scores"]) - expected["scores"]).max() < 1e-5


@pytest.mark.parametrize(
    ("model", "content", "sentence"),
    [
        (EMBEDDER, b"\xff\xd8\xff", "not text in UTF-8"),
        (EMBEDDER, b"cat " * 13, "13 tokens, more than the limit of 12"),
        (TAGGER, b"a cat", "the body is not JSON"),
        (TAGGER, b'{"tokens": [[1.5]]}', "input 'tokens' takes INT64 of shape"),
        ("squeezenet1_1", b"a cat", "not a JPEG, PNG or WebP"),
    ],
)
def test_what_a_model_cannot_read_is_400_with_what_it_expects(
    deployment: Any, model: str, content: bytes, sentence: str
) -> None:
    response = predict(deployment.location("paris"), model, content, {"Content-Type": "application/octet-stream"})
    assert response.status_code == 400
    assert sentence in response.json()["error"]


def test_the_command_asks_models_about_any_file(deployment: Any, tmp_path: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a cat sleeps")
    result = deployment.cli("infer", EMBEDDER, str(text), "--url", deployment.url)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("6 dimensions: ")
    table = tmp_path / "table.json"
    table.write_text('{"tokens": [[3, 4, 5]]}')
    result = deployment.cli("infer", TAGGER, str(table), "--url", deployment.url)
    assert "best: [" in result.stdout
    result = deployment.cli(
        "infer", EMBEDDER, str(text), "--url", deployment.url, "--output", str(tmp_path / "drawn.png")
    )
    assert result.returncode == 1
    assert "has the task embedding, whose answer cannot be drawn" in result.stderr
