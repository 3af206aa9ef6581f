"""Messages of local RPC as bytes: what goes in comes out, whatever its tensors look like in memory."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import done

from serve_app.core.vocabulary import Outcome
from serve_app.errors import InvalidRequest
from serve_app.serving.transport.encoding import ALIGNMENT, decode, encode
from serve_app.serving.transport.messages import InferenceRejected, InferenceTask, NotResident
from serve_app.tasks.base import RawInput

NUMBERS = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def there_and_back(message: Any) -> Any:
    pickled, arrays = encode(message)
    content = b"".join(bytes(array) + bytes(-len(array) % ALIGNMENT) for array in arrays)
    return decode(memoryview(pickled), memoryview(bytearray(content)))


@pytest.mark.parametrize(
    "array",
    [
        NUMBERS,
        NUMBERS.T,
        NUMBERS[:, ::2],
        NUMBERS[0, 0, 0].reshape(()),
        NUMBERS[:0],
        NUMBERS > 3,
        NUMBERS.astype(np.float16),
        NUMBERS.astype(">i8"),
        np.array([b"a text", b""], dtype=np.object_),
    ],
    ids=["plain", "transposed", "strided", "scalar", "empty", "bool", "half", "big-endian", "bytes"],
)
def test_a_tensor_keeps_its_numbers_its_shape_and_its_type(array: np.ndarray[Any, Any]) -> None:
    arrived = there_and_back(done("paris-1", outputs={"first": NUMBERS[:1], "it": array, "last": NUMBERS}))
    assert list(arrived.outputs) == ["first", "it", "last"]
    assert (arrived.outputs["it"].dtype, arrived.outputs["it"].shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(arrived.outputs["it"], array)
    np.testing.assert_array_equal(arrived.outputs["last"], NUMBERS)


def test_every_field_of_a_message_arrives() -> None:
    task = InferenceTask(
        model_id="a@2", origin="paris", payload={"input": NUMBERS}, budget_s=1.5, only_if_resident=True
    )
    result = done("paris-1", outcome=Outcome.LOAD, evicted=("b", "c"), form="openvino", answer={"predictions": []})
    for message in (task, result):
        arrived = there_and_back(message)
        assert type(arrived) is type(message)
        name = "payload" if message is task else "outputs"
        assert replace(arrived, **{name: {}}) == replace(message, **{name: {}})
    assert type(there_and_back(result).outcome) is Outcome


@pytest.mark.parametrize(
    "message",
    [
        InferenceTask(model_id="a", origin="paris", payload=RawInput(data=b"image"), budget_s=1.0),
        NotResident(replica="paris-1", sequence=3),
        "a fault",
        None,
    ],
)
def test_a_message_without_tensors_arrives_as_it_is(message: Any) -> None:
    assert there_and_back(message) == message


def test_an_error_arrives_with_its_class_and_its_sentence() -> None:
    error = there_and_back(InferenceRejected(error=InvalidRequest("no image"))).error
    assert (type(error), error.message) == (InvalidRequest, "no image")


def test_tensors_are_not_copied_into_the_message() -> None:
    large = np.zeros(10_000, np.float32)
    pickled, arrays = encode(done("paris-1", outputs={"logits": large}))
    assert np.shares_memory(np.asarray(arrays[0]), large)
    assert len(pickled) < 1000 < len(pickle.dumps(large))
