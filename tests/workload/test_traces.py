"""Traces, and the readers that make them from files: a mistake in a file is reported with its place."""

from __future__ import annotations

import gzip
import math
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trace_statistics import (
    counts,
    iat_cvs,
    log10_count_deviation,
    lru_hit_ratio,
    repeat_share,
    reuse_distances,
    source_repeat_share,
    top_share,
    zipf_mle,
)

from serve_app.errors import TraceError
from serve_app.workload.azure import read_azure
from serve_app.workload.csv_trace import read_csv
from serve_app.workload.locations import jensen_shannon_bits
from serve_app.workload.popularity_filter import worth_keeping
from serve_app.workload.trace import Trace, make_trace

EXCERPT = "azure2019_500fn_480min_invocations.csv.gz"
HEADER = "HashOwner,HashApp,HashFunction,Trigger,480,481,482"
FUNCTIONS = ("ann,a1,f1,http,3,0,1", "ann,a1,f2,timer,1,1,1", "bob,b1,f3,http,0,1,0", "bob,b1,f4,queue,0,0,0")
KEEP_ALL: dict[str, Any] = {"seed": 1, "max_quantile": 1.0, "drop_one_hit": False}


def trace(**changes: Any) -> Trace:
    columns = {
        "arrival_s": array("d", [0.0, 1.0, 1.0, 4.0]),
        "model": array("I", [0, 1, 0, 1]),
        "source": array("I", [7, 7, 8, 8]),
    }
    return Trace(**{"name": "t", "models": ("a", "b"), **columns, **changes})


def requests_for(models: str, **changes: Any) -> Trace:
    """A trace with requests for the given letters, one a second."""
    names = tuple(sorted(set(models)))
    index = np.array([names.index(letter) for letter in models])
    given = {"arrival_s": np.arange(len(models), dtype=float), "source": np.arange(len(models)), **changes}
    return make_trace(name="letters", models=names, model=index, **given)


def letters(stream: Trace) -> str:
    return "".join(stream.models[index] for index in stream.model)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: str, name: str = "functions.csv", newline: str = "\n") -> Path:
        path = tmp_path / name
        path.write_bytes("".join(line + newline for line in lines).encode())
        return path

    return write


class TestTrace:
    def test_the_length_is_the_number_of_requests(self) -> None:
        assert len(trace()) == 4

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"model": array("I", [0, 1])}, r"model must have as many entries as arrival_s \(4\), not 2"),
            ({"source": array("I", [0])}, "source must have as many entries"),
            ({"location": array("I", [0])}, "location must have as many entries"),
            ({"model": array("I", [0, 1, 2, 0])}, "model must be below 2, not 2"),
            ({"location": array("I", [0, 0, 1, 0])}, "location must be below 1, not 1"),
            ({"model": array("d", [0, 1, 0, 1])}, r"model must be an array\('I'\)"),
            ({"arrival_s": [0.0] * 4}, r"arrival_s must be an array\('d'\)"),
            ({"arrival_s": array("d", [0, 2, 1, 3])}, "must never fall, but entry 2"),
            ({"arrival_s": array("d", [-1, 2, 3, 4])}, "finite and not negative, not -1.0"),
            ({"arrival_s": array("d", [0, 1, 2, math.inf])}, "finite and not negative, not inf"),
            ({"arrival_s": array("d", [0, 1, math.nan, 3])}, "finite and not negative, not nan"),
            ({"models": ("a", "a")}, "models must be distinct"),
            ({"locations": ("x", "x")}, "locations must be distinct"),
            ({"locations": ()}, "locations must not be empty"),
        ],
    )
    def test_a_column_that_does_not_fit_is_named(self, changes: dict[str, Any], complaint: str) -> None:
        with pytest.raises(ValueError, match=complaint):
            trace(**changes)

    def test_models_without_requests_are_dropped(self) -> None:
        used = trace(models=("a", "b", "c", "d"), model=array("I", [3, 1, 3, 1])).only_used()
        assert used.models == ("b", "d")
        assert list(used.model) == [1, 0, 1, 0]

    def test_requests_of_one_instant_keep_their_order(self) -> None:
        assert letters(requests_for("abcd", arrival_s=np.array([2.0, 1.0, 2.0, 1.0]))) == "bdac"
        # Short columns stay in order whatever the sorting.
        many = np.arange(1_000)
        assert list(requests_for("a" * 1_000, source=many, arrival_s=many % 2.0).source) == [*many[::2], *many[1::2]]

    def test_no_requests_are_a_trace_too(self) -> None:
        empty = {"arrival_s": array("d"), "model": array("I"), "source": array("I")}
        assert len(trace(**empty).only_used().models) == 0


