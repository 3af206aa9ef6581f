"""The forms in which a model can be in memory: which of them serves it first, and when another one takes its place.

A form is how the weights of a model are laid out and run. Every module has the form ``mapped``: its tensors as they
were published, which load in about a millisecond on any machine. Others are compiled for one kind of processor by one
version of a library: they run faster, and may take longer to load, and more memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from serve_app.core.catalog import ModelProfile, PublishedModel

#: A form that is hardly faster is not worth a second load.
_FASTER = 0.9

#: No name of a model, and no version, has this.
_TIER = "#"


class ModelForm(Protocol):
    """One form of a model."""

    @property
    def model_id(self) -> str:
        """The key of the model."""

    @property
    def form(self) -> str:
        """The name of the form, which no other form of the model has."""

    @property
    def profile(self) -> ModelProfile:
        """What the model costs in this form."""


AnyForm = TypeVar("AnyForm", bound=ModelForm)


@dataclass(frozen=True, slots=True, kw_only=True)
class Surplus(ModelProfile):
    """What a model takes in a faster form beyond that in which it was loaded; it may leave by itself.

    ``size_bytes`` is the difference between the two forms; all else is as in the faster one.

    Attributes:
        smaller: the model without it.
    """

    smaller: ModelProfile

    @property
    def saved_s(self) -> float:
        """Seconds that it saves with every execution."""
        return max(0.0, self.smaller.exec_s - self.exec_s)


def surplus(form: ModelProfile, smaller: ModelProfile | None) -> Surplus | None:
    """Return what a model takes in ``form`` beyond ``smaller``; None if that is nothing."""
    if smaller is None or form.size_bytes <= smaller.size_bytes:
        return None
    return Surplus(
        model_id=form.model_id,
        size_bytes=form.size_bytes - smaller.size_bytes,
        load_s=form.load_s,
        exec_s=form.exec_s,
        accuracy=form.accuracy,
        tier=form.tier,
        smaller=smaller,
    )


def soonest(forms: Sequence[AnyForm]) -> AnyForm:
    """Return the form whose first answer after a miss comes soonest: its load and one execution.

    Args:
        forms: of one model, at least one; the first of equals is chosen.
    """
    return min(forms, key=_first_answer_s)


def faster(forms: Sequence[PublishedModel], served: PublishedModel) -> tuple[PublishedModel, ...]:
    """Return the forms that a model goes over to once it is in memory, one after the other.

    They are as many as there are steps that make the model clearly faster; of all next steps that is the first which
    saves the most seconds per byte. So whatever memory there is, it is taken for what saves the most (the greedy
    algorithm of the multiple-choice knapsack problem), and a step back gives up the least.

    All take what ``served`` takes at all sizes that were measured, so that what is admitted for one is for all.

    Args:
        forms: of one model.
        served: the one in which it is loaded.
    """
    sizes = [cost.sizes for cost in served.costs]
    candidates = [form for form in forms if [cost.sizes for cost in form.costs] == sizes]
    chosen = climb([form.profile for form in candidates], served.profile)
    return tuple(
        replace(candidates[place], profile=replace(candidates[place].profile, tier=tier))
        for tier, place in enumerate(chosen, 1)
    )


def climb(forms: Sequence[ModelProfile], served: ModelProfile) -> list[int]:
    """Return the positions of the forms that a model goes over to, one after the other; see ``faster``."""
    steps: list[int] = []
    present = served
    while True:
        quicker = [place for place, form in enumerate(forms) if form.exec_s < _FASTER * present.exec_s]
        if not quicker:
            return steps
        steps.append(max(quicker, key=lambda place: _worth_of_step(forms[place], present)))
        present = forms[steps[-1]]


def key_of_tier(model_id: str, tier: int) -> str:
    """Return the key by which a model in memory is loaded in another form, see ``ModelProfile.tier``."""
    return f"{model_id}{_TIER}{tier}"


def model_of(key: str) -> str:
    """Return the key of the model that a key, perhaps of ``key_of_tier``, is for."""
    return key.partition(_TIER)[0]


class FormChanges:
    """Says when a model in memory should go over to its next faster form: when to have stayed has cost as much.

    That is the rule of the ski rental problem (Karlin et al., Competitive snoopy caching, 1988): whatever requests
    come, it loses at most twice what is lost by who knows them beforehand. It needs no forecast. What a model has lost
    before it was evicted counts on, or one that is evicted again and again would never change. Whether the form is also
    worth its bytes is for the policy of the cache to say.

    Args:
        faster: the forms that each model may go over to, slowest first, by model.
    """

    def __init__(self, faster: Mapping[str, Sequence[ModelForm]]) -> None:
        self._faster = faster
        #: By model: a form, and what its executions have lost, in executions of that form. Times were measured on a
        #: machine that was busier, or less so, than this one is now, but for all forms in turns: their ratios hold.
        self._lost: dict[str, tuple[str, float]] = {}

    def executed(self, model: ModelForm, form: str, times: float) -> ModelProfile | None:
        """Count an execution; return the numbers of the form to go over to.

        Args:
            model: in the form in which it is loaded.
            form: in which it was executed; one in which it is no longer loaded is left at once.
            times: as long as an execution of the least size.
        """
        others = self._faster.get(model.model_id, ())
        if form == (others[-1] if others else model).form:
            return None
        present, following = _step(model, others, form)
        former, lost = self._lost.get(model.model_id, ("", 0.0))
        if former != form:
            lost = 0.0
        if present is not None or former == form:
            present = present or model.profile
            lost += times * (1 - following.exec_s / present.exec_s)
            if lost < following.load_s / present.exec_s:
                self._lost[model.model_id] = form, lost
                return None
        # Whether or not there is room for it now: the next attempt comes after as long again.
        self._lost[model.model_id] = form, 0.0
        return following


def _step(model: ModelForm, others: Sequence[ModelForm], form: str) -> tuple[ModelProfile | None, ModelProfile]:
    """Return the form of that name, None if the model is not loaded in it any more, and the next faster one."""
    present = model
    for following in others:
        if present.form == form:
            return present.profile, following.profile
        present = following
    return None, present.profile


def _first_answer_s(form: ModelForm) -> float:
    return form.profile.load_s + form.profile.exec_s


def _worth_of_step(form: ModelProfile, present: ModelProfile) -> tuple[float, float]:
    """Seconds saved per byte, without bound where no byte is added; of equals the fastest is worth most."""
    added_bytes = form.size_bytes - present.size_bytes
    return (present.exec_s - form.exec_s) / added_bytes if added_bytes > 0 else math.inf, -form.exec_s
