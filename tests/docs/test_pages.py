"""What the documents name is there: links, fields, options, figures, experiments, commands, extras."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from cleangpt.commands import COMMANDS, main
from cleangpt.corpora import CORPORA
from cleangpt.corpora.conversations import Chat
from cleangpt.corpora.mixture import Mixture
from cleangpt.corpora.text import Text
from cleangpt.experiment_files import experiments, load_experiment
from cleangpt.models import build_model
from cleangpt.tracking.metrics import METRICS, STEP_METRICS
from cleangpt.training.launch import resolve

PROJECT = Path(__file__).parents[2]
DOCUMENTS = [PROJECT / name for name in ("README.md", "README_zh.md", "CONTRIBUTING.md", "CHANGELOG.md")]
DOCUMENTS += sorted((PROJECT / "docs").glob("*.md"))
SECTIONS = "corpus|data|model|rollouts|optimizer|schedule|training|parallel|fine_tuning|early_stopping|saving|tracking"
VOCABULARY = {
    "Adder": 13, "AdderChat": 257, "Demonstrations": 257, "FableOpenings": 509, "FablePreferences": 509, "Fables": 257,
    "Multiplier": 13, "ShakespeareChar": 65, "Stdlib": 257, "TinyStories": 4096,
    "Digits": 17, "ShapesCaptions": 363, "ShapesVQA": 363, "RenderedWords": 28,
}  # fmt: skip

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)


def read(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def prose(document: Path) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", read(document), flags=re.DOTALL | re.MULTILINE)


def inline_code(document: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(document))


def headings(document: Path) -> list[tuple[int, str]]:
    """Level and text."""
    return [(len(marks), text) for marks, text in re.findall(r"^(#+) (.+)$", prose(document), re.MULTILINE)]


def anchor(heading: str) -> str:
    """The fragment by which a heading is linked to."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def first_column(document: Path, head: str) -> set[str]:
    """The first cells of the table whose first column is called `head`."""
    (table,) = re.findall(rf"^\| {head} \|.*\n\|[-:| ]+\|\n((?:\|.*\n)+)", prose(document), re.MULTILINE)
    return {row.split("|")[1].strip().strip("`") for row in table.splitlines()}


