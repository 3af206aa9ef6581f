"""Whether a host can be reached at all, found out in seconds, before a download that would wait for longer."""

from __future__ import annotations

import ssl
import threading
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Final

#: Longest wait for an answer.
PROBE_TIMEOUT_S: Final = 3.0


def url_reachable(
    url: str,
    timeout_s: float = PROBE_TIMEOUT_S,
    context: ssl.SSLContext | None = None,
    *,
    any_answer: bool = False,
) -> bool:
    """Return whether the URL answers within ``timeout_s``, by the proxy that the system is set up with.

    A refused connection answers at once. The resolution of the name has no time-out of its own, hence the thread.

    Args:
        url: what to ask for.
        timeout_s: seconds to wait.
        context: what the connection trusts; None: what the system does.
        any_answer: an error of the server will do, as it shows that the server is there.
    """
    answers: list[bool] = []

    def probe() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=timeout_s, context=context):
                answers.append(True)
        except urllib.error.HTTPError as error:
            answers.append(any_answer)
            error.close()
        except (OSError, HTTPException):
            answers.append(False)

    thread = threading.Thread(target=probe, name="probe-download-host", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answers == [True]
