"""References to files that models are made from, as the catalog writes them: weights, graphs, tokenizers, labels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

ReferenceKind = Literal["file", "package", "hf", "s3", "gs", "http", "https"]

#: What an error tells the user to write.
FORMS = (
    "file:PATH, package:DISTRIBUTION/PATH, hf://ORG/REPO[@REVISION]/FILE, s3://BUCKET/KEY, gs://BUCKET/KEY or "
    "https://HOST/PATH"
)

_KINDS: tuple[str, ...] = get_args(ReferenceKind)
_REMOTE: tuple[str, ...] = ("hf", "s3", "gs", "http", "https")
_DIGEST = "#sha256="
_DISTRIBUTION = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?(?:==[A-Za-z0-9.+!_-]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Where a file or a folder is, and perhaps what it must contain.

    Attributes:
        kind: how it is reached.
        place: a path (``file``), ``DISTRIBUTION[==VERSION]/PATH`` (``package``), ``ORG/REPO[@REVISION][/FILE]``
            (``hf``), or the whole URL.
        sha256: the first 8 to 64 digits of the file's digest, in hexadecimal; None: it is not checked.
    """

    kind: ReferenceKind
    place: str
    sha256: str | None = None

    @property
    def is_remote(self) -> bool:
        """Whether it is fetched over a network, unless it is in the cache."""
        return self.kind in _REMOTE


def is_reference(text: str) -> bool:
    """Return whether the text starts like a reference; it may be a wrong one."""
    return _kind_of(text) is not None


def parse_reference(text: str) -> Reference:
    """Parse a reference; text that starts like none of the kinds is the path of a file.

    Raises:
        ValueError: it names nothing, or not as its kind wants it.
    """
    kind = _kind_of(text) or "file"
    place, mark, digest = text.partition(_DIGEST)
    if mark and re.fullmatch(r"[0-9a-fA-F]{8,64}", digest) is None:
        raise ValueError(f"{text}: the digest after {_DIGEST} must be 8 to 64 hexadecimal digits")
    if kind in ("file", "package", "hf"):
        place = place.removeprefix(f"{kind}:")
    if kind == "hf":
        place = place.removeprefix("//")
    reference = Reference(kind=kind, place=place, sha256=digest.lower() or None)
    _check(reference, text)
    return reference


def package_parts(reference: Reference) -> tuple[str, str]:
    """Split ``package:DISTRIBUTION[==VERSION]/PATH`` into the requirement and the path."""
    requirement, _, path = reference.place.partition("/")
    return requirement, path.strip("/")


def hub_parts(reference: Reference) -> tuple[str, str | None, str]:
    """Split ``hf://ORG/REPO[@REVISION][/FILE]``; the file is empty where the whole repository is meant."""
    organization, repository, *path = reference.place.strip("/").split("/")
    repository, _, revision = repository.partition("@")
    return f"{organization}/{repository}", revision or None, "/".join(path)


def _kind_of(text: str) -> ReferenceKind | None:
    for kind in _KINDS:
        mark = f"{kind}://" if kind in _REMOTE else f"{kind}:"
        if text.startswith(mark):
            return kind  # type: ignore[return-value]
    return None


def _check(reference: Reference, text: str) -> None:
    place = reference.place
    if reference.kind == "package":
        requirement, path = package_parts(reference)
        steps = path.split("/")
        if _DISTRIBUTION.fullmatch(requirement) is None or not path or ".." in steps:
            raise ValueError(f"{text}: must be package:DISTRIBUTION/PATH, where PATH is as in the installed package")
    elif reference.kind == "hf":
        if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+?)?(/.+)?", place) is None or ".." in place.split("/"):
            raise ValueError(f"{text}: must be hf://ORG/REPO[@REVISION]/FILE")
    elif reference.is_remote:
        if re.fullmatch(r"\w+://[^/\s]+/\S+", place) is None:
            raise ValueError(f"{text}: must name a server or bucket, and a path there")
    elif not place:
        raise ValueError(f"{text!r} names no file")
