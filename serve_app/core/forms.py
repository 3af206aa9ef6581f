"""The forms in which a model can be in memory, and which of them serves it.

A form is how the weights of a model are laid out and run. Every module has the form ``mapped``: its tensors as they
were published, which load in about a millisecond on any machine. Others are compiled for one kind of processor by one
version of a library: they run faster, and may take longer to load.
"""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.core.catalog import PublishedModel


def soonest(forms: Sequence[PublishedModel]) -> PublishedModel:
    """Return the form whose first answer after a miss comes soonest: its load and one execution.

    Args:
        forms: of one model, at least one; the first of equals is chosen.
    """
    return min(forms, key=lambda form: form.profile.load_s + form.profile.exec_s)
