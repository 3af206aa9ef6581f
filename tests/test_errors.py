"""Every error arrives in another process unchanged, with its status and the sentence for the user."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable

import pytest

from serve_app import errors
from serve_app.errors import EdgeServeError, Unavailable

#: What clients may rely on.
STATUSES = {
    errors.InvalidRequest: 400,
    errors.Unauthenticated: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.MethodNotAllowed: 405,
    errors.Conflict: 409,
    errors.PayloadTooLarge: 413,
    errors.UnsupportedMediaType: 415,
    errors.Unavailable: 503,
    errors.DeadlineExceeded: 504,
    errors.DoesNotFit: 507,
    errors.InternalError: 500,
    errors.StoreError: 500,
    errors.ModelChanged: 500,
    errors.DownloadFailed: 500,
    errors.WeightsUnavailable: 500,
    errors.ConfigError: 400,
    errors.TraceError: 400,
}
FAULTS = {
    EdgeServeError,
    errors.InternalError,
    errors.StoreError,
    errors.ModelChanged,
    errors.DownloadFailed,
    errors.WeightsUnavailable,
}
TREE = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, EdgeServeError)]
SENTENCE = "the model 'été' is not here; ask for {another} one, 100 % sure"


def pickled(error: EdgeServeError, protocol: int = pickle.HIGHEST_PROTOCOL) -> EdgeServeError:
    back = pickle.loads(pickle.dumps(error, protocol))
    assert isinstance(back, EdgeServeError)
    return back


COPIES: dict[str, Callable[[EdgeServeError], EdgeServeError]] = {
    "pickle": pickled,
    "oldest pickle": lambda error: pickled(error, 0),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickled twice": lambda error: pickled(pickled(error)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("kind", TREE)
def test_an_error_survives_the_transport_to_another_process(
    kind: type[EdgeServeError], copied: Callable[[EdgeServeError], EdgeServeError]
) -> None:
    error = kind(SENTENCE)
    back = copied(error)
    assert type(back) is kind
    assert back.message == str(back) == SENTENCE
    assert (back.status, back.retry_after_s, back.args) == (error.status, error.retry_after_s, error.args)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_unavailable_keeps_its_time_to_retry(copied: Callable[[EdgeServeError], EdgeServeError]) -> None:
    back = copied(Unavailable(SENTENCE, 2.5))
    assert back.retry_after_s == 2.5
    assert back.message == SENTENCE


@pytest.mark.parametrize("kind", TREE)
def test_an_error_remembers_exactly_the_arguments_of_its_constructor(kind: type[EdgeServeError]) -> None:
    values = {"message": SENTENCE, "retry_s": 2.5}
    arguments = tuple(values[name] for name in inspect.signature(kind).parameters)
    assert kind(*arguments).args == arguments


def test_statuses_are_those_of_the_interface() -> None:
    assert {kind: kind.status for kind in TREE if kind is not EdgeServeError} == STATUSES


def test_faults_are_the_errors_that_neither_the_request_nor_the_load_causes() -> None:
    assert {kind for kind in TREE if kind.is_fault} == FAULTS
    assert {kind.status for kind in FAULTS} == {500}


def test_only_unavailable_has_a_time_to_retry() -> None:
    assert [kind for kind in TREE if kind(SENTENCE).retry_after_s is not None] == [Unavailable]


def test_the_cause_does_not_change_the_sentence() -> None:
    error = errors.StoreError(SENTENCE)
    error.__cause__ = OSError("disk on fire")
    assert str(error) == SENTENCE
