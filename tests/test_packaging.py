"""What is distributed: its name, versions and addresses agree, and its page on the package index is whole."""

import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from cleangpt import __version__
from cleangpt.errors import UserError, require

PROJECT = Path(__file__).parents[1]
METADATA: dict[str, Any] = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TEXTS = [
    path
    for folder in ("cleangpt", "docs", "experiments", "benchmarks")
    for path in (PROJECT / folder).rglob("*")
    if path.suffix in (".py", ".md")
]
TEXTS += PROJECT.glob("*.md")


def test_the_version_is_the_same_everywhere() -> None:
    citation = re.search(r"^version: (.*)$", (PROJECT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    changes = re.search(r"^## \[(.*?)\]", (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert citation and changes
    assert {METADATA["version"], citation[1], changes[1]} == {__version__}


def test_nothing_tells_anybody_to_install_the_other_project_of_this_name() -> None:
    """The distribution is cleangpt-lm; cleangpt on the package index is somebody else's."""
    assert METADATA["name"] == "cleangpt-lm"
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"pip install ['\"]?cleangpt(?!-lm)|cleangpt\[", text), path
    for name, packages in METADATA["optional-dependencies"].items():
        assert not [package for package in packages if package.startswith("cleangpt[")], name


@pytest.mark.parametrize(
    "package", ["tokenizers", "pyarrow", "zstandard", "huggingface_hub", "wandb", "jinja2", "gguf"]
)
def test_a_missing_package_is_named_itself(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(UserError) as caught:
        require(package)
    assert str(caught.value) == f"this needs the package {package}, which is not installed: pip install {package}"
    declared = {re.split(r"[>=<]", entry)[0] for extra in METADATA["optional-dependencies"].values() for entry in extra}
    assert package in declared, "what is named is what is tested"


def test_every_python_that_is_promised_is_declared() -> None:
    versions = [name.rpartition(" ")[2] for name in METADATA["classifiers"] if " :: 3." in name]
    assert versions == ["3.11", "3.12", "3.13", "3.14"] and METADATA["requires-python"] == ">=3.11"
    for name in ("README.md", "README_zh.md", "CONTRIBUTING.md"):
        assert re.search(r"Python 3\.11 (to|至) 3\.14", (PROJECT / name).read_text(encoding="utf-8")), name


def test_the_metadata_is_whole() -> None:
    assert METADATA["authors"] and METADATA["description"] and METADATA["keywords"] and METADATA["license"]
    assert {"Repository", "Documentation", "Changelog", "Issues"} <= METADATA["urls"].keys()
    assert all(address.startswith(METADATA["urls"]["Repository"]) for address in METADATA["urls"].values())


def test_the_page_of_the_index_has_no_relative_link_or_picture() -> None:
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("hatch_build", PROJECT / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    metadata = {"urls": {"Repository": "https://host.example/here"}, "version": "1.2"}
    module.ReadmeHook(str(PROJECT), {}).update(metadata)
    page: Any = metadata["readme"]
    assert page["content-type"] == "text/markdown"
    links = re.findall(r"!?\[[^]]*\]\(([^)]+)\)", page["text"])
    assert len(links) > 20 and all(re.match(r"https?://|#", link) for link in links)
    assert "](https://host.example/here/raw/v1.2/docs/images/report.png)" in page["text"]
    assert "](https://host.example/here/blob/v1.2/docs/own_data.md#conversations)" in page["text"]
