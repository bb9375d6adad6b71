"""Files as a stranger might have made them: those of runs trained here, each changed in one place."""

import atexit
import gzip
import hashlib
import json
import os
import random
import resource
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow
import zstandard
from pyarrow import parquet

from tests.faults._runs import finish, output, run, start

EXPERIMENT = """
from cleangpt.config import *
from cleangpt.experiment import Experiment
from cleangpt.corpora.{module} import {corpus}
from cleangpt.models.{architecture} import {model}

experiment = Experiment(
    name="{name}",
    corpus={corpus}({corpus_fields}),
    data=DataConfig(seq_len={seq_len}, batch_size=16),
    model={model}(max_seq_len={seq_len}, n_layers=1, n_heads=2, dim=16{model_fields}),
    optimizer=OptimizerConfig(lr=1e-2),
    training=TrainingConfig(macro_batches=2, batches_per_macro_batch=2, device="cpu", threads=1),
    saving=SavingConfig(keep_best=1),
    tracking=TrackingConfig(progress=False, sample_tokens=2, score_samples=2),
)
"""
RUNS: dict[str, dict[str, Any]] = {
    "sums": {
        "module": "adder", "corpus": "Adder", "seq_len": 6,
        "corpus_fields": "digits=1, train_samples=40, val_samples=16, test_samples=8",
        "architecture": "gpt", "model": "GPTConfig", "model_fields": "",
    },
    "talk": {
        "module": "conversations", "corpus": "Chat", "seq_len": 32, "architecture": "llama", "model": "LlamaConfig",
        "corpus_fields": "files=('chat.jsonl',), pack=32, val_fraction=0.3, chat_template='chat.jinja'",
        "model_fields": ", hidden_dim=32",
    },
    "tale": {
        "module": "text", "corpus": "Text", "seq_len": 16, "architecture": "llama", "model": "LlamaConfig",
        "corpus_fields": "files=('tale.txt',), tokenizer='bpe', vocab_size=300", "model_fields": ", hidden_dim=32",
    },
}  # fmt: skip
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
"""Not the plain one of the package, so that it runs in a process of its own."""

VALUES: list[Any] = [
    *(None, True, -1, 0, 3, 0.5, 2**31, 10**18, 10**400, -(10**30), 1e308, 1e-320, float("nan"), float("inf")),
    *("", "x", "nan", "../../x", "/etc/passwd", "\ud800", "\0", "\x1b[2J", "x" * 10_000),
    *([], {}, [[]], [1, 2, 3], {"a": 1}),
]
MEMORY = 12 * 2**30
"""Bytes of address space that a command may take; PyTorch itself reserves a part of that."""
SECONDS = 60
"""Of the processor that a command may take; the clock may show five times as much on a busy machine."""


@cache
def runs() -> Path:
    """A folder with a trained run of each kind, its exported model and its corpus; made once."""
    folder = Path(tempfile.mkdtemp(prefix="strangers_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    talks = [{"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}!"}]}
             for n in range(30)]  # fmt: skip
    (folder / "chat.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    (folder / "chat.jinja").write_text(TEMPLATE)
    tale = "once upon a time there was a fox who lived in a wood\n"
    (folder / "tale.txt").write_text(tale * 60)
    tales = "".join(json.dumps({"text": f"{number} {tale}"}) + "\n" for number in range(60)).encode()
    (folder / "tale.jsonl.gz").write_bytes(gzip.compress(tales))
    (folder / "tale.jsonl.zst").write_bytes(zstandard.compress(tales))
    parquet.write_table(pyarrow.table({"text": [f"{number} {tale}" for number in range(60)]}), folder / "tale.parquet")
    for name, fields in RUNS.items():
        (folder / f"{name}.py").write_text(EXPERIMENT.format(name=name, **fields))
        for words in (f"train {name}.py --run-dir {name}", f"export {name} --out hf-{name}", f"evaluate {name}"):
            assert run(folder, *words.split()) == 0, output(folder)
    (folder / "output.txt").unlink()
    return folder


def changed(pattern: str, seed: int, folder: Path) -> str:
    """Copies `runs` to `folder` and changes the file that `pattern` names; says how."""
    shutil.copytree(runs(), folder, dirs_exist_ok=True)
    path, chance = sorted(folder.glob(pattern))[-1], random.Random(f"{pattern} {seed}")
    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl") and chance.random() < 0.7:
        said, content = _change_json(content, chance, lines=path.suffix == ".jsonl")
    elif chance.random() < 0.9:
        said, content = change_bytes(content, chance)
    else:
        return _change_kind(path, chance)
    path.write_bytes(content)
    if path.name != "manifest.json":
        reseal(path.parent)
    return said


def reseal(folder: Path) -> None:
    """Makes the manifest of a folder fit its files, as a stranger would."""
    if (folder / "manifest.json").is_file():
        files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != "manifest.json"]
        entries = {path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
                   for path in files}  # fmt: skip
        (folder / "manifest.json").write_text(json.dumps(entries))


