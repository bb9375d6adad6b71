"""`cleangpt plan` for the experiments of the rows of `speed.py`, against what they measured on this card."""

from collections.abc import Iterator

from benchmarks.gpu.journal import read
from benchmarks.gpu.models import SPEED_ROWS, speed_experiment
from benchmarks.gpu.setup import LeftOut, Measurement, Setup
from benchmarks.gpu.speed import MEMORY, RATE
from cleangpt.distributed.datasheets import find_device, identify_device
from cleangpt.planning.plan import make_plan

LEAST, MOST = 0.9, 1.1
"""Planned over measured."""


def plan(setup: Setup) -> Iterator[Measurement]:
    """Planned over measured, for the rows that have been measured.

    Raises:
        LeftOut: none has, or the card has no data sheet.
    """
    device = find_device("cpu") if setup.toy else identify_device(setup.card)
    if device is None:
        raise LeftOut("no data sheet of this card in cleangpt/distributed/datasheets.py")
    outcomes = read(setup.results)[setup.card]
    measured = {name: outcomes[name].measurements for name in SPEED_ROWS if name in outcomes}
    if not any(measured.values()):
        raise LeftOut("needs a row of tokens per second")
    goals = {} if setup.toy else {"least": LEAST, "most": MOST}
    for name, entries in measured.items():
        found = {entry.what: entry.value for entry in entries}
        estimate = make_plan(speed_experiment(setup, name), device, [1]).best(1)
        planned = {RATE: estimate.tokens_per_second, MEMORY: estimate.memory.total / 2**30}
        for what, value in planned.items():
            there = found.get(what)
            ratio = value / there if there else None
            note = f"planned {value:,.4g}" + (f", measured {there:,.4g}" if there else ", not measured")
            yield Measurement(f"{name}: {what}, planned over measured", ratio, "×", note=note, **goals)
