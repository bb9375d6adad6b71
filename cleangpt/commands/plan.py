"""plan EXPERIMENT: estimate memory, time and cost of training on devices you do not have yet"""

from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from cleangpt.commands.overrides import parse_experiment
from cleangpt.distributed.datasheets import find_device
from cleangpt.errors import UserError
from cleangpt.files import user_path, write_json
from cleangpt.planning.plan import make_plan
from cleangpt.planning.published import show_published
from cleangpt.planning.tables import show

FIELDS: list[tuple[str, Any, Any]] = [
    ("devices", Annotated[tuple[int, ...], tyro.conf.arg(help="Number of devices; several give a table.")], (1,)),
    ("device", Annotated[str, tyro.conf.arg(help="Kind of device: h100, a100, 4090, ...")], "h100"),
    ("devices_per_node", Annotated[int, tyro.conf.arg(help="Devices per machine.")], 8),
    ("tokens", Annotated[int | None, tyro.conf.arg(help="Token budget; None: the experiment's length.")], None),
    ("price", Annotated[float | None, tyro.conf.arg(help="Dollars per device and hour; None: an estimate.")], None),
    (
        "published",
        Annotated[bool, tyro.conf.arg(help="Compare plans with published measurements, and plan nothing.")],
        False,
    ),
    ("json", Annotated[str | None, tyro.conf.arg(help="Also write the plan to this JSON file.")], None),
]


def command(words: Sequence[str]) -> None:
    """Prints a plan as a table, or with `--published` a table of plans beside measurements."""
    if "--published" in words:
        show_published()
        return
    chosen: Any = parse_experiment(words, "plan", "Memory, time and cost of training {}, from data sheets", FIELDS)
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
