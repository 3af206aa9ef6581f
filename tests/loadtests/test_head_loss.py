from collections.abc import Sequence

import pytest

from loadtests.head_loss import LOCATIONS, _slices
from loadtests.support.clients import Answer


def answer(sent_s: float, *, location: str = "paris", status: int = 200, again: int | None = None) -> Answer:
    return Answer(sent_s, sent_s + 0.1, location, status, "hit" if status == 200 else "", again, "")


@pytest.mark.parametrize("outage_s", [5.0, 10.0, 20.0, 180.0])
def test_every_request_is_in_one_slice(outage_s: float) -> None:
    began_s = 100.0
    sent: Sequence[Answer] = [
        answer(began_s - 14 + step / 2, location=name) for step in range(500) for name in LOCATIONS
    ]
    slices = _slices(sent, began_s, began_s + outage_s)
    assert sum(row.sent for row in slices) == sum(row.hits for row in slices) == len(sent)
    assert len({(row.when, row.location) for row in slices}) == len(slices)


def test_a_request_that_another_location_answered_is_broken_but_not_lost() -> None:
    sent = [answer(1.0, status=503, again=200), answer(2.0, status=0, again=503), answer(3.0)]
    row = next(row for row in _slices(sent, 0.0, 20.0) if row.when == "0 to 10 s" and row.location == "paris")
    assert (row.sent, row.hits, row.broken, row.lost) == (3, 1, 2, 1)
