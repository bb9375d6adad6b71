"""The report: one self-contained page that shows what the run's files say."""

import json
import math
from html.parser import HTMLParser

import pytest
from PIL import Image

from cleangpt.errors import UserError
from cleangpt.tracking import report
from cleangpt.tracking.metrics import MetricsFiles
from cleangpt.tracking.report import write_report


def make(run, count=5, name="tiny", lr=1e-3, samples=2, **metrics):
    run.mkdir(parents=True)
    files = MetricsFiles(run)
    files.open(None, None)
    for index in range(1, count + 1):
        row = {
            "macro_batch": index,
            "samples": 100 * index,
            "tokens": 6400 * index,
            "train_loss": 2 - index / count,
            "val_loss": 2 + (index / count - 0.6) ** 2,
            "bits_per_byte": None,
            "lr": lr,
            "weight_decay": 0.1,
            "training_batch_size": 12,
            "tokens_per_second": 1e4 * index,
            "visited_share": index / count,
            "time_trained": 3.0 * index,
        }
        files.record(row | metrics)
    for index in range(samples):
        files.sample(index + 1, f"text {index} <script>alert(1)</script> & \x07 你好")
    experiment = {"name": name, "model": {"kind": "gpt", "dim": 8}, "optimizer": {"lr": lr, "betas": [0.9, 0.95]}}
    (run / "experiment.json").write_text(json.dumps(experiment), encoding="utf-8")
    (run / "environment.json").write_text(json.dumps({"torch": "2.13", "parameters": 804096}), encoding="utf-8")
    return run


@pytest.fixture
def without_plots(monkeypatch):
    """For what the page says: drawing takes most of a report's time."""
    monkeypatch.setattr(report, "_draw", lambda runs, folder, prefix: {})


