"""The report of one run, or a comparison of several: one self-contained HTML file, readable offline."""

import base64
import html
import json
import re
import statistics
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cleangpt.errors import UserError, parsing
from cleangpt.files import read_json, write_text
from cleangpt.tracking import plots
from cleangpt.tracking.metrics import (
    METRICS,
    METRICS_FILE,
    STEP_METRICS,
    UNKNOWN,
    label,
    read_metrics,
    read_samples,
    read_steps,
    restored,
    scores,
    show,
)
from cleangpt.validation import flatten

NEWEST_SAMPLES, LONGEST_SAMPLE = 12, 4000
"""Number of sampled texts shown, and characters of each; samples.jsonl has all."""

CAPTION = (
    "<p>Of a long run, the curves by step show the mean of neighboring steps, and a band around the middle "
    f"{100 * (plots.SPREAD[1] - plots.SPREAD[0]):.0f} % of them.</p>"
)
FILES = ("experiment", "environment", "stores", "evaluation", "against", "best_of_n")
"""JSON files of a run that are shown, in the order of the fields of `Run`."""
BY_STEP = {"train_loss": "loss", "training_batch_size": "batch_size"}
"""Keys of metrics.jsonl that have other names in steps.jsonl."""


@dataclass
class Run:
    """The contents of a run's folder; `name` is unique in a report."""

    folder: Path
    name: str
    rows: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    experiment: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    evaluation: dict[str, Any]
    against: dict[str, Any]
    """Its comparison with another model."""
    best_of_n: dict[str, Any]
    """By judge: the scores of the best of n answers."""


def write_report(runs: list[Path], out: Path | None = None) -> Path:
    """Writes the report of `runs`, and its plots as PNG files to the folder `plots` next to it.

    Args:
        runs: folders of one or more runs; several are compared.
        out: folder for the report; None: the first run's. A comparison is called comparison.html there, and its plots
            comparison_….png, so that the run keeps its own report.

    Returns:
        The path of the HTML file.

    Raises:
        UserError: a folder is not a run, or has no metrics yet.
    """
    loaded = _load(list(dict.fromkeys(runs)))
    folder = out or runs[0]
    kind = "comparison" if len(loaded) > 1 and out is None else "report"
    prefix = "comparison_" if kind == "comparison" else ""
    images = _draw(loaded, folder / "plots", prefix)
    path = folder / f"{kind}.html"
    write_text(path, _page(loaded, images))
    return path


def _draw(runs: Sequence[Run], folder: Path, prefix: str) -> dict[str, Path]:
    """Draws every plot that has data; returns the images by title."""
    rows, steps = {run.name: run.rows for run in runs}, {run.name: _by_step(run) for run in runs}
    judged = {judge: curve for run in runs for judge, curve in run.best_of_n.items()}
    drawn = {
        "Loss": plots.loss_plot(rows, steps, folder / f"{prefix}loss.png"),
        "Validation loss by source": plots.source_plot(rows, folder / f"{prefix}sources.png"),
        "Scores": plots.score_plot(rows, folder / f"{prefix}scores.png"),
        "Rollouts": plots.rollout_plot(rows, folder / f"{prefix}rollouts.png"),
        "Reward against KL": plots.reward_plot(rows, folder / f"{prefix}reward.png"),
        "Metrics of the objective": plots.objective_plot(rows, steps, folder / f"{prefix}objective.png"),
        "Best of n": plots.best_of_n_plot(judged, folder / f"{prefix}best_of_n.png"),
        "Schedules": plots.schedule_plot(rows, steps, folder / f"{prefix}schedules.png"),
        "Throughput": plots.throughput_plot(rows, steps, folder / f"{prefix}throughput.png"),
        "Gradient norm": plots.gradient_plot(steps, folder / f"{prefix}gradient.png"),
    }
    return {title: path for title, path in drawn.items() if path is not None} | _pictures(runs)


def _pictures(runs: Sequence[Run]) -> dict[str, Path]:
    """What `evaluate` has drawn, of pairs and of agents that act in simulations, by title."""
    found = {}
    for run in runs:
        of = f" of {run.name}" if len(runs) > 1 else ""
        found[f"Margins{of}"] = run.folder / "plots" / "margins.png"
        found[f"Tasks at each share of their expert{of}"] = run.folder / "plots" / "tasks.png"
        found[f"Episodes{of}"] = run.folder / "videos" / "contact_sheet.png"
    return {title: path for title, path in found.items() if path.is_file()}


