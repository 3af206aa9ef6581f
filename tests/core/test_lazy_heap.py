"""The heap tells the same as sorting all models anew each time, for keys that move as its docstring allows."""

from __future__ import annotations

import random

import pytest
from core_support import profile

from serve_app.core.catalog import ModelProfile
from serve_app.core.lazy_heap import HeapEntry, LazyHeap

NOW = 0.0


class Keys(dict[str, float]):
    """The keys of models, and a heap of them."""

    def __init__(self, **keys: float) -> None:
        super().__init__(keys)
        self.asked = 0
        self.heap = LazyHeap(self.of)
        for model_id in keys:
            self.heap.push(profile(model_id), NOW)

    def of(self, model: ModelProfile, now: float) -> float:
        self.asked += 1
        return self[model.model_id]

    def order(self) -> str:
        """Take all out, the smallest key first."""
        taken = []
        while (ranked := self.heap.pop(NOW)) is not None:
            taken.append(ranked.model.model_id)
        return "".join(taken)


def test_the_smallest_key_comes_first() -> None:
    assert Keys(a=3, b=1, c=2).order() == "bca"


def test_of_equals_the_one_that_was_added_first_comes_first() -> None:
    keys = Keys(b=1, a=1, c=1)
    assert keys.order() == "bac"


def test_a_model_keeps_its_turn_among_equals_when_its_key_moves_and_when_it_is_pushed_back() -> None:
    keys = Keys(a=1, b=1, c=5)
    first = keys.heap.pop(NOW)
    assert first is not None
    keys.heap.push_back(first)
    keys["c"] = 1
    keys.heap.decrease_key("c", NOW)
    assert keys.order() == "abc"


def test_a_model_that_is_added_again_goes_behind_its_equals() -> None:
    keys = Keys(a=1, b=1)
    assert keys.heap.remove("a") is not None
    keys.heap.push(profile("a"), NOW)
    assert keys.order() == "ba"


def test_a_key_that_grows_need_not_be_announced() -> None:
    keys = Keys(a=1, b=2, c=3)
    keys["a"] = 9
    assert keys.order() == "bca"


def test_a_key_that_shrinks_is_seen_when_it_is_announced() -> None:
    keys = Keys(a=1, b=2, c=3)
    keys["c"] = 0
    keys.heap.decrease_key("c", NOW)
    assert keys.order() == "cab"


def test_announcing_a_key_that_has_not_shrunk_or_an_unknown_model_changes_nothing() -> None:
    keys = Keys(a=1, b=2)
    keys["a"] = 3
    for model_id in ("a", "b", "stranger"):
        keys.heap.decrease_key(model_id, NOW)
    assert len(keys.heap) == 2
    assert keys.order() == "ba"


def test_what_was_taken_out_by_name_is_gone() -> None:
    keys = Keys(a=1, b=2)
    taken = keys.heap.remove("a")
    assert taken is not None
    assert taken.model.model_id == "a"
    assert "a" not in keys.heap
    assert keys.heap.remove("a") is None
    assert keys.order() == "b"


def test_nothing_comes_of_an_empty_heap() -> None:
    assert Keys().heap.pop(NOW) is None


def test_a_model_comes_out_once_however_often_it_went_back() -> None:
    keys = Keys(a=1, b=2)
    for _ in range(5):
        ranked = keys.heap.pop(NOW)
        assert ranked is not None
        keys.heap.push_back(ranked)
        again = keys.heap.remove("a")
        assert again is not None
        keys.heap.push_back(again)
    assert keys.order() == "ab"


def test_finding_the_smallest_does_not_look_at_every_model() -> None:
    keys = Keys(**{f"m{number}": float(number) for number in range(1000)})
    keys.asked = 0
    assert keys.heap.pop(NOW) is not None
    assert keys.asked == 1


def test_the_heap_stays_in_proportion_to_the_models_however_often_keys_shrink() -> None:
    keys = Keys(a=0, b=0, c=0)
    for step in range(10_000):
        keys["abc"[step % 3]] = -step
        keys.heap.decrease_key("abc"[step % 3], NOW)
    assert len(keys.heap._heap) <= 2 * 3 + LazyHeap.SLACK + 1
    assert keys.order() == "acb"


@pytest.mark.parametrize("models", [3, 12, 200])
@pytest.mark.parametrize("seed", range(4))
def test_it_tells_the_same_as_a_sorted_list(models: int, seed: int) -> None:
    """Keys from a small range, so that ties are common; 200 models and little slack rebuild the heap often."""
    rng = random.Random(f"{models} {seed}")
    keys = Keys()
    known = [profile(f"m{number}") for number in range(models)]
    order: dict[str, int] = {}
    out: list[HeapEntry] = []
    added = 0
    for _ in range(3000):
        model = rng.choice(known)
        name = model.model_id
        match rng.choice(["add", "grow", "shrink", "take", "pop", "put back"]):
            case "add" if name not in order and all(ranked.model is not model for ranked in out):
                keys[name] = rng.randrange(6)
                keys.heap.push(model, NOW)
                added += 1
                order[name] = added
            case "grow" if name in order:
                keys[name] += rng.randrange(3)
            case "shrink" if name in order:
                keys[name] -= rng.randrange(3)
                keys.heap.decrease_key(name, NOW)
            case "take":
                taken = keys.heap.remove(name)
                assert (taken is not None) == (name in order)
                if taken is not None:
                    del order[name]
                    out.append(taken)
            case "pop":
                popped = keys.heap.pop(NOW)
                least = min(order, key=lambda name: (keys[name], order[name]), default=None)
                assert (popped and popped.model.model_id) == least
                if popped is not None:
                    del order[popped.model.model_id]
                    out.append(popped)
            case "put back" if out:
                back = out.pop(rng.randrange(len(out)))
                keys.heap.push_back(back)
                order[back.model.model_id] = back.order
        assert len(keys.heap) == len(order)
        assert all((model.model_id in keys.heap) == (model.model_id in order) for model in known[:3])
