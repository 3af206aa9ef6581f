"""EdgeServe's metrics of this node, as its Ray agent exports them."""

from __future__ import annotations

import asyncio

import httpx
import ray

from serve_app.errors import Unavailable

_TIMEOUT_S = 5.0
_PREFIX = "ray_edgeserve_"


class MetricsScraper:
    """Reads the metrics endpoint of the local Ray agent."""

    def __init__(self) -> None:
        self._url: str | None = None

    async def scrape(self) -> str:
        """Return EdgeServe's metrics as Prometheus text.

        Raises:
            Unavailable: the agent does not answer.
        """
        try:
            if self._url is None:
                self._url = await asyncio.to_thread(_agent_url)
            async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False) as client:
                text = (await client.get(self._url)).raise_for_status().text
        except (httpx.HTTPError, LookupError) as error:
            self._url = None
            raise Unavailable(
                f"Ray's metrics agent does not answer ({type(error).__name__}); try again later"
            ) from None
        return "".join(line for line in text.splitlines(keepends=True) if _is_edgeserve(line))


def _is_edgeserve(line: str) -> bool:
    name = line.split(" ", 3)[2] if line.startswith("# ") else line
    return name.startswith(_PREFIX)


def _agent_url() -> str:
    own_id = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if node["NodeID"] == own_id:
            return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    raise LookupError(own_id)
