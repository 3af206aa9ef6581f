"""A coroutine that is called periodically."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)


async def every(period_s: float, act: Callable[[], Awaitable[None]]) -> None:
    """Call ``act`` every ``period_s`` until canceled; log its failures and go on."""
    task = asyncio.current_task()
    while True:
        began_s = time.monotonic()
        try:
            await act()
        except (Exception, asyncio.CancelledError):
            # A call through Serve also raises CancelledError when the other end has canceled the call.
            if task is not None and task.cancelling():
                raise
            logger.exception("a periodic task failed; trying again")
        await asyncio.sleep(max(0.0, period_s - (time.monotonic() - began_s)))
