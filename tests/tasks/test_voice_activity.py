"""The model of a task is executed on one window after another, and its state goes from each to the next."""

from __future__ import annotations

import numpy as np
import pytest
from task_support import answer, model_of, tensor, wav

from serve_app.core.contract import Axis
from serve_app.core.task import TaskSpec
from serve_app.errors import InvalidRequest
from serve_app.tasks.voice_activity import frames, speech_segments


def detector():
    return model_of(
        TaskSpec(kind="voice-activity"),
        [
            tensor("input", "FP32", -1, 576),
            tensor("state", "FP32", 2, -1, 3, axes=("", "batch", ""), default=0.0, returned_by="next"),
            tensor("sr", "INT64"),
        ],
        [tensor("output", "FP32", -1, 1), tensor("next", "FP32", 2, -1, 3, axes=("", "batch", ""))],
        Axis(name="batch", most=1),
    )


def test_a_window_begins_with_the_end_of_the_one_before() -> None:
    samples = np.arange(1000, dtype=np.float32)
    found = frames(samples, 512, 64)
    assert found.shape == (2, 576)
    assert not found[0, :64].any()
    assert np.array_equal(found[0, 64:], samples[:512])
    assert np.array_equal(found[1, :64], samples[448:512])
    assert not found[1, 64 + 488 :].any()


def test_the_state_that_is_returned_is_the_next_input() -> None:
    states: list[float] = []

    def run(inputs):
        assert inputs["sr"] == 16000
        states.append(float(inputs["state"][0, 0, 0]))
        return {"output": np.array([[0.0]], np.float32), "next": inputs["state"] + 1}

    found = answer(wav(np.zeros((16000, 1)), 16000), detector(), run)
    assert states == list(range(32))
    assert (found["speech"], found["speech_share"], found["duration_s"]) == ([], 0, 1)
    assert len(found["probability"]["windows"]) == 32


def test_speech_is_answered_in_seconds() -> None:
    def run(inputs):
        loud = float(np.abs(inputs["input"][0, 64:]).max() > 0.1)
        return {"output": np.array([[loud]], np.float32), "next": inputs["state"]}

    samples = np.zeros((48000, 2))
    samples[16384:32768] = 0.5
    found = answer(wav(samples, 16000), detector(), run)
    assert found["speech"] == [{"start_s": 1.024 - 0.03, "end_s": 2.048 + 0.03}]
    assert found["probability"]["largest"] == 1


def test_short_noises_are_no_speech_and_short_pauses_no_silence() -> None:
    def segments(*runs: tuple[float, int]):
        found = [value for value, count in runs for _ in range(count)]
        return speech_segments(found, window=512, sample_rate=16000, samples=512 * len(found), threshold=0.5)

    assert not segments((0.0, 5), (0.9, 7), (0.0, 9))
    assert len(segments((0.9, 20), (0.1, 3), (0.9, 20))) == 1
    assert len(segments((0.9, 20), (0.4, 30), (0.9, 20))) == 1
    # A tenth of a second is three windows and a bit.
    assert len(segments((0.9, 20), (0.1, 4), (0.9, 20))) == 1
    assert len(segments((0.9, 20), (0.1, 5), (0.9, 20))) == 2


def test_a_recording_that_takes_too_long_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="takes 601 s, more than the limit of 600 s"):
        answer(wav(np.zeros((601 * 1000, 1)), 1000), detector(), dict)
