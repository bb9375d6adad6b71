"""Each fault, a few times: `make torture` tries them at every place that they may happen."""

import sys
from pathlib import Path

import pytest

from tests.faults import find_faults

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="fork and SIGKILL are POSIX")

FAULTS = find_faults()
CASES = [(name, seed) for name, fault in FAULTS.items() for seed in range(fault.short)]


@pytest.mark.parametrize(("name", "seed"), CASES, ids=[f"{name}, {seed}" for name, seed in CASES])
def test_nothing_is_lost_when_a_run_is(name: str, seed: int, tmp_path: Path) -> None:
    FAULTS[name].trial(seed, tmp_path)
