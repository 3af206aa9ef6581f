"""One execution of torch in several threads, beside others in one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from serve_app.models.threads import threads_of_one, use_threads


def test_only_the_calling_thread_has_more_and_only_meanwhile() -> None:
    use_threads(1)
    with ThreadPoolExecutor(1) as other:
        other.submit(torch.get_num_threads).result()
        with threads_of_one(2):
            assert torch.get_num_threads() == 2
            assert other.submit(torch.get_num_threads).result() == 1
            with ThreadPoolExecutor(1) as later:
                assert later.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == 1


def test_nothing_changes_where_no_number_is_given() -> None:
    use_threads(1)
    with threads_of_one(0):
        assert torch.get_num_threads() == 1