def harmless(folder: Path, said: str, *words: str) -> None:
    """Asserts that a command ends with exit code 0, or in one line that says why not, in bounded time and memory."""
    (folder / "output.txt").unlink(missing_ok=True)
    code = finish(start(folder, *words, hook=partial(_limit, MEMORY, SECONDS)), seconds=5 * SECONDS)
    lines = output(folder).strip().splitlines()
    told = [line for line in lines if line.startswith(("error: ", "stopped: "))]
    where = f"{' '.join(words)}, after {said}: exit code {code}: " + "\n".join(lines[-30:])[-3000:]
    assert code == 0 or (code in (1, 2) and len(told) == 1 and lines[-1] == told[0]), where
    assert "Traceback" not in "\n".join(lines), where


def _limit(memory: int, seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    os.environ["RUST_BACKTRACE"] = "0"


def _change_json(content: bytes, chance: random.Random, lines: bool) -> tuple[str, bytes]:
    """One value of a JSON text is another, gone, or there twice; or one line of a text of several is changed so."""
    if lines:
        rows = content.splitlines(keepends=True)
        place = chance.randrange(len(rows))
        said, row = _change_json(rows[place], chance, lines=False)
        return f"line {place}: {said}", b"".join([*rows[:place], row + b"\n", *rows[place + 1 :]])
    tree = json.loads(content)
    path, value = chance.choice(list(_places(tree))), chance.choice(VALUES)
    if not path:
        return f"all is {value!r:.80}", json.dumps(value).encode()
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    kind = chance.random()
    if kind < 0.2:
        del parent[path[-1]]
        return f"{path} is gone", json.dumps(tree).encode()
    if kind < 0.3 and isinstance(parent, dict):
        # json.dumps writes no key twice: the second has another first letter, which is then put right.
        parent[f"\x01{path[-1]}"] = value
        return f"{path} is there twice", json.dumps(tree).encode().replace(b"\\u0001", b"")
    parent[path[-1]] = value
    return f"{path} is {value!r:.80}", json.dumps(tree).encode()


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, but of the entries of a long list the first and last few."""
    yield path
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _places(value, (*path, key))
    elif isinstance(tree, list):
        for index in sorted({*range(min(len(tree), 3)), *range(max(len(tree) - 2, 0), len(tree))}):
            yield from _places(tree[index], (*path, index))


def change_bytes(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """How some bytes were changed in one place, and what they are now."""
    at = chance.randrange(len(content))
    near = chance.randrange(min(16, len(content)))
    flipped = bytes([content[at] ^ 1 << chance.randrange(8)])
    return chance.choice(
        [
            ("cut short", content[:at]),
            ("emptied", b""),
            ("a flipped bit", content[:at] + flipped + content[at + 1 :]),
            ("bytes that are no text", content[:at] + b"\xff\xfe\0" + content[at:]),
            ("deep nesting", b"[" * 200_000),
            ("some bytes gone", content[:at] + content[at + chance.randrange(1, 9) :]),
            ("another head", content[:near] + bytes([chance.randrange(256)]) + content[near + 1 :]),
            ("huge numbers", b"9" * 100_000),
        ]
    )


def _change_kind(path: Path, chance: random.Random) -> str:
    """The file is something else."""
    path.unlink()
    kind = chance.choice(["a folder", "a link to itself", "a link to a device", "a pipe", "a link to nothing", "gone"])
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind != "gone":
        path.symlink_to({"a link to itself": path.name, "a link to a device": "/dev/zero"}.get(kind, "nothing"))
    return f"{path.name} is {kind}"
