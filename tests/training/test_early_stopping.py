"""Early stopping counts macro-batches without a better validation loss, also across a resume."""

import math

import pytest

from cleangpt.config import EarlyStoppingConfig
from cleangpt.training.early_stopping import EarlyStopping


def stops_after(losses: list[float], patience: int | None, min_delta: float = 0.0) -> int | None:
    early_stopping = EarlyStopping(EarlyStoppingConfig(patience=patience, min_delta=min_delta))
    for number, loss in enumerate(losses, start=1):
        early_stopping.update(loss)
        if early_stopping.should_stop:
            return number
    return None


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "expected"),
    [
        ([3, 2, 1, 1, 1], 2, 0, 5),
        ([3, 2, 1, 1, 0.9, 1], 2, 0, None),
        ([3, 2.95, 2.9, 2.85], 2, 0.1, 3),
        ([3, 2.9, 2.8], None, 1, None),
        ([3, math.nan, math.nan], 2, 0, 3),
        ([math.nan, 3, 2], 2, 0, None),
    ],
)
def test_it_stops_when_patience_runs_out(
    losses: list[float], patience: int | None, min_delta: float, expected: int | None
) -> None:
    assert stops_after(losses, patience, min_delta) == expected


def test_a_resume_in_between_changes_nothing() -> None:
    config = EarlyStoppingConfig(patience=3)
    before = EarlyStopping(config)
    for loss in (2.0, 2.1, 2.2):
        before.update(loss)
    after = EarlyStopping(config)
    after.load_state_dict(before.state_dict())
    assert not after.should_stop
    after.update(2.05)
    assert after.should_stop
