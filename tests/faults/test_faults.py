"""Each fault, a few times: `make torture` tries them at every place where they can happen."""

import sys
from pathlib import Path

import pytest

from tests.faults import Fault, find_faults
from tests.faults import __main__ as command

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="fork and SIGKILL are POSIX")

FAULTS = find_faults()
CASES = [
    pytest.param(name, seed, id=f"{name}, {seed}", marks=pytest.mark.slow if fault.slow or seed or place % 2 else [])
    for place, (name, fault) in enumerate(FAULTS.items())
    for seed in range(fault.short)
]


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_nothing_is_lost_when_a_run_is(name: str, seed: int, tmp_path: Path) -> None:
    FAULTS[name].trial(seed, tmp_path)


def test_the_command_counts_what_is_lost(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def trial(seed: int, folder: Path) -> None:
        (folder / "here").touch()
        if seed == 3:
            pytest.skip("not on Fridays")
        if seed == 2:
            raise AssertionError("two hundred lines\nthe weights are gone")

    faults = {"rain": Fault("rain", trial, short=1, long=lambda: 5), "sun": Fault("sun", trial, short=1, long=2)}
    monkeypatch.setattr(command, "find_faults", lambda: faults)
    assert command.main([]) == 1
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("rain | 4 | 3 | 1 |") for line in said)
    assert any(line.startswith("sun | 2 | 2 | 0 |") for line in said)
    assert "rain, 3: not tried: not on Fridays" in said
    assert said[-1] == "lost: rain, seed 2: AssertionError: the weights are gone"
    assert command.main(["sun"]) == command.main(["rain", "--tries", "2"]) == 0
    capsys.readouterr()
    assert command.main(["snow"]) == 2
    assert capsys.readouterr().err == "error: 'snow' is no fault; did you mean 'sun'?; allowed: rain, sun\n"