def _by_step(run: Run) -> list[dict[str, Any]]:
    """The metrics by step; for a run without steps.jsonl, those by macro-batch, renamed."""
    if run.steps:
        return run.steps
    rows = [{BY_STEP.get(name, name): value for name, value in row.items()} for row in run.rows]
    return [{name: value for name, value in row.items() if name in STEP_METRICS} for row in rows]


def _load(folders: Sequence[Path]) -> list[Run]:
    runs = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a run folder; cleangpt train makes one")
        rows = read_metrics(folder)
        if not rows:
            raise UserError(f"{folder} has no metrics yet ({METRICS_FILE}); they begin after the first macro-batch")
        texts = [_object(folder / f"{part}.json") for part in FILES]
        with parsing(folder / "evaluation.json"):
            texts[FILES.index("evaluation")] = restored(texts[FILES.index("evaluation")])
        name = str(texts[0].get("name", folder.resolve().name))
        runs.append(Run(folder, name, rows, read_steps(folder), read_samples(folder), *texts))
    for part in ("name", "parent"):
        names = [run.name for run in runs]
        for run in runs:
            run.name += f" {getattr(run.folder.resolve(), part)}" if names.count(run.name) > 1 else ""
    return runs


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the run; empty if there is none."""
    value = read_json(path) if path.exists() else {}
    return value if isinstance(value, dict) else {}


# Contents of the page -------------------------------------------------------------------------------------------------


def _page(runs: list[Run], images: Mapping[str, Path]) -> str:
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    parts = [f"<h1>{_text(title)}</h1>", _lead(runs), _summary_table(runs)]
    if len(runs) > 1:
        parts.append(_section("Differences", _experiment_table(runs, only_differences=True)))
    parts.append(_section("Curves", "\n".join([CAPTION, *(_image(name, path) for name, path in images.items())])))
    if evaluated := [run for run in runs if run.evaluation]:
        parts.append(_section("Evaluation", _facts_table(evaluated, [run.evaluation for run in evaluated], _metric)))
    if compared := [run for run in runs if run.against]:
        facts = [{name: value for name, value in run.against.items() if name != "examples"} for run in compared]
        parts.append(_section("Win rate", _facts_table(compared, facts, _metric)))
        parts += [_side_by_side(run) for run in compared if run.against.get("examples")]
    parts += [_samples(run, len(runs) > 1) for run in runs if run.samples]
    parts.append(_folded("Experiment", _experiment_table(runs)))
    if any(run.environment for run in runs):
        parts.append(_folded("Environment", _facts_table(runs, [flatten(run.environment) for run in runs], _plain)))
    parts.append(_folded("Glossary of metrics", _glossary(runs)))
    return PAGE.format(title=_text(title), style=STYLE, body="\n".join(parts))


def _lead(runs: list[Run]) -> str:
    """The most important result in one sentence."""
    rated = [(run, lowest) for run in runs if (lowest := plots.best(run.rows)) is not None]
    if not rated:
        return _lead_by_score(runs)
    if len({_validation_data(run) for run in runs} - {""}) > 1:
        return "<p class=lead>These runs were validated on different data: their losses cannot be compared.</p>"
    run, lowest = min(rated, key=lambda pair: float(pair[1]["val_loss"]))
    of = "" if len(runs) == 1 else f", by <b>{_text(run.name)}</b>"
    return (
        f"<p class=lead>Best validation loss <b>{show('val_loss', lowest['val_loss'])}</b>{_per(run)} "
        f"at macro-batch {show('macro_batch', lowest.get('macro_batch'))}{of}.</p>"
    )


def _validation_data(run: Run) -> str:
    """What a run was validated on: the checksums of its validation splits and tokenizers; empty if unknown."""
    with parsing(run.folder / "stores.json"):
        kept = [
            {file: digest for file, digest in entry["sha256"].items() if file.startswith(("val_", "tokenizer"))}
            for entry in run.data.values()
        ]
    return json.dumps(kept, sort_keys=True) if kept else ""


def _lead_by_score(runs: list[Run]) -> str:
    """The same for runs without a validation loss: the last task score of the first."""
    for run in runs:
        if names := scores(run.rows[-1]):
            words = f"{_text(label(names[0]).capitalize())} <b>{_text(show(names[0], run.rows[-1][names[0]]))}</b>"
            return f"<p class=lead>{words} after the last macro-batch of {_text(run.name)}.</p>"
    return "<p class=lead>No validation loss yet.</p>"


def _per(run: Run) -> str:
    """The unit of a run's loss, if it is that of next tokens; preferences and rewards have losses of their own."""
    objective = run.experiment.get("objective")
    kind = objective.get("kind") if isinstance(objective, dict) else None
    return " nats per token" if kind in (None, "next_token") else ""


