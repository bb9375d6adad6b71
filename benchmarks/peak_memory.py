"""A fresh process that takes two steps: `python -m benchmarks.peak_memory WAY FOLDER gpt2|quick [CHECKOUT]`.

Prints its peak memory in bytes. WAY is plain, chunked, recomputed (chunked too), or nanogpt, from a checkout.
"""

import sys
from pathlib import Path
from typing import Any

from benchmarks.loader import batch_loader
from benchmarks.machine import peak_resident_bytes
from benchmarks.made import close, make_store, make_trainer, shipped, train_macro_batch
from benchmarks.step import nanogpt_loop
from cleangpt.config import DataConfig

SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 50_304, "max_seq_len": 1024, "n_layers": 12, "n_heads": 12, "dim": 768, "dropout": 0.0},
    "quick": {"vocab_size": 500, "max_seq_len": 64, "n_layers": 1, "n_heads": 2, "dim": 32, "dropout": 0.0},
}
WAYS: dict[str, dict[str, Any]] = {"plain": {}, "nanogpt": {}, "chunked": {"loss_chunk": 128}}
WAYS["recomputed"] = WAYS["chunked"] | {"recompute_every": 1}


def main(way: str, folder: Path, size: str, checkout: Path | None = None) -> None:
    """Takes the steps: ours with the trainer, nanoGPT's model with its own optimizer."""
    seq_len = SIZES[size]["max_seq_len"]
    training = {"batches_per_macro_batch": 2, "macro_batches": 10, "device": "cpu", **WAYS[way]}
    data = DataConfig(seq_len=seq_len, batch_size=1)
    experiment = shipped("shakespeare_char_cpu", data, model=SIZES[size], training=training)
    dataset = make_store(folder / f"store_{way}", 100_000)
    if checkout is not None:
        loader = batch_loader(dataset, 1, seq_len)
        batch = loader.next()
        loader.close()
        nanogpt_loop(checkout, experiment, [(batch.inputs["tokens"], batch.targets)])(2)
    else:
        trainer = make_trainer(experiment, dataset, folder / f"run_{way}")
        train_macro_batch(trainer)
        close(trainer)
    print(peak_resident_bytes())


if __name__ == "__main__":
    way, folder, size, *checkout = sys.argv[1:]
    main(way, Path(folder), size, Path(checkout[0]) if checkout else None)