def help_of(*words: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main([*words, "--help", "all"]) == 0
    return said.getvalue()


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Every option of every command; of a flag, the name without ``no-`` as well."""
    texts = [help_of("train", name) for name in experiments()]
    texts += [help_of("prepare", name) for name in CORPORA]
    texts += [help_of(command, "adder") for command in ("tune", "plan")]
    texts += [help_of(command) for command in ("evaluate", "sample", "chat", "report", "export")]
    return set(re.findall(r"--[a-z][\w.-]*", " ".join(texts))) | {"--help"}


# Both languages ------------------------------------------------------------------------------------------------------


def test_the_chinese_readme_has_the_sections_of_the_english_one() -> None:
    english, chinese = headings(PROJECT / "README.md"), headings(PROJECT / "README_zh.md")
    assert [level for level, _ in chinese] == [level for level, _ in english]


def test_the_chinese_readme_has_the_code_of_the_english_one() -> None:
    fenced = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
    assert fenced.findall(read(PROJECT / "README_zh.md")) == fenced.findall(read(PROJECT / "README.md"))


def test_the_chinese_readme_has_the_links_and_the_figures_of_the_english_one() -> None:
    link, number = re.compile(r"\]\((?!README)([^)]+)\)"), re.compile(r"\| ([\d,]+) \| ([\d.]+) M \|")
    english, chinese = read(PROJECT / "README.md"), read(PROJECT / "README_zh.md")
    assert sorted(link.findall(chinese)) == sorted(link.findall(english))
    assert number.findall(chinese) == number.findall(english) != []


# What is named -------------------------------------------------------------------------------------------------------


@each_document
def test_every_link_and_picture_leads_to_something(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if target.startswith("http"):
            continue
        path, _, fragment = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.exists(), f"{document.name}: {target}"
        if fragment:
            assert fragment in {anchor(text) for _, text in headings(linked)}, f"{document.name}: {target}"


@each_document
def test_every_file_of_the_project_that_is_named_exists(document: Path) -> None:
    named = [
        code for code in inline_code(document) if re.fullmatch(r"(cleangpt|tests|experiments|benchmarks)/[\w./]*", code)
    ]
    for name in named:
        assert (PROJECT / name).exists(), f"{document.name}: {name}"


@each_document
def test_every_field_that_is_named_exists(document: Path, options: set[str]) -> None:
    for code in inline_code(document):
        if re.fullmatch(rf"({SECTIONS})(\.[a-z_]+)+", code) and not code.endswith(".safetensors"):
            option = "--" + code.replace("_", "-")
            assert option in options or any(known.startswith(option + ".") for known in options), code


@each_document
def test_every_option_that_is_named_in_the_text_exists(document: Path, options: set[str]) -> None:
    known = options | {re.sub(r"(--|\.)no-", r"\1", option) for option in options} | {"--append"}
    for option in re.findall(r"(?<!\S)--[a-z][\w.-]*", "\n".join(inline_code(document))):
        assert option in known, f"{document.name}: {option}"


@each_document
def test_every_extra_that_is_named_is_defined(document: Path) -> None:
    defined = set(re.findall(r"^(\w+) = \[", read(PROJECT / "pyproject.toml"), re.MULTILINE))
    for names in re.findall(r"(?:cleangpt|'\.)\[([\w,]+)\]", read(document)):
        assert set(names.split(",")) <= defined, f"{document.name}: {names}"


# Tables --------------------------------------------------------------------------------------------------------------


def test_the_commands_are_all_explained() -> None:
    explained = [text for level, text in headings(PROJECT / "docs" / "cli.md") if level == 2]
    assert explained == list(COMMANDS)


@pytest.mark.parametrize(
    ("document", "head"), [("README.md", "experiment"), ("README_zh.md", "实验"), ("docs/experiments.md", "experiment")]
)
def test_the_experiments_are_all_listed(document: str, head: str) -> None:
    text = read(PROJECT / document).split("\n## Measured")[0]
    rows = re.findall(r"^\| `(\w+)` \|", text[text.index(f"| {head} |") :], re.MULTILINE)
    assert sorted(rows) == sorted(experiments())


@pytest.mark.default(6)
@pytest.mark.parametrize("name", sorted(experiments()))
def test_an_experiment_is_as_large_and_as_long_as_the_documents_say(name: str) -> None:
    experiment = load_experiment(experiments()[name])
    corpus = experiment.corpus.sources[0].corpus if isinstance(experiment.corpus, Mixture) else experiment.corpus
    vocab_size = getattr(corpus, "vocab_size", None) if getattr(corpus, "tokenizer", "") == "bpe" else None
    resolved = resolve(experiment, vocab_size or VOCABULARY[type(corpus).__name__])
    parameters = sum(parameter.numel() for parameter in build_model(resolved.model).parameters())
    training, data = experiment.training, experiment.data
    tokens = training.macro_batches * training.batches_per_macro_batch * data.batch_size * data.seq_len
    millions = f"{tokens / 1e6:.1f} M" if tokens < 1e8 else f"{tokens / 1e6:.0f} M"
    for document in ("README.md", "docs/experiments.md"):
        (row,) = re.findall(rf"^\| `{name}` \|.* M \|$", read(PROJECT / document), re.MULTILINE)
        assert f" {parameters:,} " in row and f" {millions} |" in row, f"{document}: {parameters:,}, {millions}"


def test_the_steps_of_the_experiments_are_those_of_the_documents() -> None:
    from cleangpt.training.resolve import curves

    for name, path in experiments().items():
        (row,) = re.findall(rf"^\| `{name}` \|.* M \|$", read(PROJECT / "docs/experiments.md"), re.MULTILINE)
        assert f"| {len(curves(load_experiment(path))[0]):,} |" in row


def test_the_metrics_of_a_run_are_all_explained_with_their_units() -> None:
    text = read(PROJECT / "docs/file_formats.md")
    for heading, metrics in (("metrics.jsonl", METRICS), ("steps.jsonl", STEP_METRICS)):
        section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        rows = re.findall(r"^\| `(\w+)` \| ([\w/]*) ?\| (.*) \| `(.*)` \|$", section, re.MULTILINE)
        assert {key: tuple(row) for key, *row in rows} == {
            key: (metric.unit, metric.meaning, metric.tag) for key, metric in metrics.items()
        }


def test_the_tokenizers_of_the_corpus_text_are_all_explained() -> None:
    assert first_column(PROJECT / "docs" / "own_data.md", "tokenizer") == {"char", "byte", "bpe"}
    for corpus in (Text, Chat):
        assert set(corpus.__dataclass_fields__["tokenizer"].type.__args__) == {"char", "byte", "bpe"}  # type: ignore[union-attr]
