"""``hf:NAME_OR_FOLDER``: a local folder in Hugging Face's format, or a model to download from the Hub."""

from pathlib import Path

from cleangpt.errors import UserError, require
from cleangpt.files import user_path

PREFIX = "hf:"


FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json", "vocab.json",
         "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
         "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json")  # fmt: skip
"""The only files that are downloaded. All are data; the chat template is rendered in a sandbox."""


def is_huggingface(text: str) -> bool:
    """Whether `text` refers to a Hugging Face model."""
    return text.startswith(PREFIX)


def local_path(text: str) -> Path:
    """The local path of a file or folder, or of a Hugging Face model ``hf:...``; see `fetch`."""
    return fetch(text) if is_huggingface(text) else user_path(text)


def is_local(text: str) -> bool:
    """Whether ``hf:...`` is a folder here."""
    name = text.removeprefix(PREFIX)
    return bool(name) and user_path(name).is_dir()


def path_offline(text: str) -> Path | None:
    """`local_path` without a network; None: a model that is not in the cache."""
    name = text.removeprefix(PREFIX)
    if not is_huggingface(text) or is_local(text):
        return user_path(name)
    try:
        library = require("huggingface_hub")
        return Path(library.snapshot_download(name, allow_patterns=list(FILES), local_files_only=True))
    except Exception:  # it passes through errors of several packages
        return None


def fetch(text: str) -> Path:
    """The local folder of ``hf:...``; a model is downloaded once, and then cached by `huggingface_hub`.

    Raises:
        UserError: there is no such folder, or the download failed; explains how to provide the files offline.
    """
    name = text.removeprefix(PREFIX)
    if is_local(text):
        return user_path(name)
    if not name or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"{text}: {name!r} is not a folder; allowed: hf:FOLDER, hf:NAME or hf:OWNER/NAME")
    library = require("huggingface_hub")
    try:
        return Path(library.snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # huggingface_hub passes through errors of several network packages
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"cannot download {name!r} from Hugging Face ({reason[0]}); without a network, put its config.json, "
            f"model.safetensors and tokenizer.json into a folder and give hf:FOLDER"
        ) from None
