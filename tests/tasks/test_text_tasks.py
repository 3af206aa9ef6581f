"""Texts become tokens, and tokens vectors or labels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from task_support import answer, model_of, tensor

from serve_app.core.contract import Axis
from serve_app.core.task import TaskSpec
from serve_app.errors import InvalidRequest, StoreError
from serve_app.tasks.embedding import pooled
from serve_app.tasks.text import read_tokenizer

tokenizers = pytest.importorskip("tokenizers")

WORDS = ("[PAD]", "[UNK]", "a", "cat", "dog", "sleeps")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    # As files often are: they cut and fill up, which is the task of the task here.
    made.enable_truncation(3)
    made.enable_padding(length=8)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def text_model(tokenizer: Path, task: TaskSpec, *outputs, tokens: int = 6, batch: int = 2, multiple: int = 1):
    inputs = [tensor(name, "INT64", -1, -1, axes=("batch", "tokens")) for name in ("input_ids", "attention_mask")]
    axes = (Axis(name="batch", most=batch), Axis(name="tokens", most=tokens, multiple=multiple))
    return model_of(task, inputs, list(outputs), *axes, tokenizer=tokenizer)


def embedder(tokenizer: Path, **fields):
    task = TaskSpec(kind="embedding", tokenizer="blob", **fields)
    return text_model(tokenizer, task, tensor("hidden", "FP32", -1, -1, 2, axes=("batch", "tokens", "")))


def hidden(inputs):
    """The vector of a token is (token, 1); of filling it is huge, so that a wrong mask shows."""
    ids, mask = inputs["input_ids"].astype(np.float32), inputs["attention_mask"]
    return {"hidden": np.where(mask[..., None] == 1, np.stack([ids, np.ones_like(ids)], axis=-1), 1e6)}


def test_the_mean_counts_tokens_only_and_texts_keep_their_order(tokenizer: Path) -> None:
    texts = ["a", "cat dog sleeps a cat", "dog"]
    found = answer(
        json.dumps(texts).encode(), embedder(tokenizer, normalize=False), hidden, content_type="application/json"
    )
    assert found["embeddings"] == [[2, 1], [pytest.approx((3 + 4 + 5 + 2 + 3) / 5), 1], [4, 1]]
    assert (found["tokens"], found["dimensions"]) == (7, 2)


def test_texts_are_filled_up_to_a_number_of_tokens_that_the_model_takes(tokenizer: Path) -> None:
    task = TaskSpec(kind="embedding", tokenizer="blob", normalize=False)
    output = tensor("hidden", "FP32", -1, -1, 2, axes=("batch", "tokens", ""))
    model = text_model(tokenizer, task, output, tokens=7, multiple=4)
    seen: list[tuple[int, ...]] = []

    def run(inputs):
        seen.append(inputs["input_ids"].shape)
        return hidden(inputs)

    assert answer(b"cat dog", model, run)["embeddings"] == [[3.5, 1]]
    assert seen == [(1, 4)]
    with pytest.raises(InvalidRequest, match="5 tokens, more than the limit of 4"):
        answer(b"cat dog sleeps a cat", model, run)


def test_normalized_vectors_have_length_one(tokenizer: Path) -> None:
    (vector,) = answer(b"cat dog", embedder(tokenizer), hidden, content_type="text/plain")["embeddings"]
    assert np.linalg.norm(vector) == pytest.approx(1)


def test_pooling_takes_the_first_token_or_what_is_pooled_already(tokenizer: Path) -> None:
    first = embedder(tokenizer, pooling="first", normalize=False)
    assert answer(b"cat dog", first, hidden)["embeddings"] == [[3, 1]]
    values = np.arange(12, dtype=np.float64).reshape(2, 6)
    assert np.array_equal(pooled(values, None, "none"), values)


def test_texts_are_executed_as_many_together_as_the_model_takes(tokenizer: Path) -> None:
    seen: list[tuple[int, ...]] = []

    def run(inputs):
        seen.append(inputs["input_ids"].shape)
        return hidden(inputs)

    texts = ["a", "a cat", "a cat sleeps", "a", "dog"]
    answer(json.dumps(texts).encode(), embedder(tokenizer), run, content_type="application/json")
    # The longest first, because a request is counted by its first execution.
    assert seen == [(2, 3), (2, 1), (1, 1)]


@pytest.mark.parametrize(
    ("data", "content_type", "sentence"),
    [
        (b"", "text/plain", "the text is empty"),
        (b"  \n", "text/plain", "the text is empty"),
        (b"\xff\xfe", "text/plain", "not text in UTF-8 .byte 0 is 0xff"),
        (b'"\\ud800"', "application/json", "text 0 has half of a surrogate pair"),
        (b" " * 2000 + b"a", "text/plain", "the text has 2001 characters, which cannot be 6 tokens"),
        (b"a " * 7, "text/plain", "the text has 7 tokens, more than the limit of 6"),
        (b'["a", "a a a a a a a"]', "application/json", "text 1 has 7 tokens"),
        (b'["a", 3]', "application/json", "a JSON string or a list of strings"),
        (b"[]", "application/json", "a JSON string or a list of strings, not a list of 0"),
        (b'{"a": 1}', "application/json", "not dict"),
        (b"{", "application/json", "not JSON"),
        (b'["a", ""]', "application/json", "text 1 is empty"),
    ],
)
def test_a_wrong_text_is_refused_with_what_is_expected(
    tokenizer: Path, data: bytes, content_type: str, sentence: str
) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        answer(data, embedder(tokenizer), hidden, content_type=content_type)


def test_a_text_is_classified_by_its_scores(tokenizer: Path) -> None:
    task = TaskSpec(kind="text-classification", tokenizer="blob", labels=("bad", "good"))
    model = text_model(tokenizer, task, tensor("logits", "FP32", -1, 2, axes=("batch", "")))
    found = answer(b"a cat", model, lambda inputs: {"logits": np.array([[1.0, 3.0]], np.float32)}, top_k="1")
    assert found["predictions"] == [{"label": "good", "index": 1, "probability": pytest.approx(1 / (1 + np.exp(-2)))}]
    with pytest.raises(InvalidRequest, match="one text, not 2"):
        answer(b'["a", "cat"]', model, hidden, content_type="application/json")


def test_one_score_is_that_of_the_second_label(tokenizer: Path) -> None:
    task = TaskSpec(kind="text-classification", tokenizer="blob", labels=("no", "yes"))
    model = text_model(tokenizer, task, tensor("logit", "FP32", -1, 1, axes=("batch", "")))
    found = answer(b"a cat", model, lambda inputs: {"logit": np.array([[-800.0]], np.float32)})
    assert [(best["label"], best["probability"]) for best in found["predictions"]] == [("no", 1), ("yes", 0)]


def test_scores_of_independent_labels_do_not_add_up_to_one(tokenizer: Path) -> None:
    task = TaskSpec(kind="text-classification", tokenizer="blob", labels=("a", "b"), activation="sigmoid")
    model = text_model(tokenizer, task, tensor("logits", "FP32", -1, 2, axes=("batch", "")))
    found = answer(b"a cat", model, lambda inputs: {"logits": np.zeros((1, 2), np.float32)})
    assert [best["probability"] for best in found["predictions"]] == [0.5, 0.5]


def test_a_model_of_strings_needs_no_tokenizer() -> None:
    model = model_of(
        TaskSpec(kind="text-classification"),
        [tensor("text", "BYTES", -1, 1)],
        [tensor("label", "INT64", -1), tensor("probabilities", "FP32", -1, 2)],
    )

    def run(inputs):
        assert inputs["text"].tolist() == [[b"a cat"]]
        return {"label": np.array([1]), "probabilities": np.array([[0.0, 9.0]], np.float32)}

    assert answer(b"a cat", model, run)["predictions"][0]["index"] == 1


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(StoreError, match=r"is not a tokenizer\.json"):
        read_tokenizer(path)


def test_a_model_of_vectors_names_the_label_that_a_text_is_most_like(tokenizer: Path) -> None:
    task = TaskSpec(kind="text-classification", tokenizer="blob", labels=("cat", "dog"))
    model = text_model(tokenizer, task, tensor("hidden", "FP32", -1, -1, 2, axes=("batch", "tokens", "")))
    found = answer(b"dog sleeps", model, hidden)["predictions"]
    assert [best["label"] for best in found] == ["dog", "cat"]
    assert sum(best["probability"] for best in found) == pytest.approx(1)
    found = answer(b"dog sleeps", model, hidden, labels="a, sleeps", top_k="1")["predictions"]
    assert found[0]["label"] == "sleeps"
    with pytest.raises(InvalidRequest, match="name two or more, such as labels=sport,music"):
        answer(b"dog", model, hidden, labels="cat")
