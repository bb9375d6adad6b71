"""CleanGPT: from raw text to a trained language model, one stage per folder, in the order they run.

corpora -> data -> models -> objectives -> training -> tracking, evaluation, inference.
`docs/concepts.md` explains how they fit together; `config.py` has every hyperparameter.

From Python: `cleangpt.train(experiment)` trains and returns the run's folder; `cleangpt.load(run)` gives its model,
tokenizer and `generate`. Both are imported when they are first used, so that `import cleangpt` stays light.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cleangpt.loading import load
    from cleangpt.training.launch import train

__version__ = "0.1.0"
__all__ = ["__version__", "load", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        from cleangpt.training.launch import train

        return train
    if name == "load":
        from cleangpt.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
