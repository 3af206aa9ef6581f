"""WAV files of any kind become samples at the rate of a model."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from task_support import wav

from serve_app.errors import InvalidRequest
from serve_app.tasks.audio import decode_wav, resample


def tone(rate: int, seconds: float = 0.5, frequency: float = 440) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)


def float_wav(samples: np.ndarray, rate: int, *, extensible: bool = False) -> bytes:
    content = samples.astype("<f4").tobytes()
    kind = 0xFFFE if extensible else 3
    form = struct.pack("<HHIIHH", kind, 1, rate, rate * 4, 4, 32)
    if extensible:
        form += struct.pack("<HHIH", 22, 32, 0, 3) + bytes(14)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"LIST" + struct.pack("<I", 3) + b"abc\0"
    body += b"data" + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(("width", "tolerance"), [(1, 0.01), (2, 1e-4), (3, 1e-6), (4, 1e-6)])
def test_every_width_of_samples_means_the_same(width: int, tolerance: float) -> None:
    samples = tone(16000)
    assert decode_wav(wav(samples[:, None], 16000, width), 16000) == pytest.approx(samples, abs=tolerance)


@pytest.mark.parametrize("extensible", [False, True])
def test_floats_are_taken_as_they_are(extensible: bool) -> None:
    samples = tone(16000).astype(np.float32)
    assert np.array_equal(decode_wav(float_wav(samples, 16000, extensible=extensible), 16000), samples)


def test_channels_are_averaged() -> None:
    samples = np.stack([tone(16000), -tone(16000), 3 * tone(16000) / 2], axis=1)
    assert decode_wav(wav(samples, 16000), 16000) == pytest.approx(tone(16000) / 2, abs=1e-4)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_a_tone_stays_the_same_tone_at_another_rate(rate: int) -> None:
    heard, expected = decode_wav(wav(tone(rate)[:, None], rate), 16000), tone(16000)
    assert len(heard) == len(expected)
    assert heard[200:-200] == pytest.approx(expected[200:-200], abs=1e-3)


def test_what_the_lower_rate_cannot_hold_does_not_come_back_as_another_tone() -> None:
    assert np.abs(resample(tone(48000, frequency=12000).astype(np.float32), 48000, 16000)[200:-200]).max() < 1e-3


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "empty"),
        (b"ID3 an mp3 file", "no WAV file: it begins with b'ID3 '"),
        (b"RIFF\0\0\0\0WAVE", "does not say its format"),
        (wav(np.zeros((0, 1)), 16000), "has no samples"),
        (float_wav(np.array([0.0, np.nan]), 16000), "not finite"),
        (wav(np.zeros((9, 1)), 100), "100 samples a second"),
        (wav(np.zeros((9, 1)), 16000).replace(b"fmt \x10\0\0\0\x01", b"fmt \x10\0\0\0\x07"), "compressed .format 7"),
    ],
)
def test_what_is_no_sound_is_refused_with_what_is_expected(data: bytes, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        decode_wav(data, 16000)


def test_a_recording_that_was_cut_off_is_heard_as_far_as_it_goes() -> None:
    data = wav(tone(16000)[:, None], 16000)
    assert len(decode_wav(data[:-101], 16000)) == 8000 - 51
