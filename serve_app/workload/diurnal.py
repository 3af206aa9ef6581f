"""The rates of requests over the hours of a day, as measured on the Azure Functions trace of 2019."""

from __future__ import annotations

import numpy as np

from serve_app.workload.seeded_random import Column

#: Relative request rate in the hours 0 to 23.
HOUR_PROFILE = (
    0.936, 0.919, 0.918, 0.914, 0.913, 0.947, 0.973, 1.007, 1.001, 1.006, 1.007, 1.011,
    1.045, 1.088, 1.088, 1.071, 1.050, 1.071, 1.079, 1.035, 1.011, 0.999, 0.973, 0.940,
)  # fmt: skip
#: Factor of the first minute of an hour, for which much is scheduled.
FULL_HOUR_FACTOR = 1.135


def clock_times(progress: Column, *, start_hour: int, minutes: int) -> Column:
    """Map even progress to the profile: busy minutes take more of it.

    Args:
        progress: shares of the whole stream's requests, each from 0 to 1.
        start_hour: hour of the day when the stream begins, 0..23.
        minutes: length of the stream.

    Returns:
        Seconds since the beginning, below 60 x minutes.
    """
    minute = np.arange(minutes)
    rates = np.array(HOUR_PROFILE)[(start_hour + minute // 60) % 24]
    rates[minute % 60 == 0] *= FULL_HOUR_FACTOR
    reached = np.concatenate([[0.0], np.cumsum(rates)])
    seconds = np.interp(progress * reached[-1], reached, 60.0 * np.arange(minutes + 1))
    return np.asarray(np.minimum(seconds, np.nextafter(60.0 * minutes, 0)))
