"""A plan as tables for the terminal."""

from rich.table import Table

from cleangpt.distributed.datasheets import GIB
from cleangpt.planning.plan import Estimate, Plan
from cleangpt.screen import Screen
from cleangpt.tracking.numbers import show_number


def show(plan: Plan) -> None:
    """Prints a table of strategies and the parts of the best, or for several numbers of devices a table of these."""
    console = Screen(width=max(Screen().width, 112))  # so that no cell is truncated
    price = f"{plan.device.price:.2f}" if plan.device.price >= 0.1 else show_number(plan.device.price, 2)
    device, counts = plan.device, list(dict.fromkeys(entry.devices for entry in plan.estimates))
    console.print(f"model    {plan.parameters:,} parameters, {plan.flops_per_token:,} FLOPs per token", highlight=False)
    console.print(f"length   {plan.tokens:,} tokens", highlight=False)
    console.print(
        f"device   {device.name}, {device.memory / GIB:.0f} GiB, {device.flops(plan.precision) / 1e12:,.4g} TFLOP/s in "
        f"{plan.precision}, ${price} an hour (assumed)",
        highlight=False,
    )
    single = len(counts) == 1
    console.print(_estimates(plan.estimates if single else [plan.best(count) for count in counts]))
    if single:
        console.print(_breakdown(plan.best(counts[0])))
    for line in [*plan.notes, *plan.refused, *plan.advice]:
        console.print(line, highlight=False, soft_wrap=True)
    if fitting := plan.fitting():
        best = fitting[0]
        console.print(
            f"cheapest that fits: {best.devices} x {device.name}, {best.strategy}: {best.options}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def _estimates(estimates: list[Estimate]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("devices", justify="right")
    table.add_column("strategy")
    for name in ("micro-batch", "GiB", "fits", "step", "exposed", "tokens/s", "MFU", "hours", "cost"):
        table.add_column(name, justify="right")
    for entry in estimates:
        table.add_row(
            f"{entry.devices}", entry.strategy + (" *" if entry.chosen else ""), f"{entry.micro_batch}",
            _digits(entry.memory.total / GIB, 1), "yes" if entry.fits else "no", f"{entry.time.total:.3g} s",
            f"{entry.time.exposed / entry.time.total:.0%}", f"{entry.tokens_per_second:,.0f}", f"{entry.mfu:.0%}",
            _digits(entry.hours, 2), f"${_digits(entry.cost, 2)}",
        )  # fmt: skip
    return table


def _breakdown(entry: Estimate) -> Table:
    """Memory and step time of one strategy by parts, on each device."""
    memory, time = entry.memory, entry.time
    table = Table(box=None, pad_edge=False, title=f"{entry.strategy}, per device", title_justify="left")
    table.add_column("memory")
    table.add_column("GiB", justify="right")
    table.add_column("  step")
    table.add_column("", justify="right")
    rollouts = (("sampling", time.sampling), ("passes without gradient", time.looking_back))
    step = [
        ("arithmetic", f"{time.compute:.3g} s"),
        ("exposed communication", f"{time.exposed:.3g} s"),
        ("optimizer", f"{time.optimizer:.3g} s"),
        *((name, f"{seconds:.3g} s") for name, seconds in rollouts if seconds),
        ("sent", f"{entry.sent_bytes / GIB:,.3g} GiB"),
    ]
    sizes = [(name, size) for name, size in vars(memory).items() if size or name != "reference"]
    for index, (name, size) in enumerate(sizes):
        what, value = step[index] if index < len(step) else ("", "")
        table.add_row(name, _digits(size / GIB, 2), f"  {what}", value)
    return table


def _digits(value: float, decimals: int) -> str:
    """`show_number`, and from a thousand on without decimals: ``$0.0042``, ``12,345``."""
    return show_number(value, decimals) if value < 1000 else f"{value:,.0f}"
