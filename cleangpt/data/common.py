"""What the datasets of a mixture have in common: one tokenizer for all, and the same columns."""

from collections.abc import Mapping

from cleangpt.data.columns import Column
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.tokenizers import ModalityTokenizer, Tokenizer
from cleangpt.errors import UserError


def common_tokenizer(datasets: Mapping[str, TokenDataset]) -> Tokenizer:
    """The tokenizer of all datasets; where some have values beside text, others may have the same text alone.

    Raises:
        UserError: two datasets have different tokenizers.
    """
    first = next(iter(datasets))
    tokenizers = [dataset.tokenizer for dataset in datasets.values()]
    chosen = next((one for one in tokenizers if isinstance(one, ModalityTokenizer)), tokenizers[0])
    text = chosen.text if isinstance(chosen, ModalityTokenizer) else chosen
    allowed = {chosen.to_json(), text.to_json()}
    for name, dataset in datasets.items():
        if dataset.tokenizer.to_json() not in allowed:
            raise UserError(
                f"the sources {first} and {name} have different tokenizers; allowed: one for all, such as byte, or the "
                "tokenizer.json of one dataset given to the others as tokenizer_file"
            )
    return chosen


def common_columns(datasets: Mapping[str, TokenDataset]) -> dict[str, Column]:
    """The columns of all datasets. Inputs that some lack are added to these as zeros.

    Raises:
        UserError: two datasets have different columns otherwise.
    """
    everything = {name: column for one in datasets.values() for name, column in one.columns.items()}
    inputs = {name: column for name, column in everything.items() if column.role == "input"}
    first = next(iter(datasets))
    for name, dataset in datasets.items():
        for added in inputs.keys() - dataset.columns.keys():
            dataset.columns = {**dataset.columns, added: inputs[added]}
            for split in dataset.splits.values():
                split.add_column(added, inputs[added])
        if dataset.columns != datasets[first].columns:
            raise UserError(
                f"the sources {first} and {name} have different columns, {_words(datasets[first].columns)} and "
                f"{_words(dataset.columns)}; allowed: the same for all"
            )
    return datasets[first].columns


def _words(columns: Mapping[str, Column]) -> str:
    return ", ".join(f"{name} ({column.dtype}, {column.role})" for name, column in columns.items()) or "none"
