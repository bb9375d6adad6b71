"""Strangers' files: each row changes one kind of file, and gives it to every command that reads it."""

from pathlib import Path

from tests.faults import fault
from tests.faults._strangers import changed, harmless

GENERATE = "--max-new-tokens 3 --device cpu"
EXPORT = "--out out --force"
ROWS: dict[str, tuple[str, list[str]]] = {
    "a checkpoint's configuration": (
        "sums/checkpoints/val*/config.json",
        [f"sample sums {GENERATE}", "evaluate sums", f"export sums {EXPORT}"],
    ),
    "a Llama's configuration": (
        "tale/checkpoints/val*/config.json",
        [f"sample tale {GENERATE}", f"export tale {EXPORT}", "export tale --format gguf --out out.gguf"],
    ),
    "a checkpoint's manifest": ("sums/checkpoints/val*/manifest.json", [f"sample sums {GENERATE}"]),
    "the list of checkpoints": ("sums/checkpoints/index.json", [f"sample sums {GENERATE}", "evaluate sums"]),
    "a checkpoint's weights": (
        "sums/checkpoints/val*/model.safetensors",
        [f"sample sums {GENERATE}", "evaluate sums", f"export sums {EXPORT}"],
    ),
    "a tokenizer of ours": (
        "sums/checkpoints/val*/tokenizer.json",
        [f"sample sums {GENERATE}", f"export sums {EXPORT}"],
    ),
    "a tokenizer of tokenizers": (
        "tale/checkpoints/val*/tokenizer.json",
        [f"sample tale --prompt once {GENERATE}", f"export tale {EXPORT}", "export tale --format gguf --out out.gguf"],
    ),
    "a checkpoint's chat template": (
        "talk/checkpoints/val*/chat_template.json",
        [f"chat talk --message hi {GENERATE}", f"export talk {EXPORT}"],
    ),
    "Hugging Face's config.json, GPT-2": ("hf-sums/config.json", [f"sample hf:hf-sums {GENERATE}"]),
    "Hugging Face's config.json, Llama": ("hf-tale/config.json", [f"sample hf:hf-tale {GENERATE}"]),
    "Hugging Face's tokenizer.json": ("hf-tale/tokenizer.json", [f"sample hf:hf-tale --prompt once {GENERATE}"]),
    "Hugging Face's tokenizer.json, of characters": ("hf-sums/tokenizer.json", [f"sample hf:hf-sums {GENERATE}"]),
    "Hugging Face's tokenizer_config.json": (
        "hf-talk/tokenizer_config.json",
        [f"chat hf:hf-talk --message hi {GENERATE}"],
    ),
    "Hugging Face's chat template": ("hf-talk/chat_template.jinja", [f"chat hf:hf-talk --message hi {GENERATE}"]),
    "Hugging Face's weights": ("hf-tale/model.safetensors", [f"sample hf:hf-tale {GENERATE}"]),
    "a run's experiment.json": (
        "sums/experiment.json",
        ["evaluate sums", "report sums", "resume sums --training.macro-batches 3"],
    ),
    "a run's environment.json": ("sums/environment.json", ["report sums", "train sums/experiment.py --run-dir again"]),
    "metrics.jsonl": ("sums/metrics.jsonl", ["report sums", "resume sums --training.macro-batches 3"]),
    "samples.jsonl": ("sums/samples.jsonl", ["report sums", "resume sums --training.macro-batches 3"]),
    "evaluation.json": ("sums/evaluation.json", ["report sums"]),
    "a dataset's description": (
        "data/text*/dataset.json",
        ["evaluate tale", "train tale.py --run-dir again", "plan tale.py"],
    ),
    "a dataset's tokens": ("data/text*/train_00000.bin", ["train tale.py --run-dir again"]),
    "a dataset's tokenizer": ("data/text*/tokenizer.json", ["train tale.py --run-dir again"]),
    "a snapshot's state": ("sums/snapshots/mb000002/state.json", ["resume sums --training.macro-batches 3"]),
    "a snapshot's index": ("sums/snapshots/mb000002/index.json", ["resume sums --training.macro-batches 3"]),
    "a snapshot's manifest": ("sums/snapshots/mb000002/manifest.json", ["resume sums --training.macro-batches 3"]),
    "a snapshot's tensors": ("sums/snapshots/mb000002/shard*", ["resume sums --training.macro-batches 3"]),
    "conversations": ("chat.jsonl", ["prepare chat --files chat.jsonl --pack 32 --folder new"]),
    "a text": ("tale.txt", ["prepare text --files tale.txt --folder new", "prepare text --files . --folder newer"]),
    "a text in Parquet": ("tale.parquet", ["prepare text --files tale.parquet --folder new"]),
    "a text in .jsonl.gz": ("tale.jsonl.gz", ["prepare text --files tale.jsonl.gz --folder new"]),
    "a text in .jsonl.zst": ("tale.jsonl.zst", ["prepare text --files tale.jsonl.zst --folder new"]),
    "a chat template of one's own": (
        "chat.jinja",
        ["prepare chat --files chat.jsonl --pack 32 --chat-template chat.jinja --folder new"],
    ),
}
"""Of each row: the file that is changed, and the commands that read it."""


SHORT = (
    "a checkpoint's weights",
    "a tokenizer of tokenizers",
    "Hugging Face's chat template",
    "a run's experiment.json",
    "metrics.jsonl",
    "a dataset's description",
    "a snapshot's index",
    "conversations",
)
"""Rows that the default suite tries; the long form tries all."""


def register(name: str, pattern: str, commands: list[str]) -> None:
    """Makes a row of the table."""

    @fault(f"a stranger changed {name}", short=int(name in SHORT), long=25)
    def trial(seed: int, folder: Path) -> None:
        said = changed(pattern, seed, folder)
        for command in commands:
            harmless(folder, said, *command.split())


for _name, (_pattern, _commands) in ROWS.items():
    register(_name, _pattern, _commands)
