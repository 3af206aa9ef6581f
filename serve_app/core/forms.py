"""The forms in which a model can be in memory: which of them serves it first, and when another one takes its place.

A form is how the weights of a model are laid out and run. Every module has the form ``mapped``: its tensors as they
were published, which load in about a millisecond on any machine. Others are compiled for one kind of processor by one
version of a library: they run faster, and may take longer to load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from serve_app.core.catalog import ModelProfile, PublishedModel

#: A form that is hardly faster is not worth a second load.
_FASTER = 0.9

#: No name of a model, and no version, has this.
_FASTEST = "#fastest"


def soonest(forms: Sequence[PublishedModel]) -> PublishedModel:
    """Return the form whose first answer after a miss comes soonest: its load and one execution.

    Args:
        forms: of one model, at least one; the first of equals is chosen.
    """
    return min(forms, key=lambda form: form.profile.load_s + form.profile.exec_s)


def fastest(forms: Sequence[PublishedModel], served: PublishedModel) -> PublishedModel:
    """Return the form that a model goes over to once it is in memory, which is ``served`` if no other is much faster.

    It takes what ``served`` takes at all sizes that were measured, so that what is admitted for one is for both.
    """
    sizes = [cost.sizes for cost in served.costs]
    faster = [
        form
        for form in forms
        if form.profile.exec_s < _FASTER * served.profile.exec_s and [cost.sizes for cost in form.costs] == sizes
    ]
    return min(faster, key=lambda form: form.profile.exec_s, default=served)


def key_of_fastest(model_id: str) -> str:
    """Return the key by which the fastest form of a model is loaded."""
    return f"{model_id}{_FASTEST}"


def model_of(key: str) -> str:
    """Return the key of the model that a key, perhaps of ``key_of_fastest``, is for."""
    return key.removesuffix(_FASTEST)


class FormChanges:
    """Says when a model in memory should go over to its fastest form: when to have stayed has cost as much.

    That is the rule of the ski rental problem (Karlin et al., Competitive snoopy caching, 1988): whatever requests
    come, it loses at most twice what is lost by who knows them beforehand. It needs no forecast.

    Args:
        fastest: of each model that has several forms, by model.
    """

    def __init__(self, fastest: Mapping[str, PublishedModel]) -> None:
        self._fastest = fastest
        #: In executions of the form in which a model is loaded. Times were measured on a machine that was busier, or
        #: less so, than this one is now, but for all forms in turns: their ratios hold.
        self._lost: dict[str, float] = {}

    def executed(self, model: PublishedModel, form: str, times: float) -> ModelProfile | None:
        """Count an execution; return the numbers of the form to go over to.

        Args:
            model: in the form in which it is loaded.
            form: in which it was executed; one in which it is no longer loaded is left at once.
            times: as long as an execution of the least size.
        """
        fastest = self._fastest.get(model.model_id)
        if fastest is None or fastest.form == form:
            return None
        if form == model.form:
            lost = times * (1 - fastest.profile.exec_s / model.profile.exec_s)
            worth = fastest.profile.load_s / model.profile.exec_s
            lost += self._lost.get(model.model_id, 0.0)
            if lost < worth:
                self._lost[model.model_id] = lost
                return None
        # Whether or not there is room for it now: the next attempt comes after as long again.
        self._lost[model.model_id] = 0.0
        return fastest.profile

    def loaded(self, model_id: str) -> None:
        """Begin anew: a model was loaded, in the form that it is served in."""
        self._lost.pop(model_id, None)
