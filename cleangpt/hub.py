"""``hf:NAME_OR_FOLDER``: a local folder in Hugging Face's layout, or a model's name there, which is downloaded."""

from pathlib import Path

from cleangpt.errors import UserError, require

PREFIX = "hf:"


FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json", "vocab.json",
         "merges.txt", "tokenizer_config.json", "chat_template.jinja")  # fmt: skip
"""All that is ever downloaded; each of them is data, and the chat template among it runs in a sandbox."""


def is_huggingface(text: str) -> bool:
    """Whether a user means a model of Hugging Face."""
    return text.startswith(PREFIX)


def local_path(text: str) -> Path:
    """The file or folder that a user means, which ``hf:...`` means too; see `fetch`."""
    return fetch(text) if is_huggingface(text) else Path(text).expanduser()


def fetch(text: str) -> Path:
    """The local folder of the model that ``hf:...`` means; a name is downloaded once, and then kept by the library.

    Raises:
        UserError: there is no such folder, or the model cannot be downloaded; says which files to put where.
    """
    name = text.removeprefix(PREFIX)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    if not name or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"{text}: {name!r} is not a folder; allowed: hf:FOLDER, hf:NAME or hf:OWNER/NAME")
    library = require("huggingface_hub", "hub")
    try:
        return Path(library.snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # the library lets errors of several network packages through
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"cannot download {name!r} from Hugging Face ({reason[0]}); without a network, put its config.json, "
            f"model.safetensors and tokenizer.json into a folder and give hf:FOLDER"
        ) from None
