"""The dataset card: a description in Markdown, for people."""

import hashlib
from typing import Any

from cleangpt.data.tokenizers import Tokenizer


def card(name: str, facts: dict[str, Any], tokenizer: Tokenizer) -> str:
    """The content of dataset.json, `facts`, in Markdown."""
    rows = "\n".join(_card_row(split, counts) for split, counts in facts["splits"].items())
    end = "none" if tokenizer.eos_id is None else str(tokenizer.eos_id)
    digests = "".join(f"{file} {digest}\n" for file, digest in sorted(facts["sha256"].items()))
    python = f"Python {facts['source']['python']}\n" if "python" in (facts["source"] or {}) else ""
    group = f"group       rows: {', '.join(facts['group'])}\n" if facts.get("group") else ""
    columns = "".join(
        f"column      {name}: {column['dtype']}, {column['role']}\n" for name, column in facts["columns"].items()
    )
    settings = ", ".join(f"{key}={value!r}" for key, value in facts["corpus"].items() if key != "kind")
    return (
        f"# {name}\n\n{facts['corpus'].get('kind', '')}: {settings}\n{python}\n"
        "| split | documents | tokens | bytes of text | bytes per token | longest document |\n"
        f"|---|---:|---:|---:|---:|---:|\n{rows}\n\n"
        f"vocabulary  {facts['vocab_size']:,} tokens ({type(tokenizer).__name__}), end of text: {end}\n"
        f"stored as   {facts['dtype']}\n{columns}{group}"
        f"sha256      {hashlib.sha256(digests.encode()).hexdigest()}\n\n{_counts(facts)}"
        f"Documents by length in tokens\n\n{_histogram(facts)}\n"
    )


def _card_row(split: str, counts: dict[str, Any]) -> str:
    per_token = counts["text_bytes"] / counts["tokens"]
    numbers = (counts["documents"], counts["tokens"], counts["text_bytes"])
    longest = counts["longest_document"]
    return " | ".join([f"| {split}", *(f"{number:,}" for number in numbers), f"{per_token:.3f}", f"{longest:,} |"])


def _counts(facts: dict[str, Any]) -> str:
    """The corpus's own counts, summed over all splits; empty if there are none."""
    total: dict[str, int] = {}
    for split in facts["splits"].values():
        for name, count in split["counts"].items():
            total[name] = total.get(name, 0) + count
    lines = [f"{name}: {count:,}\n" for name, count in total.items()]
    return "\n".join([*lines, ""]) if lines else ""


def _histogram(facts: dict[str, Any], width: int = 40) -> str:
    counts: dict[int, int] = {}
    for split in facts["splits"].values():
        for power, count in split["length_histogram"].items():
            counts[int(power)] = counts.get(int(power), 0) + count
    most = max(counts.values())
    lines = [
        f"    {f'{2**power:,} to {2 ** (power + 1) - 1:,}':>27}  {'█' * round(width * count / most):<{width}} {count:,}"
        for power, count in sorted(counts.items())
    ]
    return "\n".join(line.rstrip() for line in lines)
