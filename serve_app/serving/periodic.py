"""A coroutine, called again and again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)


async def every(period_s: float, act: Callable[[], Awaitable[None]]) -> None:
    """Run ``act`` again and again until cancelled; a failure is logged and does not end it."""
    task = asyncio.current_task()
    while True:
        began_s = time.monotonic()
        try:
            await act()
        except (Exception, asyncio.CancelledError):
            # A call of Serve raises this as well when the other side has cancelled it.
            if task is not None and task.cancelling():
                raise
            logger.exception("a periodic task failed; trying again")
        await asyncio.sleep(max(0.0, period_s - (time.monotonic() - began_s)))
