"""plan EXPERIMENT: estimate memory, time and cost of training on devices you do not have yet"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from cleangpt.commands.fields import FLAT
from cleangpt.commands.overrides import parse_experiment
from cleangpt.distributed.datasheets import find_device
from cleangpt.errors import UserError
from cleangpt.experiment import Experiment
from cleangpt.files import user_path, write_json
from cleangpt.planning.plan import make_plan
from cleangpt.planning.published import show_published
from cleangpt.planning.tables import show
from cleangpt.validation import File, Metavar


@dataclass
class Options:
    """Options of `cleangpt plan`."""

    experiment: Annotated[Experiment, FLAT]
    devices: tuple[int, ...] = (1,)
    """Number of devices; several give a table."""
    device: Annotated[str, Metavar("DEVICE")] = "h100"
    """Kind of device: h100, a100, 4090, ..."""
    devices_per_node: int = 8
    """Devices per machine."""
    tokens: int | None = None
    """Token budget; None: the experiment's length."""
    price: Annotated[float, Metavar("DOLLARS")] | None = None
    """Dollars per device and hour; None: an estimate."""
    published: bool = False
    """Compare plans with published measurements, and plan nothing."""
    json: File | None = None
    """Also write the plan to this JSON file."""


def command(words: Sequence[str]) -> None:
    """Prints a plan as a table, or with `--published` a table of plans beside measurements."""
    if "--published" in words:
        show_published()
        return
    chosen = parse_experiment(Options, words, "plan", "Memory, time and cost of training {}, from data sheets")
    out = None if chosen.json is None else user_path(chosen.json)
    if out is not None and (not out.parent.is_dir() or out.is_dir()):
        raise UserError(f"--json is {chosen.json!r}; allowed: a file in a folder that exists")
    device = find_device(chosen.device, chosen.price)
    plan = make_plan(chosen.experiment, device, chosen.devices, chosen.devices_per_node, chosen.tokens)
    if out is not None:
        write_json(out, plan.to_json())
    show(plan)
    if out is not None:
        print(f"plan: {out}")