class Page(HTMLParser):
    """What a reader meets: text, rows of tables, and every tag with its attributes."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.rows, self.open = [], "", [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def fact(self, name):
        return next(row[1:] for row in self.rows if row[0] == name)


def test_the_summary_says_what_the_metrics_say(tmp_path):
    path = write_report([make(tmp_path / "run", exact_match=0.994)])
    page = Page(path)
    assert path == tmp_path / "run" / "report.html"
    assert page.fact("best validation loss") == ["2.0000"]
    assert page.fact("… at macro-batch") == ["3 of 5"]
    assert page.fact("model") == ["gpt"]
    assert page.fact("parameters") == ["804,096"]
    assert page.fact("exact match") == ["99.4 %"]
    assert page.fact("tokens seen") == ["32k"]
    assert page.fact("visited share") == ["100.0 %"]
    assert page.fact("time trained") == ["15.0 s"]
    assert page.fact("tokens per second (median)") == ["30k"]
    assert page.fact("optimizer.betas") == ["[0.9, 0.95]"]
    assert page.fact("torch") == ["2.13"]
    assert "bits per byte" not in [row[0] for row in page.rows[:20]]
    assert sorted(entry.name for entry in (tmp_path / "run" / "plots").iterdir()) == [
        "loss.png",
        "schedules.png",
        "scores.png",
        "throughput.png",
    ]


def test_what_an_agent_did_is_shown(tmp_path):
    run, other = make(tmp_path / "run"), make(tmp_path / "other")
    sheet = run / "videos" / "contact_sheet.png"
    sheet.parent.mkdir()
    Image.new("RGB", (8, 4)).save(sheet)
    page = Page(write_report([run, other], tmp_path / "out"))
    shown = [entries["alt"] for tag, entries in page.tags if tag == "img"]
    assert [title for title in shown if title.startswith("Episodes")] == ["Episodes of tiny run"]


def test_the_page_needs_no_script_and_no_network(tmp_path):
    page = Page(write_report([make(tmp_path / "run")]))
    assert "script" not in [tag for tag, _ in page.tags]
    links = [value for _, entries in page.tags for name, value in entries.items() if name in ("src", "href")]
    assert len(links) == 3
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert "url(" not in page.source and "@import" not in page.source


def test_samples_are_shown_as_they_are_escaped(tmp_path, without_plots):
    page = Page(write_report([make(tmp_path / "run")]))
    assert "text 1 <script>alert(1)</script> & \ufffd 你好" in page.text
    assert "\x07" not in page.source


def test_a_name_or_value_cannot_break_the_page(tmp_path, without_plots):
    page = Page(write_report([make(tmp_path / "run", name='"><b>{x}</b>&amp;')]))
    assert ("b", {}) not in page.tags[: page.tags.index(("p", {"class": "lead"}))]
    assert '"><b>{x}</b>&amp;' in page.text


def test_an_evaluation_is_shown_where_there_is_one(tmp_path, without_plots):
    run = make(tmp_path / "run")
    assert "Evaluation" not in Page(write_report([run])).text
    evaluation = {"checkpoint": "val2.0000_mb000003", "split": "val", "loss": 1.9876, "exact_match": 0.5, "samples": 99}
    (run / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    page = Page(write_report([run]))
    assert page.fact("checkpoint") == ["val2.0000_mb000003"]
    assert page.fact("loss") == ["1.9876"]
    assert page.fact("exact match") == ["50.0 %"]


def test_a_comparison_with_another_model_is_shown_with_its_win_rate(tmp_path, without_plots):
    run = make(tmp_path / "run")
    assert "Win rate" not in Page(write_report([run])).text
    example = {"prompt": "a <b>", "answer": "one", "score": 2.0, "answer_of_other": "two", "score_of_other": None}
    against = {"against": "runs/sft", "win_rate": 0.975, "kl": 3.5, "grammatical": 0.96, "examples": [example]}
    (run / "against.json").write_text(json.dumps(against), encoding="utf-8")
    page = Page(write_report([run]))
    assert "Win rate" in page.text and page.fact("win rate") == ["0.975"] and page.fact("against") == ["runs/sft"]
    assert "Side by side" in page.text and all(word in page.text for word in ("a <b>", "one", "two", "2.0"))


@pytest.mark.slow
def test_the_best_of_n_is_drawn_over_the_kl_divergence(tmp_path):
    run = make(tmp_path / "run")
    curve = [{"n": n, "√KL": n / 4, "true score": n, "judge's score": n**2} for n in (1, 4, 16)]
    (run / "best_of_n.json").write_text(json.dumps({"reward": curve, "reward100": curve}), encoding="utf-8")
    page = Page(write_report([run]))
    assert "Best of n" in [dict(attributes).get("alt") for tag, attributes in page.tags if tag == "img"]
    assert (run / "plots" / "best_of_n.png").is_file()


def test_a_loss_that_is_not_per_token_is_not_called_so(tmp_path, without_plots):
    run = make(tmp_path / "run")
    assert "nats per token" in Page(write_report([run])).text
    experiment = json.loads((run / "experiment.json").read_text()) | {"objective": {"kind": "dpo"}}
    (run / "experiment.json").write_text(json.dumps(experiment), encoding="utf-8")
    assert "nats per token" not in Page(write_report([run])).text


def test_a_number_beyond_all_floats_is_shown_as_it_stands(tmp_path, without_plots):
    run = make(tmp_path / "run")
    (run / "evaluation.json").write_text('{"loss": 1' + 400 * "0" + "}", encoding="utf-8")
    assert "1" + 400 * "0" in write_report([run], None).read_text(encoding="utf-8")


@pytest.mark.parametrize("file", ["val_00000.bin", "tokenizer.json", "train_00000.bin"])
def test_losses_over_different_data_are_not_compared(tmp_path, without_plots, file):
    """Of two runs of which it is known; training data may differ."""
    runs = [make(tmp_path / "a", lr=1e-3), make(tmp_path / "b", lr=2e-3), make(tmp_path / "c", lr=3e-3)]
    for run, digest in zip(runs, "xy", strict=False):
        sums = {"val_00000.bin": "v", "tokenizer.json": "t", "train_00000.bin": "n"} | {file: digest}
        (run / "stores.json").write_text(json.dumps({"": {"folder": "data", "sha256": sums}}))
    different = "validated on different data" in Page(write_report(runs)).text
    assert different == (file != "train_00000.bin")
    assert "different data" not in Page(write_report(runs[1:])).text


@pytest.mark.slow
def test_a_comparison_shows_each_run_and_what_differs(tmp_path):
    runs = [make(tmp_path / "a" / "1", lr=1e-3), make(tmp_path / "a" / "2", lr=2e-3), make(tmp_path / "b", name="own")]
    page = Page(write_report(runs, tmp_path / "out"))
    assert page.rows[0] == ["", "tiny 1", "tiny 2", "own"]
    assert page.fact("optimizer.lr") == ["0.001", "0.002", "0.001"]
    differences = page.text[page.text.index("Differences") : page.text.index("Curves")]
    assert "optimizer.lr" in differences and "model.dim" not in differences
    assert (tmp_path / "out" / "plots" / "loss.png").exists()
    assert not (runs[0] / "report.html").exists()


@pytest.mark.slow
def test_runs_of_one_name_in_folders_of_one_name_are_told_apart(tmp_path):
    page = Page(write_report([make(tmp_path / "a" / "1"), make(tmp_path / "b" / "1")], tmp_path / "out"))
    assert page.rows[0] == ["", f"tiny 1 {tmp_path / 'a'}", f"tiny 1 {tmp_path / 'b'}"]


def test_a_run_named_twice_counts_once(tmp_path, without_plots):
    run = make(tmp_path / "run")
    assert write_report([run, run]) == run / "report.html"


@pytest.mark.slow
def test_a_comparison_in_a_runs_folder_leaves_its_own_report(tmp_path):
    runs = [make(tmp_path / "a"), make(tmp_path / "b")]
    own = write_report(runs[:1]).read_bytes()
    picture = (runs[0] / "plots" / "loss.png").read_bytes()
    assert write_report(runs) == runs[0] / "comparison.html"
    assert (runs[0] / "report.html").read_bytes() == own
    assert (runs[0] / "plots" / "loss.png").read_bytes() == picture


@pytest.mark.slow
def test_a_long_run_stays_below_a_megabyte(tmp_path):
    run = make(tmp_path / "run", count=3000, samples=0)
    with (run / "samples.jsonl").open("w", encoding="utf-8") as file:
        for index in range(3000):
            file.write(
                json.dumps(
                    {"macro_batch": index, "text": f"sample {index} " + "words & " * (20_000 if index > 2980 else 1)}
                )
                + "\n"
            )
    path = write_report([run])
    assert path.stat().st_size < 2**20
    text = Page(path).text
    assert "sample 2999" in text and "The newest 12 of 3000; all are in samples.jsonl" in text


@pytest.mark.slow
def test_a_run_with_nothing_but_metrics_is_reported(tmp_path):
    run = make(tmp_path / "run", samples=0, val_loss=math.nan, mfu=None)
    (run / "experiment.json").unlink()
    (run / "environment.json").unlink()
    page = Page(write_report([run]))
    assert "No validation loss yet" in page.text
    assert page.fact("tokens seen") == ["32k"]
    assert "model" not in [row[0] for row in page.rows]


def test_a_folder_that_is_no_run_or_has_no_metrics_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a run folder"):
        write_report([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"has no metrics yet \(metrics\.jsonl\)"):
        write_report([make(tmp_path / "run", count=0)])
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.slow
def test_curves_are_by_step_where_the_run_has_steps(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(report.plots, "loss_plot", lambda rows, steps, path: drawn.update(steps) or path)
    monkeypatch.setattr(report, "_image", lambda title, path: title)
    by_step, without = make(tmp_path / "a", name="by step"), make(tmp_path / "b", count=2, name="without")
    MetricsFiles(by_step).log_steps([{"step": step, "tokens": 10 * step, "loss": 1.5} for step in range(1, 30)])
    write_report([by_step, without])
    assert [row["tokens"] for row in drawn["by step"]] == list(range(10, 300, 10))
    assert [(row["tokens"], row["loss"]) for row in drawn["without"]] == [(6400, 1.5), (12800, 1.0)]
