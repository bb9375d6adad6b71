"""CleanGPT: from raw text to a trained language model, one stage per folder, in the order they run.

corpora -> data -> models -> objectives -> training -> tracking, evaluation, inference.
`docs/concepts.md` tells the story; `config.py` holds every hyperparameter there is.
"""

__version__ = "0.1.0"