def summary(run: Run) -> dict[str, str]:
    """The key facts of a run, without unknown ones."""
    first_best, last = plots.best(run.rows) or {}, run.rows[-1]
    model = run.experiment.get("model", {})
    facts: dict[str, Any] = {
        "run": run.folder,
        "model": model.get("kind") if isinstance(model, dict) else None,
        "parameters": run.environment.get("parameters", run.experiment.get("parameters")),
        "best validation loss": show("val_loss", first_best["val_loss"]) if first_best else None,
        "… at macro-batch": f"{first_best.get('macro_batch')} of {last.get('macro_batch')}" if first_best else None,
    }
    if isinstance(facts["parameters"], (int, float)):
        facts["parameters"] = f"{facts['parameters']:,}"
    for name in ("perplexity", "bits_per_byte", *scores(last)):
        facts[label(name)] = _known(name, first_best.get(name, last.get(name) if name in scores(last) else None))
    for name in (key for key in last if key.startswith(("val_loss/", "visited_share/", "times_visited/"))):
        facts[label(name)] = _known(name, last[name])
    for name in ("samples", "tokens", "visited_share", "times_visited", "time_trained", "peak_memory", "skipped_steps"):
        facts[label(name)] = _known(name, last.get(name))
    for name in ("tokens_per_second", "mfu"):
        known = [value for value in plots.column(run.rows, name) if value == value]
        facts[f"{label(name)} (median)"] = show(name, statistics.median(known)) if known else None
    return {name: str(value) for name, value in facts.items() if value is not None}


def _known(name: str, value: Any) -> str | None:
    return None if value is None else show(name, value)


def _summary_table(runs: list[Run]) -> str:
    return _facts_table(runs, [summary(run) for run in runs], _plain)


def _experiment_table(runs: list[Run], only_differences: bool = False) -> str:
    facts = [flatten(run.experiment) for run in runs]
    if only_differences:
        names = [name for name in _names(facts) if len({json.dumps(part.get(name)) for part in facts}) > 1]
        if not names:
            return "<p>None in their experiments.</p>"
        facts = [{name: part.get(name) for name in names} for part in facts]
    return _facts_table(runs, facts, _plain)


def _samples(run: Run, named: bool) -> str:
    shown = run.samples[-NEWEST_SAMPLES:]
    blocks = [
        f"<details{' open' if entry is shown[-1] else ''}>"
        f"<summary>macro-batch {_text(entry.get('macro_batch'))}</summary>"
        f"<pre>{_text(str(entry.get('text', ''))[:LONGEST_SAMPLE])}</pre></details>"
        for entry in reversed(shown)
    ]
    images = "".join(_image(path.stem, path) for path in sorted(run.folder.glob("sample_*.png")))
    more = f"<p>The newest {len(shown)} of {len(run.samples)}; all are in samples.jsonl.</p>"
    title = f"Samples of {run.name}" if named else "Samples"
    return _section(
        title, f'<div class="seen">{images}</div>' + "\n".join(blocks) + (more if len(run.samples) > len(shown) else "")
    )


def _side_by_side(run: Run) -> str:
    """What both models answered to the same prompts, with its scores."""
    rows = ["<tr><th>prompt</th><th colspan=2>" + _text(run.name) + "</th><th colspan=2>the other</th></tr>"]
    for example in run.against["examples"]:
        answers = "".join(
            f"<td><pre>{_text(str(example.get(answer, ''))[:LONGEST_SAMPLE])}</pre></td>"
            f"<td>{_text(_plain('', example.get(score)))}</td>"
            for answer, score in (("answer", "score"), ("answer_of_other", "score_of_other"))
        )
        rows.append(f"<tr><td><pre>{_text(str(example.get('prompt', ''))[-LONGEST_SAMPLE:])}</pre></td>{answers}</tr>")
    return _section("Side by side", f"<div class=wide><table>{''.join(rows)}</table></div>")


