"""WAV files to samples: any rate, width and number of channels, to one channel at the rate of a model."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve_app.errors import InvalidRequest

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE

_RATES = (1000, 384_000)

#: Half the width of the filter of resampling, in samples of the lower rate.
_FILTER = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Format:
    kind: int
    channels: int
    rate: int
    bits: int


def decode_wav(data: bytes, sample_rate: int, max_s: float = 600) -> NDArray[np.float32]:
    """Decode a WAV of 8, 16, 24 or 32 bits or of floats.

    Args:
        data: the file.
        sample_rate: samples a second that are wanted.
        max_s: seconds that it may take.

    Returns:
        Samples in -1..1, the mean over the channels.

    Raises:
        InvalidRequest: it is no WAV, compressed, damaged, empty, too long, or has numbers that are not finite.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        found = "empty" if not data else f"no WAV file: it begins with {bytes(data[:4])!r}"
        raise InvalidRequest(f"the body is {found}; send a WAV file")
    chunks = _chunks(data)
    form, samples = _format(chunks.get(b"fmt ", b"")), chunks.get(b"data", b"")
    frames = len(samples) // (form.channels * form.bits // 8)
    if not frames:
        raise InvalidRequest("the WAV file has no samples; send one that was recorded to its end")
    if frames > max_s * form.rate:
        raise InvalidRequest(
            f"the recording takes {frames / form.rate:.0f} s, more than the limit of {max_s:g} s; send it in parts"
        )
    values = _values(samples[: frames * form.channels * form.bits // 8], form)
    mono: NDArray[np.float32] = values.reshape(frames, form.channels).mean(axis=1)
    if not np.isfinite(mono).all():
        raise InvalidRequest("the WAV file has samples that are not finite numbers; send only finite ones")
    return resample(mono, form.rate, sample_rate)


def resample(samples: NDArray[np.float32], rate: int, wanted: int) -> NDArray[np.float32]:
    """Return samples at another rate, by a windowed sinc that takes out what the lower rate cannot hold."""
    if rate == wanted:
        return samples
    divisor = math.gcd(rate, wanted)
    up, down = wanted // divisor, rate // divisor
    cutoff = min(1.0, wanted / rate)
    reach = math.ceil(_FILTER / cutoff)
    count = math.ceil(len(samples) * up / down)
    offsets = np.arange(-reach, reach + 1)
    # One row for each place that the filter may be at.
    places = np.lib.stride_tricks.sliding_window_view(np.pad(samples, reach), len(offsets))
    result = np.empty(count, np.float32)
    # Every up-th sample lies at the same distance from those given, and so has the same weights.
    for phase in range(min(up, count)):
        whole, part = divmod(phase * down, up)
        distance = offsets - part / up
        weights = cutoff * np.sinc(cutoff * distance) * np.cos(distance * (math.pi / 2 / (reach + 1))) ** 2
        wanted_here = result[phase::up]
        wanted_here[:] = places[whole::down][: len(wanted_here)] @ weights.astype(np.float32)
    return result


def _chunks(data: bytes) -> dict[bytes, bytes]:
    """Return the parts of a RIFF file by name, the first of each; the last may be cut, as in a stream."""
    chunks: dict[bytes, bytes] = {}
    at = 12
    while at + 8 <= len(data):
        name, size = bytes(data[at : at + 4]), struct.unpack_from("<I", data, at + 4)[0]
        chunks.setdefault(name, bytes(data[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    return chunks


def _format(chunk: bytes) -> _Format:
    if len(chunk) < 16:
        raise InvalidRequest("the WAV file is damaged: it does not say its format; send it again whole")
    kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", chunk)
    if kind == _EXTENSIBLE and len(chunk) >= 26:
        kind = struct.unpack_from("<H", chunk, 24)[0]
    widths = {_PCM: (8, 16, 24, 32), _FLOAT: (32, 64)}.get(kind)
    if widths is None:
        raise InvalidRequest(f"the WAV file is compressed (format {kind}); send PCM or floats")
    if bits not in widths:
        raise InvalidRequest(f"the WAV file has {bits} bits a sample; send one of {', '.join(map(str, widths))}")
    if not 1 <= channels <= 64:
        raise InvalidRequest(f"the WAV file has {channels} channels; send one with 1 to 64")
    if not _RATES[0] <= rate <= _RATES[1]:
        raise InvalidRequest(f"the WAV file has {rate} samples a second; send one with {_RATES[0]} to {_RATES[1]}")
    return _Format(kind=kind, channels=channels, rate=rate, bits=bits)


def _values(samples: bytes, form: _Format) -> NDArray[np.float32]:
    if form.kind == _FLOAT:
        floats = np.frombuffer(samples, np.dtype(f"<f{form.bits // 8}"))
        return floats.astype(np.float32)
    bits = form.bits
    if bits == 8:
        # Without a sign, alone among the widths.
        samples = (np.frombuffer(samples, np.uint8) ^ 0x80).tobytes()
    if bits == 24:
        thirds = np.frombuffer(samples, np.uint8).reshape(-1, 3)
        wide = np.zeros((len(thirds), 4), np.uint8)
        wide[:, 1:] = thirds
        samples, bits = wide.tobytes(), 32
    whole = np.frombuffer(samples, np.dtype(f"<i{bits // 8}"))
    values: NDArray[np.float32] = whole.astype(np.float32) / 2 ** (bits - 1)
    return values
