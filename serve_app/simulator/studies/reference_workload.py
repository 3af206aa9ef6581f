"""The reference workload of all studies: the recorded one where its files exist, otherwise a generated one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from serve_app.config.environment import traces_dir
from serve_app.errors import TraceError
from serve_app.simulator.scenario import Workload, make_workload

TRACE_FILE = "azure2019_500fn_480min_invocations.csv.gz"
PROFILES_FILE = "keras26_profiles.csv"
#: Replaces a recorded workload that is missing.
GENERATED = "azure-like:"

_MISSING = (
    f"THE REFERENCE TRACE IS MISSING: no {TRACE_FILE} and {PROFILES_FILE} in {{folder}}. The data set is public: "
    "github.com/Azure/AzurePublicDataset (Azure Functions 2019); the excerpt of 500 functions comes from "
    "github.com/vhive-serverless/invitro. Name their folder with --data or EDGESERVE_TRACES. "
    "What follows is a GENERATED stream with the default profiles."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The sources of a reference workload.

    Attributes:
        label: its name beside all figures.
        trace: as ``--trace`` takes it.
        models: the table of models; None for the default one.
        warning: what the reader of the figures must know.
    """

    label: str
    trace: str
    models: Path | None
    warning: str | None = None

    def workload(self, seed: int) -> Workload:
        """Make the workload of a seed.

        Raises:
            TraceError: the files are malformed.
        """
        return make_workload(trace=self.trace, models=self.models, seed=seed)


def find_reference(data: Path | None) -> Reference:
    """Find the recorded workload in ``data``, else in ``EDGESERVE_TRACES``, else in ``./traces``.

    Without its files the workload is a generated one, with a warning.

    Raises:
        TraceError: ``data`` is named, but does not have the files.
    """
    folder = data or traces_dir() or Path("traces")
    if (folder / TRACE_FILE).is_file() and (folder / PROFILES_FILE).is_file():
        return Reference(
            label=f"reference workload ({TRACE_FILE}, {PROFILES_FILE})",
            trace=f"azure:{folder / TRACE_FILE}",
            models=folder / PROFILES_FILE,
        )
    if data is not None:
        raise TraceError(
            f"no {TRACE_FILE} and {PROFILES_FILE} in {folder}; name the folder that has both, or leave --data out"
        )
    return Reference(
        label=f"GENERATED workload ({GENERATED} with the default profiles), not the reference",
        trace=GENERATED,
        models=None,
        warning=_MISSING.format(folder=folder),
    )
