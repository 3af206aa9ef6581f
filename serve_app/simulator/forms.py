"""Forms in virtual time: which of them serve a model, and in which of them it is in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from serve_app.core.catalog import ModelProfile
from serve_app.core.forms import FormChanges, climb, soonest
from serve_app.workload.profiles import FormProfile

#: Choices beside the names of forms: the one that answers first after a miss, from which a model climbs; the same, but
#: it stays; and the fastest.
TIERED, SOONEST, COMPILED = "tiered", "soonest", "compiled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """The forms of one model.

    Attributes:
        loaded: in which a request loads it.
        faster: which it goes over to, slowest first.
    """

    loaded: FormProfile
    faster: tuple[FormProfile, ...] = ()


def choose(forms: Sequence[FormProfile], choice: str) -> Ladder:
    """Choose among all forms of a model.

    Args:
        forms: first as it was published.
        choice: ``tiered``, ``soonest``, ``compiled``, or the name of a form; a model without it is as it was published.
    """
    match choice:
        case "tiered":
            loaded = soonest(forms)
            steps = enumerate(climb([form.profile for form in forms], loaded.profile), 1)
            return Ladder(
                loaded=loaded,
                faster=tuple(replace(forms[at], profile=replace(forms[at].profile, tier=tier)) for tier, at in steps),
            )
        case "soonest":
            return Ladder(loaded=soonest(forms))
        case "compiled":
            return Ladder(loaded=min(forms, key=lambda form: form.profile.exec_s))
        case _:
            return Ladder(loaded=next((form for form in forms if form.form == choice), forms[0]))


class FormsInMemory:
    """The forms in which the models of one cache are in memory.

    Args:
        ladders: the forms of each model, by name.
    """

    def __init__(self, ladders: Mapping[str, Ladder]) -> None:
        self._loaded = {model_id: ladder.loaded for model_id, ladder in ladders.items()}
        self._form_of = {form.profile: form for ladder in ladders.values() for form in (ladder.loaded, *ladder.faster)}
        self._changes = FormChanges({model_id: ladder.faster for model_id, ladder in ladders.items() if ladder.faster})
        self._present: dict[str, FormProfile] = {}

    def present(self, model_id: str) -> ModelProfile:
        """The form in which a model is, or is being loaded for requests."""
        return (self._present.get(model_id) or self._loaded[model_id]).profile

    def loaded(self, model_id: str) -> None:
        """A model is loaded anew."""
        self._present.pop(model_id, None)

    def executed(self, model_id: str, present: ModelProfile) -> ModelProfile | None:
        """Count an execution in this form; return the form to go over to."""
        return self._changes.executed(self._loaded[model_id], self._form_of[present].form, 1.0)

    def exchanged(self, other: ModelProfile) -> None:
        """A model is in this form from now on."""
        self._present[other.model_id] = self._form_of[other]
