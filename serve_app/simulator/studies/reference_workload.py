"""The workload that policies are judged by: recorded where its files are at hand, else generated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from serve_app.config.environment import traces_dir
from serve_app.errors import TraceError
from serve_app.simulator.scenario import Workload, make_workload

TRACE_FILE = "azure2019_500fn_480min_invocations.csv.gz"
PROFILES_FILE = "keras26_profiles.csv"
#: What stands in for the recorded workload.
GENERATED = "azure-like:"

_MISSING = (
    f"THE REFERENCE TRACE IS MISSING: no {TRACE_FILE} and {PROFILES_FILE} in {{places}}. The data set is public: "
    "github.com/Azure/AzurePublicDataset (Azure Functions 2019); the excerpt of 500 functions comes from "
    "github.com/vhive-serverless/invitro. Name their folder with --data or EDGESERVE_TRACES. "
    "What follows is a GENERATED stream with the default profiles."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Where a reference workload comes from.

    Attributes:
        label: what it is to be called wherever its figures stand.
        trace: as ``--trace`` takes it.
        models: the table of models; ``None`` for ours.
        warning: what the reader of the figures must know.
    """

    label: str
    trace: str
    models: Path | None
    warning: str | None = None

    def workload(self, seed: int) -> Workload:
        """The workload of a seed.

        Raises:
            TraceError: the files are malformed.
        """
        return make_workload(trace=self.trace, models=self.models, seed=seed)


def find_reference(data: Path | None) -> Reference:
    """The recorded workload from ``data``, else the folder in the environment, else the usual places.

    Without it a generated one, with a warning.

    Raises:
        TraceError: ``data`` is named, but the files are not there.
    """
    named = data or traces_dir()
    places = (named,) if named else (Path("traces"), Path("../shared/traces"))
    for place in places:
        if (place / TRACE_FILE).is_file() and (place / PROFILES_FILE).is_file():
            return Reference(
                label=f"reference workload ({TRACE_FILE}, {PROFILES_FILE})",
                trace=f"azure:{place / TRACE_FILE}",
                models=place / PROFILES_FILE,
            )
    looked = " or ".join(map(str, places))
    if data is not None:
        raise TraceError(f"no {TRACE_FILE} and {PROFILES_FILE} in {looked}")
    return Reference(
        label=f"GENERATED workload ({GENERATED} with the default profiles), not the reference",
        trace=GENERATED,
        models=None,
        warning=_MISSING.format(places=looked),
    )
