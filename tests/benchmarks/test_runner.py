"""The runner: measures taken in turn, ratios within a repetition, one section of the results at a time."""

import mmap
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import machine
from benchmarks.runner import Row, interleave, quantity, section, write_section


def test_measures_are_taken_in_turn_after_an_unrecorded_round() -> None:
    calls: list[str] = []

    def measure(name: str) -> int:
        calls.append(name)
        return len(calls)

    taken = interleave({"a": lambda: measure("a"), "b": lambda: measure("b")}, repetitions=3)
    assert "".join(calls) == "abababab"
    assert taken == {"a": [3, 5, 7], "b": [4, 6, 8]}


def test_without_a_warm_up_every_round_is_recorded() -> None:
    numbers = iter(range(10))
    assert interleave({"a": lambda: next(numbers)}, 2, warm_up=False) == {"a": [0, 1]}


def test_a_ratio_is_taken_within_each_repetition_and_the_median_over_them() -> None:
    """The machine was ten times slower in the second round; the ratio of medians, 0.1, would hide the doubling."""
    row = Row("work", "s", [0.002, 0.020, 0.001], "peer", [0.001, 0.010, 0.010], goal=1.5)
    assert row.ratios == [2.0, 2.0, 0.1]
    assert row.cells() == ["work", "2 ms", "peer: 10 ms", "2", "0.1 to 2", "≤ 1.5: missed"]


def test_a_goal_is_met_up_to_and_with_its_value() -> None:
    assert Row("work", "s", [2.0], "peer", [1.0], goal=2.0).cells()[-1] == "≤ 2: met"
    assert Row("work", "s", [2.0], "peer", [1.0]).cells()[-1] == ""


def test_sides_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError):
        Row("work", "s", [1.0, 2.0], "peer", [1.0]).cells()


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0, "s", "0 µs"),
        (1.234e-6, "s", "1.23 µs"),
        (0.0125, "s", "12.5 ms"),
        (0.9996, "s", "1000 ms"),
        (61.0, "s", "61 s"),
        (12, "B", "12 B"),
        (2e9, "B", "1.86 GiB"),
    ],
)
def test_quantities_carry_the_prefix_that_suits_them(value: float, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


def test_a_section_is_a_table_below_what_it_is_about_and_the_machine() -> None:
    text = section("About.\n", "a machine", [Row("work", "s", [1.0, 1.0], "peer", [2.0, 2.0])])
    assert text.splitlines() == [
        "About.",
        "",
        "a machine. 2 interleaved repetitions.",
        "",
        "|  | ours | peer or limit | ratio | spread | goal |",
        "|---|---:|---:|---:|---:|---|",
        "| work | 1 s | peer: 2 s | 0.5 | 0.5 to 0.5 |  |",
    ]


def test_a_section_replaces_its_own_and_leaves_the_others_in_order(tmp_path: Path) -> None:
    path, order = tmp_path / "RESULTS.md", ("first", "second")
    write_section(path, "second", "2 old\n", order)
    write_section(path, "first", "1\n", order)
    before = path.read_text(encoding="utf-8")
    write_section(path, "second", "2 new\n", order)
    after = path.read_text(encoding="utf-8")
    assert after == before.replace("2 old", "2 new") and after.startswith("# Results\n")
    assert after.index("## first\n\n1\n") < after.index("## second\n\n2 new\n")
    write_section(path, "second", "2 new\n", order)
    assert path.read_text(encoding="utf-8") == after


def test_a_finished_benchmark_is_written_and_a_quick_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(command, "measure", lambda name, options: f"figures of {name}\n")
    assert command.main(["--quick"]) == 0
    assert not command.RESULTS.exists()
    assert command.main(["step", "store"]) == 0
    text = command.RESULTS.read_text(encoding="utf-8")
    assert 0 < text.index("## store\n\nfigures of store\n") < text.index("## step\n\nfigures of step\n")
    assert command.main([]) == 0
    assert command.RESULTS.read_text(encoding="utf-8").count("\n## ") == len(command.BENCHMARKS)


def test_a_wrong_name_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["stores"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "'stores' is not a benchmark; did you mean 'store'?" in said


def test_resident_memory_grows_by_what_is_allocated() -> None:
    before = machine.resident_bytes()
    if before is None:
        pytest.skip("this system does not tell")
    held = mmap.mmap(-1, 2**26)  # what the process has freed and kept is of no use for it
    np.frombuffer(held, np.uint8)[:] = 1
    after = machine.resident_bytes()
    assert after is not None and after - before == pytest.approx(len(held), rel=0.1)


def test_the_facts_name_versions_and_cores() -> None:
    text = machine.facts()
    assert f"NumPy {np.__version__}" in text and " cores, PyTorch threads " in text and "\n" not in text