class TestAzure:
    def test_every_call_keeps_its_minute(self, write: Callable[..., Path]) -> None:
        read = read_azure(write(HEADER, *FUNCTIONS), **KEEP_ALL)
        by_minute = [sorted(letter for at, letter in calls(read) if at // 60 == minute) for minute in range(3)]
        assert by_minute == [["f1", "f1", "f1", "f2"], ["f2", "f3"], ["f1", "f2"]]

    def test_the_calls_of_a_minute_are_spaced_evenly(self, write: Callable[..., Path]) -> None:
        read = read_azure(write(HEADER, *FUNCTIONS), **KEEP_ALL)
        assert list(read.arrival_s) == [0.0, 15.0, 30.0, 45.0, 60.0, 90.0, 120.0, 150.0]

    def test_the_calls_of_a_minute_are_shuffled_by_the_seed(self, write: Callable[..., Path]) -> None:
        path = write("HashOwner,HashApp,HashFunction,Trigger,1", "o,a,f,http,500", "o,a,g,http,500")
        one, again, other = (read_azure(path, **{**KEEP_ALL, "seed": seed}) for seed in (1, 1, 2))
        assert one.model == again.model != other.model
        assert repeat_share(one) == pytest.approx(0.5, abs=0.1)

    def test_the_owner_is_the_source(self, write: Callable[..., Path]) -> None:
        read = read_azure(write(HEADER, *FUNCTIONS), **KEEP_ALL)
        functions = defaultdict(set)
        for source, model in zip(read.source, read.model, strict=True):
            functions[source].add(read.models[model])
        assert sorted(map(sorted, functions.values())) == [["f1", "f2"], ["f3"]]

    def test_functions_of_one_name_in_two_apps_are_two_models(self, write: Callable[..., Path]) -> None:
        read = read_azure(write(HEADER, "o,a,f,http,1,0,0", "o,b,f,http,2,0,0", "o,b,g,http,1,0,0"), **KEEP_ALL)
        assert dict(zip(read.models, counts(read), strict=True)) == {"o/a/f": 1, "o/b/f": 2, "g": 1}

    def test_minutes_are_the_first_or_the_named_ones(self, write: Callable[..., Path]) -> None:
        path = write(HEADER, *FUNCTIONS)
        first, named = (read_azure(path, minutes=minutes, **KEEP_ALL) for minutes in (2, (481, 482)))
        assert Counter(at // 60 for at, _ in calls(first)) == {0: 4, 1: 2}
        assert Counter(at // 60 for at, _ in calls(named)) == {0: 2, 1: 2}

    def test_a_trigger_chooses_functions(self, write: Callable[..., Path]) -> None:
        path = write(HEADER, *FUNCTIONS)
        assert read_azure(path, trigger="http", **KEEP_ALL).models == ("f1", "f3")
        with pytest.raises(TraceError, match="no function has the trigger 'ftp'; there are all, http, queue, timer"):
            read_azure(path, trigger="ftp", **KEEP_ALL)

    def test_functions_called_once_are_dropped(self, write: Callable[..., Path]) -> None:
        assert read_azure(write(HEADER, *FUNCTIONS), seed=1, max_quantile=1.0).models == ("f1", "f2")

    def test_the_most_popular_functions_are_dropped_before_those_called_once(self) -> None:
        called = np.array([0] * 50 + [1] * 10 + list(range(2, 12)))
        kept = worth_keeping(called, max_quantile=0.9, drop_one_hit=True)
        # Ten of twenty are called once: the 0.9-quantile of all is 9.1, that of the others would be 10.1.
        assert list(called[kept]) == list(range(2, 10))

    def test_minute_by_minute_columns_may_be_gzipped_have_a_mark_and_windows_lines(
        self, write: Callable[..., Path], tmp_path: Path
    ) -> None:
        plain = read_azure(write(HEADER, *FUNCTIONS), **KEEP_ALL)
        windows = write("\ufeff" + HEADER, *FUNCTIONS, "", name="w.csv", newline="\r\n")
        zipped = tmp_path / "whatever"
        zipped.write_bytes(gzip.compress(windows.read_bytes()))
        for path in (windows, zipped):
            assert read_azure(path, name=plain.name, **KEEP_ALL) == plain

    @pytest.mark.parametrize(
        ("lines", "complaint"),
        [
            ((), "functions.csv: is empty; the first line must name the columns"),
            ((HEADER,), "functions.csv: has no functions"),
            ((HEADER[10:], *FUNCTIONS), "line 1: there is no column HashOwner; there are HashApp, HashFunction"),
            ((HEADER.replace("482", "481"),), "line 1, column 481 (7): has this name for the second time"),
            ((HEADER.replace("482", "483"),), "line 1, column 483 (7): minute 482 should stand here"),
            ((HEADER.replace("482", "x"),), "line 1, column x (7): a minute's name must be a number"),
            ((HEADER.replace(",480,481,482", ""),), "line 1: the columns must be HashOwner, HashApp, HashFunction"),
            ((HEADER, "o,a,f,http,1,x,1"), "functions.csv, line 2, column 481 (6): 'x' is not a count"),
            ((HEADER, FUNCTIONS[0], "o,a,f,http,1,1,"), "line 3, column 482 (7): '' is not a count"),
            ((HEADER, "o,a,f,http,1,-1,1"), "line 2, column 481 (6): '-1' is not a count"),
            ((HEADER, "o,a,f,http,1,1.5,1"), "line 2, column 481 (6): '1.5' is not a count"),
            ((HEADER, "o,a,f,http,1,nan,1"), "line 2, column 481 (6): 'nan' is not a count"),
            ((HEADER, "o,a,f,http,1,1_0,1"), "line 2, column 481 (6): '1_0' is not a count"),
            ((HEADER, "o,a,f,http,1,\u0663,1"), "line 2, column 481 (6): '\u0663' is not a count"),
            ((HEADER, "o,a,f,http,1,99999999999,1"), "line 2, column 481 (6): '99999999999' is not a count"),
            ((HEADER, "o,a,f,http,1,1"), "line 2: has 6 columns, but the header has 7"),
            ((HEADER, "o,a,f,http,1,1,1,1"), "line 2: has 8 columns, but the header has 7"),
            ((HEADER, ",a,f,http,1,1,1"), "line 2, column HashOwner (1): is empty"),
            ((HEADER, *FUNCTIONS, FUNCTIONS[0]), "line 6, column HashFunction (3): the same function as in line 2"),
            ((HEADER, 'o,a,"f,http,1,1,1'), "line 2: is not CSV (unexpected end of data)"),
            ((HEADER, "o,a,f,http,1,\0,1"), "line 2: has a NUL byte; this is not a text file"),
            ((HEADER, "o,a,f,http,0,0,0"), "functions.csv: no function is left"),
            ((HEADER, "o,a,f,http,999999999,0,0"), "functions.csv: 999999999 calls are more than 100000000"),
        ],
    )
    def test_a_mistake_is_named_with_its_place(
        self, write: Callable[..., Path], lines: tuple[str, ...], complaint: str
    ) -> None:
        with pytest.raises(TraceError, match=re.escape(complaint)) as caught:
            read_azure(write(*lines), **KEEP_ALL)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("minutes", [4, (479, 480), (482, 483), (482, 481)])
    def test_minutes_that_are_not_there_are_refused(self, write: Callable[..., Path], minutes: Any) -> None:
        with pytest.raises(TraceError, match=r"the minutes \d+-\d+ are not there; the file has 480-482"):
            read_azure(write(HEADER, *FUNCTIONS), minutes=minutes, **KEEP_ALL)

    def test_the_excerpt_has_as_many_models_and_requests_as_the_paper_keeps(self, traces: Path) -> None:
        read = read_azure(traces / EXCERPT, seed=0)
        assert (len(read.models), len(read)) == (408, 108_552)
        web = read_azure(traces / EXCERPT, seed=0, trigger="http")
        assert (len(web.models), len(web)) == (114, 20_456)

    def test_the_excerpt_has_the_statistics_that_generators_are_compared_with(self, traces: Path) -> None:
        read = read_azure(traces / EXCERPT, seed=0)
        assert zipf_mle(read) == pytest.approx(0.93, abs=0.01)
        assert top_share(read, share=0.1) == pytest.approx(0.648, abs=0.001)
        ratios = [lru_hit_ratio(read, share=share) for share in (0.05, 0.1, 0.2)]
        assert ratios == pytest.approx([0.354, 0.535, 0.719], abs=0.01)

    def test_all_of_the_excerpt_is_three_million_calls(self, traces: Path) -> None:
        read = read_azure(traces / EXCERPT, **KEEP_ALL)
        assert (len(read.models), len(read)) == (500, 3_037_902)
        assert top_share(read, share=0.1) == pytest.approx(0.984, abs=0.001)
        assert log10_count_deviation(read) == pytest.approx(1.13, abs=0.005)


class TestFiles:
    """What can be wrong with any file."""

    def test_a_file_that_cannot_be_read_is_named(self, tmp_path: Path) -> None:
        for path in (tmp_path, tmp_path / "absent", Path("with\0nul")):
            with pytest.raises(TraceError, match="cannot be read") as caught:
                read_csv(path)
            assert "\n" not in str(caught.value)

    def test_a_gzip_file_that_was_cut_off_is_no_shorter_trace(self, write: Callable[..., Path]) -> None:
        path = write("arrival_s,model", *(f"{second},m{second % 7}" for second in range(5_000)))
        whole = gzip.compress(path.read_bytes(), mtime=0)
        for part in (whole[:-4], whole[: len(whole) // 2], whole[:5], whole[:-8] + bytes(8), whole + b"more"):
            path.write_bytes(part)
            with pytest.raises(TraceError, match="the gzip file is damaged or cut off after line"):
                read_csv(path)

    def test_bytes_that_are_no_text_are_named_with_their_line(self, write: Callable[..., Path]) -> None:
        path = write("arrival_s,model", "1,a")
        path.write_bytes(path.read_bytes() + b"2,\xff\xfe\n")
        with pytest.raises(TraceError, match="line 3: is not text in UTF-8"):
            read_csv(path)

    def test_names_with_line_breaks_stay_on_one_line_of_the_message(self, write: Callable[..., Path]) -> None:
        with pytest.raises(TraceError) as caught:
            read_csv(write('"a\nb",model', "1,a"))
        assert str(caught.value).endswith(r"line 2: there is no column arrival_s; there are 'a\nb', model")


class TestCsv:
    def test_a_trace_begins_at_zero_with_its_first_request(self, write: Callable[..., Path]) -> None:
        read = read_csv(write("arrival_s,model", "1600000060,a", "1600000000,b"))
        assert list(read.arrival_s) == [0.0, 60.0]

    def test_columns_may_be_in_any_order_and_others_are_ignored(self, write: Callable[..., Path]) -> None:
        read = read_csv(write("note,model, arrival_s,location,user", "x,b,1.5,tokyo,u", "y, a , 2e0,paris,v"))
        assert (read.models, list(read.model), list(read.arrival_s)) == (("b", "a"), [0, 1], [0.0, 0.5])
        assert read.location is not None
        assert [read.locations[index] for index in read.location] == ["tokyo", "paris"]

    def test_rows_are_sorted_by_arrival(self, write: Callable[..., Path]) -> None:
        assert letters(read_csv(write("arrival_s,model", "3,c", "1,a", "3,d", "2,b"))) == "abcd"

    def test_without_locations_all_requests_come_from_one(self, write: Callable[..., Path]) -> None:
        read = read_csv(write("arrival_s,model", "1,a"))
        assert (read.location, read.locations) == (None, ("local",))

    @pytest.mark.parametrize(
        ("columns", "sources"),
        [("model,arrival_s,location,user", [0, 1, 0]), ("model,arrival_s,location,x", [0, 0, 1]),
         ("model,arrival_s,x,y", [0, 1, 2])],
    )  # fmt: skip
    def test_the_source_is_the_user_else_the_location_else_the_request(
        self, write: Callable[..., Path], columns: str, sources: list[int]
    ) -> None:
        assert list(read_csv(write(columns, "a,1,p,u", "a,2,p,v", "a,3,q,u")).source) == sources

    @pytest.mark.parametrize(
        ("lines", "complaint"),
        [
            (("arrival_s,modell", "1,a"), "line 1: there is no column model; there are arrival_s, modell"),
            (("arrival_s,model",), "stream.csv: has no requests"),
            (("arrival_s,model", "soon,a"), "line 2, column arrival_s (1): 'soon' is not a finite number that is 0"),
            (("arrival_s,model", "", "-1,a"), "line 3, column arrival_s (1): '-1' is not"),
            (("arrival_s,model", "nan,a"), "line 2, column arrival_s (1): 'nan' is not"),
            (("arrival_s,model", "inf,a"), "line 2, column arrival_s (1): 'inf' is not"),
            (("arrival_s,model", "1_0,a"), "line 2, column arrival_s (1): '1_0' is not"),
            (("arrival_s,model", "1, "), "line 2, column model (2): is empty"),
            (("arrival_s,model,user", "1,a,"), "line 2, column user (3): is empty"),
            (("arrival_s,model,model", "1,a,b"), "line 1, column model (3): has this name for the second time"),
            (("arrival_s,model", "1,a", "2"), "line 3: has 1 columns, but the header has 2"),
        ],
    )
    def test_a_mistake_is_named_with_its_place(
        self, write: Callable[..., Path], lines: tuple[str, ...], complaint: str
    ) -> None:
        with pytest.raises(TraceError, match=re.escape(complaint)):
            read_csv(write(*lines, name="stream.csv"))


class TestStatistics:
    def test_zipf_mle_finds_the_exponent_of_exact_shares(self) -> None:
        for exponent in (0.0, 0.7, 1.0, 1.6):
            requests = [round(1e5 * rank**-exponent) for rank in range(1, 40)]
            model = np.repeat(np.arange(39), requests)
            times = np.zeros(len(model))
            stream = make_trace(name="", models=tuple(map(str, range(39))), arrival_s=times, model=model, source=model)
            assert zipf_mle(stream) == pytest.approx(exponent, abs=1e-3)

    def test_shares_are_of_the_most_popular_models(self) -> None:
        assert top_share(requests_for("aaaaabbcde"), share=0.2) == 0.5
        assert top_share(requests_for("aaaaabbcde"), share=0.01) == 0.5
        assert top_share(requests_for("aaaaabbcde"), share=0.4) == 0.7

    def test_a_clock_has_no_variation_and_a_pair_of_calls_does(self) -> None:
        times = np.array([0, 10, 20, 30, 1, 2, 31.0, 32.0])
        assert list(iat_cvs(requests_for("aaaabbbb", arrival_s=times))) == pytest.approx([0.0, 1.2774], abs=1e-4)

    def test_models_with_one_gap_have_no_variation(self) -> None:
        assert len(iat_cvs(requests_for("aabbb"))) == 1

    def test_reuse_distance_counts_the_models_between_and_itself(self) -> None:
        assert list(reuse_distances(requests_for("abcabbca"))) == [3, 3, 1, 3, 3]

    def test_lru_hits_what_its_distance_lets_fit(self) -> None:
        stream = requests_for("abcabbcadaacbdbbacddcab")
        for share, size in ((0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)):
            hits = int((reuse_distances(stream) <= size).sum())
            assert lru_hit_ratio(stream, share=share) == hits / len(stream)

    def test_repeats_are_counted_in_all_and_within_a_source(self) -> None:
        stream = requests_for("aabab", source=np.array([0, 1, 0, 1, 0]))
        assert repeat_share(stream) == 0.25
        assert source_repeat_share(stream) == pytest.approx(2 / 3)

    def test_divergence_is_nothing_for_the_same_and_one_bit_for_disjoint_popularity(self) -> None:
        where = {"locations": ("x", "y"), "location": np.array([0, 0, 1, 1])}
        assert jensen_shannon_bits(requests_for("abab", **where)) == pytest.approx(0)
        assert jensen_shannon_bits(requests_for("aabb", **where)) == pytest.approx(1)
        assert jensen_shannon_bits(requests_for("aaab", **where)) == pytest.approx(0.3113, abs=1e-4)

    def test_undefined_statistics_are_refused(self) -> None:
        with pytest.raises(ValueError, match="at least two models"):
            zipf_mle(requests_for("aaa"))
        with pytest.raises(ValueError, match="fewer than two locations"):
            jensen_shannon_bits(requests_for("ab"))
        with pytest.raises(ValueError, match="no source asks twice"):
            source_repeat_share(requests_for("ab"))
        with pytest.raises(ValueError, match=r"share must be above 0 and at most 1, not 1\.5"):
            lru_hit_ratio(requests_for("ab"), share=1.5)


def calls(stream: Trace) -> list[tuple[float, str]]:
    return [(at, stream.models[index]) for at, index in zip(stream.arrival_s, stream.model, strict=True)]