def _glossary(runs: list[Run]) -> str:
    used = _names([row for run in runs for row in run.rows])
    rows = [
        f"<tr><th>{_text(metric.label)}</th><td>{_text(metric.meaning)}</td><td>{_text(metric.unit)}</td></tr>"
        for name, metric in METRICS.items()
        if name in used
    ]
    return f"<div class=wide><table>{''.join(rows)}</table></div>"


# HTML ------------------------------------------------------------------------------------------------------


def _facts_table(
    runs: Sequence[Run], facts: Sequence[Mapping[str, Any]], format_value: Callable[[str, Any], str]
) -> str:
    """One row for each fact that any run has, one column for each run."""
    head = "".join(f"<th>{_text(run.name)}</th>" for run in runs)
    rows = [f"<tr><th></th>{head}</tr>"] if len(runs) > 1 else []
    for name in _names(facts):
        cells = "".join(f"<td>{_text(format_value(name, part.get(name)))}</td>" for part in facts)
        rows.append(f"<tr><th>{_text(name.replace('_', ' ') if format_value is _metric else name)}</th>{cells}</tr>")
    return f"<div class=wide><table>{''.join(rows)}</table></div>"


def _plain(_: str, value: Any) -> str:
    return UNKNOWN if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _metric(name: str, value: Any) -> str:
    name = re.sub(r"^loss(?=/|$)", "val_loss", name)
    # A file from elsewhere may hold an integer beyond all floats.
    is_number = isinstance(value, float) or (type(value) is int and abs(value) < 2**1000)
    return show(name, value) if is_number else _plain(name, value)


def _names(facts: Iterable[Mapping[str, Any]]) -> list[str]:
    """All keys, without duplicates, in order of first occurrence."""
    return list(dict.fromkeys(name for part in facts for name in part))


def _text(value: Any) -> str:
    """A value as HTML text; control characters and lone surrogates, invalid in HTML, become U+FFFD."""
    allowed = "\n\t"
    characters = (
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(char) in ("Cc", "Cs") and char not in allowed else char
        for char in str(value)
    )
    return html.escape("".join(characters))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_text(title)}</h2>\n{body}</section>"


def _folded(title: str, body: str) -> str:
    return f"<section><details><summary><h2>{_text(title)}</h2></summary>\n{body}</details></section>"


def _image(name: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{_text(name)}" src="data:image/png;base64,{data}">'


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} · CleanGPT report</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

STYLE = """
:root { --ink: #1d2430; --soft: #5d6877; --line: #dfe4ea; --paper: #ffffff; --tint: #f5f7fa; --mark: #0072b2 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --soft: #9aa6b5; --line: #343b46; --paper: #14181e; --tint: #1d232b; --mark: #56b4e9 }
  img { filter: invert(0.91) hue-rotate(180deg) }
}
* { box-sizing: border-box }
body { max-width: 60rem; margin: 2.5rem auto 4rem; padding: 0 1.2rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", sans-serif }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 0.4rem; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 0 0 0.6rem; overflow-wrap: anywhere }
section { margin-top: 2.4rem }
.lead { font-size: 1.1rem; color: var(--soft); margin: 0 0 1.4rem }
.lead b { color: var(--mark) }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.94rem }
th, td { text-align: left; vertical-align: top; padding: 0.32rem 1.6rem 0.32rem 0 }
tr { border-bottom: 1px solid var(--line) }
th { font-weight: 500; color: var(--soft); white-space: nowrap }
tr:first-child th:not(:first-child) { color: var(--ink) }
tr:first-child th:not(:first-child) { min-width: 9rem; white-space: normal; overflow-wrap: anywhere }
td { overflow-wrap: anywhere }
img { display: block; width: 100%; height: auto; margin-bottom: 1.6rem; border-radius: 6px }
.seen { display: flex; flex-wrap: wrap; gap: 0.8rem }
.seen img { width: 9rem; margin: 0; filter: none; image-rendering: pixelated }
details { margin: 0.4rem 0 }
summary { cursor: pointer; color: var(--soft) }
summary h2 { display: inline; color: var(--ink) }
details > .wide { margin-top: 0.8rem }
pre { margin: 0.5rem 0 0; padding: 0.9rem 1.1rem; background: var(--tint); border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 0.86rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Noto Sans Mono", monospace }
@media print { body { margin: 0; max-width: none } }
"""
