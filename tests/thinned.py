"""Long parametrizations: the first cases run by default, the rest with the slow tests."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_after(count: int, cases: Iterable[Any]) -> list[Any]:
    """The cases for `pytest.mark.parametrize`; those after the first `count` are marked slow."""
    params = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*values, marks=pytest.mark.slow if n >= count else ()) for n, values in enumerate(params)]
