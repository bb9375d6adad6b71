"""The dataset of a run, for whatever is measured on it."""

from pathlib import Path

from cleangpt.checkpoints.run_folder import check_data
from cleangpt.corpora import prepare
from cleangpt.data.mixing import MixedDataset
from cleangpt.evaluation.reference import add_reference
from cleangpt.experiment import Experiment
from cleangpt.files import user_path
from cleangpt.objectives.pairs import REFERENCE


def open_dataset(run: Path, experiment: Experiment) -> MixedDataset:
    """The dataset that a run was trained with, and the reference's log-probabilities if its objective reads them.

    Raises:
        UserError: it is not there any more, or is not the one that the run was trained with.
    """
    dataset = prepare(experiment.corpus, user_path(experiment.data.folder))
    if REFERENCE in experiment.objective.reads:
        add_reference(dataset, None, run)
    check_data(run, dataset)
    return dataset
