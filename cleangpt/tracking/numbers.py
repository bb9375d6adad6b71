"""Numbers as text: with three significant digits or more, in a fitting unit."""

import math


def show_number(value: float, decimals: int) -> str:
    """A number with this many decimals, or with more where three significant digits need them: ``0.00012``."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < 1e-6:
        return f"{value:.2e}"
    return f"{value:.{max(decimals, 2 - math.floor(math.log10(abs(value))))}f}"


def show_count(value: float) -> str:
    """A count, with three significant digits from ten thousand on: ``9,999``, ``12.3k``, ``1.21M``."""
    if abs(value) < 10_000:
        return f"{round(value):,}"
    power = min(int((math.log10(abs(value)) + 1e-9) / 3), 5)
    return f"{value / 1000**power:.3g}{' kMGTP'[power]}" if abs(value) < 999.5e15 else f"{value:.3g}"


def show_bytes(value: float) -> str:
    """Bytes in the largest binary unit that gives a number of at least 1: ``812 MiB``."""
    power = min(max(int(value).bit_length() - 1, 0) // 10, 5)
    return f"{value / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}"


def show_time(seconds: float) -> str:
    """Seconds as ``12 ms``, ``3.42 s`` or, from a minute on, hours, minutes and seconds."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{show_number(seconds, 1)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
