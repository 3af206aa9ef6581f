"""Task ``voice-activity``: a WAV file in, when somebody speaks out.

The model is executed on one window after another. Each begins with the last samples of the window before, and what the
model returns as its state is its input for the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from serve_app.core.contract import TensorSpec
from serve_app.errors import InvalidRequest
from serve_app.tasks.audio import decode_wav
from serve_app.tasks.base import RawInput, Solution, TaskModel
from serve_app.tasks.detection import share
from serve_app.tasks.tensors import NUMPY_TYPES

_LEAST_SPEECH_S: Final = 0.25
_LEAST_SILENCE_S: Final = 0.1
_MARGIN_S: Final = 0.03

#: How far the probability must fall below the threshold until speech may have ended.
_HYSTERESIS: Final = 0.15

_THRESHOLD: Final = 0.5

#: Seconds of one request: it holds a thread until it is done.
MAX_S: Final = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Speech from sample ``start`` until before sample ``end``."""

    start: int
    end: int


def solve(raw: RawInput, model: TaskModel) -> Solution:
    """The task; option ``min_score``: how probable speech must be, 0.5 by default."""
    threshold = share(raw, "min_score", _THRESHOLD)
    rate = model.task.sample_rate
    samples = decode_wav(raw.data, rate, MAX_S)
    audio, state = _inputs(model)
    window = audio.shape[-1] - model.task.context
    given: dict[str, NDArray[Any]] = {
        spec.name: np.array(rate, NUMPY_TYPES[spec.datatype])
        for spec in model.contract.inputs
        if spec is not audio and spec.returned_by is None and not spec.shape
    }
    output = next(spec.name for spec in model.contract.outputs if spec.name not in {each.returned_by for each in state})
    found: list[float] = []
    for frame in frames(samples, window, model.task.context):
        inputs = {**given, audio.name: frame[None].astype(NUMPY_TYPES[audio.datatype])}
        outputs = yield inputs
        found.append(float(outputs[output].reshape(-1)[0]))
        given.update({spec.name: outputs[spec.returned_by] for spec in state if spec.returned_by is not None})
    segments = speech_segments(found, window=window, sample_rate=rate, samples=len(samples), threshold=threshold)
    return {
        "speech": [{"start_s": round(each.start / rate, 3), "end_s": round(each.end / rate, 3)} for each in segments],
        "duration_s": round(len(samples) / rate, 3),
        "speech_share": round(sum(each.end - each.start for each in segments) / len(samples), 4),
        "window_s": window / rate,
        "probability": {
            "mean": float(np.mean(found)),
            "largest": float(np.max(found)),
            "windows": [round(value, 4) for value in found],
        },
    }


def _inputs(model: TaskModel) -> tuple[TensorSpec, tuple[TensorSpec, ...]]:
    """Return the input for sound, and those that carry state."""
    state = tuple(spec for spec in model.contract.inputs if spec.returned_by is not None)
    audio = next((spec for spec in model.contract.inputs if spec not in state and len(spec.shape) == 2), None)
    if audio is None or audio.shape[-1] <= model.task.context:
        raise InvalidRequest(
            f"model {model.model_id!r} has no input [batch, samples] of a fixed length above {model.task.context}; "
            f"send tensors to /v2/models/{model.model_id}/infer"
        )
    return audio, state


def frames(samples: NDArray[np.float32], window: int, context: int) -> NDArray[np.float32]:
    """Return the windows of a recording, each after the last samples of the one before; silence is at both ends."""
    count = -(-len(samples) // window)
    padded = np.zeros(context + count * window, np.float32)
    padded[context : context + len(samples)] = samples
    return np.lib.stride_tricks.sliding_window_view(padded, context + window)[::window]


def speech_segments(
    found: Sequence[float], *, window: int, sample_rate: int, samples: int, threshold: float
) -> list[Segment]:
    """Return when somebody speaks, by the rules and the numbers of silero-vad.

    Speech begins with a window of at least ``threshold``. It ends where the probability falls clearly below and stays
    there for 0.1 s. Speech of 0.25 s or less does not count, and the rest gets a margin of 0.03 s.

    Args:
        found: the probability of speech in each window.
        window: samples of a window.
        sample_rate: samples a second.
        samples: of the recording.
        threshold: how probable speech must be.
    """
    low = max(threshold - _HYSTERESIS, 0.01)
    least_speech, least_silence = _LEAST_SPEECH_S * sample_rate, _LEAST_SILENCE_S * sample_rate
    raw: list[tuple[int, int]] = []
    start = silence = None
    for position, probability in enumerate(found):
        at = position * window
        if probability >= threshold:
            silence = None
            start = at if start is None else start
        elif start is not None and probability < low:
            silence = at if silence is None else silence
            if at - silence >= least_silence:
                if silence - start > least_speech:
                    raw.append((start, silence))
                start = silence = None
    if start is not None and samples - start > least_speech:
        raw.append((start, samples))
    return _with_margins(raw, int(_MARGIN_S * sample_rate), samples)


def _with_margins(raw: Sequence[tuple[int, int]], margin: int, samples: int) -> list[Segment]:
    """Widen each segment, up to the middle of a silence that is too short for two margins."""
    segments = []
    for position, (start, end) in enumerate(raw):
        before = start - raw[position - 1][1] if position else 2 * margin
        after = raw[position + 1][0] - end if position + 1 < len(raw) else 2 * margin
        segments.append(
            Segment(start=max(0, start - min(margin, before // 2)), end=min(samples, end + min(margin, after // 2)))
        )
    return segments
