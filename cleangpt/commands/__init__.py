"""The command line: one function per command.

Everything heavy is imported where it is used, so that --help and --version answer at once.
"""

import dataclasses
import errno
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import tyro

from cleangpt import __version__
from cleangpt.commands.options import parse
from cleangpt.errors import RunFailedError, UserError, nearest, single_line

if TYPE_CHECKING:
    import torch

    from cleangpt.data.mixing import MixedDataset
    from cleangpt.data.tokenizers import Tokenizer
    from cleangpt.distributed.processes import Ranks
    from cleangpt.inference.sampling import Sampling
    from cleangpt.inference.text import Piece
    from cleangpt.models.base import LanguageModel

USAGE = """\
usage: cleangpt COMMAND [ARGUMENTS] [--help]

  demo                  train two small models from nothing and show what came out (a few minutes, no network)
  list                  name the experiments, corpora and models there are
  prepare CORPUS        turn a corpus into a dataset, memory-mapped in training
  plan EXPERIMENT       memory, time and cost on devices that you do not have yet
  tune EXPERIMENT       find its learning rate, perhaps on a narrower model, by short runs
  train EXPERIMENT      start a run of an experiment, by name or by path to your own Python file
  resume RUN            go on from a run's newest snapshot
  evaluate RUN          loss, perplexity, bits per byte and task score of a run's best checkpoint
  sample RUN            text from a run's best checkpoint
  chat RUN              talk with a model that was trained on conversations
  report RUN [RUN ...]  a page with curves, figures and samples; several runs are compared
  export RUN            a run's best checkpoint for Hugging Face or llama.cpp

RUN is a run's folder, or an experiment's name for its newest run. cleangpt COMMAND --help tells the options."""


REFUSED = {"ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ESTALE", "EMFILE", "ENFILE"}
"""How the system says that a disk is full, read-only, closed to the user or broken: no fault of the program."""


UNUSABLE = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)
"""How the system says that a path cannot be one of a file."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (None: the process's own) and returns the exit code.

    0: done, or stopped at a signal after saving; 1: the run failed; 2: the command or its input was wrong;
    130: stopped at once by a second Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(words)
    except UserError as error:
        print(f"{_speaker()}error: {single_line(error)}", file=sys.stderr)
        return 2
    except RunFailedError as error:
        print(f"{_speaker()}stopped: {single_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped at once; what was saved before is whole", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has left; nothing more can be said to it.
        sys.stderr.close()
        return 0
    except OSError as error:
        full = "No usable temporary directory" in str(error)  # how Python says so where even /tmp is
        if errno.errorcode.get(error.errno or 0) not in REFUSED and not full:
            raise
        print(f"{_speaker()}stopped: {error}", file=sys.stderr)
        return 1
    except SystemExit as end:
        return int(end.code or 0)


def program() -> NoReturn:
    """The process of a command line: `main`, and no delay after it.

    At its end Python looks for circles among all objects once more, which takes half a second with those of PyTorch.
    """
    code = main()
    gc.freeze()
    sys.exit(code)


def _speaker() -> str:
    """Which process speaks, where torchrun has started several."""
    return f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if words else 2
    if words[0] in ("--version", "-V"):
        print(f"cleangpt {__version__}")
        return 0
    if words[0] not in COMMANDS:
        raise UserError(f"{words[0]!r} is not a command{nearest(words[0], COMMANDS)}; allowed: {', '.join(COMMANDS)}")
    try:
        COMMANDS[words[0]](words[1:])
    except OSError as error:
        if error.errno not in UNUSABLE:
            raise
        raise UserError(f"{error.filename}: {error.strerror}") from error
    return 0


def _subject(words: list[str], command: str, what: str, names: Callable[[], Sequence[str]]) -> str:
    """The first word after a command; without one, says how to call it."""
    if words and not words[0].startswith("-"):
        return words[0]
    if words and words[0] in ("-h", "--help"):
        print(f"usage: cleangpt {command} {what} [OPTIONS]\n\n{what} is one of: {', '.join(names())}")
        print(f"cleangpt {command} {what} --help tells the options.")
        raise SystemExit(0)
    raise UserError(f"cleangpt {command} needs {what}; allowed: {', '.join(names())}")


# Before training -----------------------------------------------------------------------------------------------------
def list_command(words: list[str]) -> None:
    """cleangpt list"""

    @dataclasses.dataclass
    class Options:
        pass

    parse(Options, words, program="cleangpt list", about="Names the experiments, corpora and models there are.")
    import ast

    from cleangpt.corpora import CORPORA
    from cleangpt.experiment_files import experiments
    from cleangpt.models import MODELS

    docs = {name: ast.get_docstring(ast.parse(path.read_text("utf-8"))) for name, path in experiments().items()}
    sections = {
        "experiments": docs,
        "corpora": {name: cls.__doc__ for name, cls in CORPORA.items()},
        "models": {name: cls.__doc__ for name, (_, cls) in MODELS.items()},
    }
    for title, entries in sections.items():
        print(title)
        for name, doc in entries.items():
            print(f"  {name:<24}  {(doc or '').strip().splitlines()[0] if doc else ''}")


def prepare_command(words: list[str]) -> None:
    """cleangpt prepare CORPUS"""
    from cleangpt.corpora import CORPORA, prepare

    name = _subject(words, "prepare", "CORPUS", lambda: list(CORPORA))
    if name not in CORPORA:
        raise UserError(f"corpus {name!r} is not known{nearest(name, CORPORA)}; allowed: {', '.join(CORPORA)}")
    options = dataclasses.make_dataclass(
        "Options",
        [
            ("corpus", Annotated[CORPORA[name], tyro.conf.arg(name="")]),
            ("folder", Annotated[str, tyro.conf.arg(help="Where datasets are kept.")], "data"),
            ("again", Annotated[bool, tyro.conf.arg(help="Prepare it anew, even if it is there.")], False),
        ],
    )
    about = (CORPORA[name].__doc__ or "").splitlines()[0]
    chosen: Any = parse(options, words[1:], program=f"cleangpt prepare {name}", about=about)
    chosen.corpus.check()
    store = prepare(chosen.corpus, Path(chosen.folder), again=chosen.again)
    for source in store.sources:
        print(f"dataset: {source.dataset.folder}")


def _with_experiment(words: list[str], command: str, about: str, fields: list[tuple[str, Any, Any]]) -> Any:
    """The options of a command over an experiment: its own `fields`, and `experiment` with the fields overridden."""
    from cleangpt.experiment_files import experiments, find_experiment, load_experiment, recorded_overrides

    path = find_experiment(_subject(words, command, "EXPERIMENT", lambda: list(experiments())))
    overrides = [*recorded_overrides(path), *words[1:]]
    about = f"{about.format(path)}; options that name a field change it."
    return _parse_over(load_experiment(path), fields, overrides, f"cleangpt {command} {words[0]}", about)


def _parse_over(
    experiment: Any, fields: list[tuple[str, Any, Any]], words: Sequence[str], program: str, about: str
) -> Any:
    """Options of a command's own `fields`, and of the `experiment`, whose fields stand among them without a prefix."""
    described = Annotated[type(experiment), tyro.conf.arg(name="")]  # type: ignore[valid-type]
    options = dataclasses.make_dataclass("Options", [("experiment", described, experiment), *fields])
    return parse(options, words, program=program, about=about)


def plan_command(words: list[str]) -> None:
    """cleangpt plan EXPERIMENT"""
    about = "What training {} takes on devices of a data sheet"
    chosen = _with_experiment(
        words, "plan", about,
        [
            ("devices", Annotated[tuple[int, ...], tyro.conf.arg(help="How many; several make a table.")], (1,)),
            ("device", Annotated[str, tyro.conf.arg(help="Which: h100, a100, 4090, ...")], "h100"),
            ("devices_per_node", Annotated[int, tyro.conf.arg(help="Devices in a machine.")], 8),
            ("tokens", Annotated[int | None, tyro.conf.arg(help="Token budget; none: the experiment's length.")], None),
            ("price", Annotated[float | None, tyro.conf.arg(help="Dollars per device and hour; none: assumed.")], None),
            ("json", Annotated[str | None, tyro.conf.arg(help="Also write the plan to this JSON file.")], None),
        ],
    )  # fmt: skip
    from cleangpt.files import write_json
    from cleangpt.planning.devices import find_device
    from cleangpt.planning.plan import make_plan
    from cleangpt.planning.tables import show

    if chosen.json is not None and (not Path(chosen.json).parent.is_dir() or Path(chosen.json).is_dir()):
        raise UserError(f"--json is {chosen.json!r}; allowed: a file in a folder that exists")
    device = find_device(chosen.device, chosen.price)
    plan = make_plan(chosen.experiment, device, chosen.devices, chosen.devices_per_node, chosen.tokens)
    show(plan)
    if chosen.json is not None:
        write_json(Path(chosen.json), plan.to_json())
        print(f"plan: {chosen.json}")


def tune_command(words: list[str]) -> None:
    """cleangpt tune EXPERIMENT"""
    about = "The learning rate at which short runs of {} learn most"
    chosen = _with_experiment(
        words, "tune", about,
        [
            ("steps", Annotated[int, tyro.conf.arg(help="Length of a run, in steps of the full batch size.")], 200),
            ("width", Annotated[int | None, tyro.conf.arg(help="model.dim to try at; none: the experiment's.")], None),
            ("rates", Annotated[tuple[float, ...], tyro.conf.arg(help="Try these alone; none: search.")], ()),
            ("factor", Annotated[float, tyro.conf.arg(help="From one rate of the search to the next.")], 2.0),
            ("out", Annotated[str | None, tyro.conf.arg(help="Folder to keep; none: runs/NAME_tune.")], None),
        ],
    )  # fmt: skip
    rules = {
        "steps": (chosen.steps >= 1, "1 or more"),
        "rates": (all(0 < lr < math.inf for lr in chosen.rates), "finite numbers above 0"),
        "factor": (1 < chosen.factor < math.inf, "a finite number above 1"),
    }
    for name, (allowed, described) in rules.items():
        if not allowed:
            raise UserError(f"--{name} is {getattr(chosen, name)}; allowed: {described}")
    if chosen.experiment.optimizer.lr == 0:
        raise UserError("optimizer.lr is 0; allowed: more than 0, where the search begins")
    from cleangpt.checkpoints.run_folder import lock_run
    from cleangpt.distributed.processes import join
    from cleangpt.training.tuning import RunInterruptedError, Tuning, advice, short_run

    experiment = short_run(chosen.experiment, chosen.steps, chosen.width)
    folder = Path(chosen.out or f"runs/{experiment.name}_tune")
    _check(experiment)
    _check_source(experiment)
    with join(experiment.parallel.timeout) as ranks:
        experiment, store = _with_store(experiment, ranks)
        folder.mkdir(parents=True, exist_ok=True)
        log: Callable[[str], None] = partial(print, flush=True) if ranks.is_main else lambda line: None
        try:
            with lock_run(folder) if ranks.is_main else nullcontext():
                tuning = Tuning(experiment, folder, store, ranks, log)
                losses = {lr: tuning.loss(lr) for lr in chosen.rates} if chosen.rates else tuning.grid(chosen.factor)
        except RunInterruptedError:
            log("interrupted and saved; the same command goes on")
            return
    for line in ["", *advice(experiment, losses)]:
        log(line)


# Training ------------------------------------------------------------------------------------------------------------
def train_command(words: list[str]) -> None:
    """cleangpt train EXPERIMENT"""
    from cleangpt.experiment_files import experiments, find_experiment, load_experiment, recorded_overrides

    path = find_experiment(_subject(words, "train", "EXPERIMENT", lambda: list(experiments())))
    recorded = recorded_overrides(path)
    if recorded:
        print(f"with the overrides that this run was started with: {' '.join(recorded)}")
    experiment = load_experiment(path)
    overrides = [*recorded, *words[1:]]
    about = f"Fields of {path}, with their values there."
    experiment, end = _parse_launch(experiment, overrides, f"cleangpt train {words[0]}", about)
    _train(experiment, path, overrides, end)


def resume_command(words: list[str]) -> None:
    """cleangpt resume RUN"""
    from cleangpt.checkpoints.run_folder import (
        EXPERIMENT,
        EXPERIMENT_FILE,
        check_resumable,
        find_run,
        read_experiment,
    )
    from cleangpt.experiment_files import run_file

    run = find_run(_subject(words, "resume", "RUN", _runs))
    if (run / EXPERIMENT_FILE).is_file():
        run_file(run / EXPERIMENT_FILE)
    before = read_experiment(run)
    about = f"Fields of {run / EXPERIMENT}; those of the data and the model cannot change any more."
    experiment, end = _parse_launch(before, words[1:], f"cleangpt resume {words[0]}", about)
    experiment = dataclasses.replace(experiment, run_dir=str(run))
    check_resumable(before, experiment)
    _train(experiment, None, [], end, begun=run)


def _parse_launch(experiment: Any, words: Sequence[str], program: str, about: str) -> tuple[Any, float | None]:
    """The experiment with its overrides, and when this launch must have ended; that is no part of the experiment."""
    from cleangpt.training.deadline import read_time_limit

    began = time.time()
    limit = tyro.conf.arg(help="Save and end within this time, as SLURM writes it (1:30:00), or slurm: within its job.")
    chosen = _parse_over(experiment, [("time_limit", Annotated[str | None, limit], None)], words, program, about)
    end = None if chosen.time_limit is None else read_time_limit(chosen.time_limit, began)
    return chosen.experiment, end


def _check(experiment: Any) -> None:
    """Refuses what cannot work, before anything is made."""
    from cleangpt.checkpoints.run_folder import check_folder
    from cleangpt.distributed.device import check_precision, choose_device
    from cleangpt.distributed.layout import check_compilation, check_devices, check_loss_chunk, choose_degrees
    from cleangpt.distributed.processes import local_rank, world_size
    from cleangpt.experiment import check_experiment
    from cleangpt.tracking import check_tracking
    from cleangpt.training.launch import check_row_length

    place = choose_degrees(experiment.parallel, world_size())
    check_experiment(experiment, place.parts)
    experiment.corpus.check()
    check_row_length(experiment)
    check_folder(experiment)
    check_devices(choose_device(experiment.training.device), world_size())
    device = choose_device(experiment.training.device, local_rank())
    check_precision(experiment.training.precision, device)
    check_compilation(experiment.training.compile, place, device)
    check_loss_chunk(experiment.training, experiment.model, place)
    check_tracking(experiment.tracking)


def _train(
    experiment: Any, source: Path | None, overrides: Sequence[str], end: float | None = None, begun: Path | None = None
) -> None:
    """Prepares the corpus where needed, opens the run, trains, and says what to do next.

    Args:
        experiment: what to train.
        source: its file.
        overrides: the command line's words after the experiment.
        end: when it must have saved and ended, in seconds since 1970; None: when it is done.
        begun: the run to go on with, whatever fields it had before; None: that of `open_run`.
    """
    _check(experiment)
    from cleangpt.checkpoints.run_folder import acquire_run, open_run
    from cleangpt.distributed.processes import join
    from cleangpt.distributed.signals import SAVE, without
    from cleangpt.tracking.progress import ProgressBar
    from cleangpt.training.launch import summary
    from cleangpt.training.trainer import Trainer

    _check_source(experiment)
    # Before there is something to save, the signal that asks for it would end the process.
    with without(SAVE), join(experiment.parallel.timeout) as ranks:
        if end is not None:
            end = float(ranks.of_launch("end", str(end)))
        experiment, store = _with_store(experiment, ranks)
        run: Path = begun or ranks.on_main(lambda: open_run(experiment, source, overrides))
        progress = ProgressBar(run if ranks.is_main else None, experiment.tracking.progress and ranks.is_main)
        with ExitStack() as held:
            ranks.on_main(lambda: held.enter_context(acquire_run(run, experiment, store)))
            trainer = Trainer(experiment, run, store, progress, ranks, end)
            for line in summary(experiment, run, store, trainer.model, trainer.device, trainer.layout):
                progress.log(line)
            status = trainer.train()
    if status == "interrupted":
        progress.log(f"interrupted and saved; go on with: cleangpt resume {run}")
    else:
        progress.log(f"{status}; next: cleangpt evaluate {run}, cleangpt sample {run}, cleangpt report {run}")


def _with_store(experiment: Any, ranks: "Ranks") -> tuple[Any, "MixedDataset"]:
    """The experiment with its vocabulary filled in, and the store of its corpus, prepared where needed."""
    from cleangpt.corpora import prepare
    from cleangpt.distributed.layout import choose_degrees
    from cleangpt.training.finetuning import check_fine_tuning
    from cleangpt.training.launch import check_store, resolve

    store = ranks.after_main(lambda: prepare(experiment.corpus, Path(experiment.data.folder)))
    experiment = resolve(experiment, store.vocab_size)
    check_store(experiment, store)
    check_fine_tuning(experiment, choose_degrees(experiment.parallel, ranks.world_size))
    return experiment, store


def _check_source(experiment: Any) -> None:
    """Refuses to start from what is not there; a run that goes on needs it no more."""
    from cleangpt.checkpoints.run_folder import find_moments
    from cleangpt.checkpoints.snapshots import list_snapshots
    from cleangpt.interchange.huggingface import find

    begun = experiment.run_dir is not None and list_snapshots(Path(experiment.run_dir) / "snapshots")
    if experiment.init_from is None or begun:
        return
    find(experiment.init_from)
    if experiment.fine_tuning.optimizer_state == "kept":
        find_moments(experiment.init_from)


# After training ------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class EvaluateOptions:
    """What to evaluate."""

    run: tyro.conf.Positional[str]
    """Folder of a run, or an experiment's name for its newest run."""
    checkpoint: str | None = None
    """Name of one of its checkpoints; none: the best."""
    split: str | None = None
    """Split of the corpus; none: test where there is one, else val."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    code: str | None = None
    """A Python file of yours to run first, which registers your own model or corpus."""
    json: bool = False
    """Print JSON instead of a table."""


def evaluate_command(words: list[str]) -> None:
    """cleangpt evaluate RUN"""
    about = "Loss, perplexity, bits per byte and task score over a whole split; also kept in RUN/evaluation.json."
    options = parse(EvaluateOptions, words, program="cleangpt evaluate", about=about)
    import json

    from cleangpt.checkpoints.run_folder import find_run
    from cleangpt.distributed.device import choose_device
    from cleangpt.evaluation.evaluate import evaluate_run, table

    _run_code(options.code)
    device = choose_device(options.device)
    figures = evaluate_run(find_run(options.run), options.checkpoint, options.split, device)
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        table(figures)


@dataclasses.dataclass
class SampleOptions:
    """What to sample, and how."""

    run: tyro.conf.Positional[str]
    """Folder of a run or of a checkpoint, an experiment's name for its newest run, or hf:NAME_OR_FOLDER."""
    prompt: str | None = None
    """Text to go on from; none: the start of a document."""
    max_new_tokens: int = 200
    """Most tokens to add."""
    temperature: float = 0.8
    """Divides the logits; 0: always the likeliest token."""
    top_k: int | None = None
    """Draw among so many likeliest tokens only."""
    top_p: float | None = None
    """Draw among the likeliest tokens that together reach this probability only."""
    min_p: float | None = None
    """Draw among tokens that are at least so many times as likely as the likeliest only."""
    repetition_penalty: float = 1.0
    """More than 1: tokens of the context become less likely."""
    stop: tuple[str, ...] = ()
    """Texts before which to stop."""
    seed: int = 1337
    """Of the draws."""
    num_samples: int = 1
    """How many texts; several are drawn side by side, with seeds one after the other, and shown at the end."""
    logprobs: bool = False
    """Show each token on a line, after its log-probability in nats."""
    draft: str | None = None
    """A smaller model of the same tokenizer, named as the run is, which guesses tokens ahead (speculative decoding)."""
    draft_tokens: int = 4
    """How many it guesses at a time."""
    cache: bool = True
    """Keep keys and values of tokens that were read."""
    compile: bool = False
    """Compile the model first: slow to start, then faster by token."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    code: str | None = None
    """A Python file of yours to run first, which registers your own model."""


def sample_command(words: list[str]) -> None:
    """cleangpt sample RUN"""
    options = parse(SampleOptions, words, program="cleangpt sample", about="Text from a run's best checkpoint.")
    from cleangpt.distributed.device import can_compile, choose_device
    from cleangpt.inference.text import complete, stream
    from cleangpt.interchange.huggingface import open_checkpoint

    sampling = _sampling(options)
    _run_code(options.code)
    device = choose_device(options.device)
    checkpoint = open_checkpoint(options.run)
    model, tokenizer, count = checkpoint.model(device), checkpoint.tokenizer, options.num_samples
    compiled = options.compile and can_compile(device)
    if compiled != options.compile:
        print("--compile: no compiler was found; going on without", file=sys.stderr)
    given: dict[str, Any] = {
        "max_new_tokens": options.max_new_tokens, "stop": options.stop, "cached": options.cache, "compiled": compiled,
    }  # fmt: skip
    rows: Iterable[Iterable[Piece]]
    if options.draft is None and count > 1:
        rows = complete(model, tokenizer, [options.prompt] * count, device, sampling=sampling, **given)
    else:
        draft = None if options.draft is None else _draft_model(options.draft, tokenizer, device)
        given |= {"draft": draft, "draft_tokens": options.draft_tokens}
        each = [dataclasses.replace(sampling, seed=sampling.seed + number) for number in range(count)]
        rows = (stream(model, tokenizer, options.prompt, device, sampling=one, **given) for one in each)
    for number, row in enumerate(rows):
        if number:
            print("---")
        _show(row, options.prompt, options.logprobs)


def _show(row: Iterable["Piece"], prompt: str | None, logprobs: bool) -> None:
    """Prints a text as it comes, or each of its tokens on a line."""
    if prompt and not logprobs:
        print(prompt, end="", flush=True)
    for text, token in row:
        if not logprobs:
            print(text, end="", flush=True)
        elif token is not None or text:
            print(f"{'' if token is None else f'{token.logprob:.4f}':>9}  {text!r}")
    if not logprobs:
        print()


def _sampling(options: "SampleOptions | ChatOptions") -> "Sampling":
    """How to draw, checked."""
    from cleangpt.inference.sampling import Sampling

    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "temperature": (lambda value: value >= 0, "0 or more"),
        **dict.fromkeys(("top-k", "num-samples", "draft-tokens"), (lambda value: value >= 1, "1 or more")),
        **dict.fromkeys(("top-p", "min-p"), (lambda value: 0 < value <= 1, "more than 0, at most 1")),
        "repetition-penalty": (lambda value: value > 0, "more than 0"),
        "max-new-tokens": (lambda value: value >= 0, "0 or more"),
        "stop": (all, "texts of one character or more"),
        "seed": (lambda value: 0 <= value < 2**63, "a whole number of 0 or more"),
    }
    for name, (allowed, words) in rules.items():
        value = getattr(options, name.replace("-", "_"), None)
        if value is not None and (not allowed(value) or value == math.inf):
            raise UserError(f"--{name} is {value}; allowed: {words}")
    return Sampling(
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, min_p=options.min_p,
        repetition_penalty=options.repetition_penalty, seed=options.seed,
    )  # fmt: skip


def _draft_model(text: str, tokenizer: "Tokenizer", device: "torch.device") -> "LanguageModel":
    """The model that guesses for another one with this tokenizer."""
    from cleangpt.data.tokenizers import same_tokens
    from cleangpt.interchange.huggingface import open_checkpoint

    draft = open_checkpoint(text)
    if not same_tokens(draft.tokenizer, tokenizer):
        raise UserError(f"--draft is {text!r}, whose tokenizer is another one; allowed: a model of the same tokenizer")
    return draft.model(device)


@dataclasses.dataclass
class ChatOptions:
    """With whom to talk, and how."""

    run: tyro.conf.Positional[str]
    """Folder of a run or of a checkpoint, an experiment's name for its newest run, or hf:NAME_OR_FOLDER."""
    message: str | None = None
    """Say this, show the answer and end; none: a conversation, one line a message, until an empty one."""
    system: str | None = None
    """What the conversation begins with."""
    max_new_tokens: int = 500
    """Most tokens in an answer."""
    temperature: float = 0.8
    """Divides the logits; 0: always the likeliest token."""
    top_k: int | None = None
    """Draw among so many likeliest tokens only."""
    top_p: float | None = None
    """Draw among the likeliest tokens that together reach this probability only."""
    min_p: float | None = None
    """Draw among tokens that are at least so many times as likely as the likeliest only."""
    repetition_penalty: float = 1.0
    """More than 1: tokens of the context become less likely."""
    seed: int = 1337
    """Of the draws."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    code: str | None = None
    """A Python file of yours to run first, which registers your own model."""


def chat_command(words: list[str]) -> None:
    """cleangpt chat RUN"""
    about = "A conversation with a model that was trained on some."
    options = parse(ChatOptions, words, program="cleangpt chat", about=about)
    from cleangpt.distributed.device import choose_device
    from cleangpt.inference.chat import answer
    from cleangpt.interchange.huggingface import open_checkpoint

    sampling = _sampling(options)
    _run_code(options.code)
    device = choose_device(options.device)
    checkpoint = open_checkpoint(options.run)
    if checkpoint.chat_template is None:
        raise UserError(
            f"{checkpoint.folder} has no chat template, since it was not trained on conversations; use sample"
        )
    model = checkpoint.model(device)
    messages = [{"role": "system", "content": options.system}] if options.system else []
    while said := options.message or _next_message():
        messages.append({"role": "user", "content": said})
        pieces = []
        for piece in answer(
            model, checkpoint.tokenizer, checkpoint.chat_template, messages, device,
            max_new_tokens=options.max_new_tokens, sampling=sampling,
        ):  # fmt: skip
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        messages.append({"role": "assistant", "content": "".join(pieces)})
        if options.message is not None:
            break


def _next_message() -> str:
    """A line of the user's; empty at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


@dataclasses.dataclass
class ReportOptions:
    """What to report."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders of runs, or experiments' names for their newest runs."""
    schedule: str | None = None
    """Instead: plot the schedules that an experiment plans (a name or a path), before it is trained."""
    out: str | None = None
    """Folder to write to; none: the (first) run's. For a schedule: the PNG file; none: NAME_schedule.png."""


def report_command(words: list[str]) -> None:
    """cleangpt report RUN [RUN ...]"""
    about = "A self-contained page and PNGs: curves, schedules, throughput, samples; several runs are compared."
    options = parse(ReportOptions, words, program="cleangpt report", about=about)
    from cleangpt.checkpoints.run_folder import find_run

    if bool(options.runs) == (options.schedule is not None):
        raise UserError("cleangpt report needs either runs or --schedule EXPERIMENT")
    if options.schedule is not None:
        print(f"schedules: {_plot_schedules(options.schedule, options.out)}")
        return
    from cleangpt.tracking.report import write_report

    out = Path(options.out) if options.out is not None else None
    print(f"report: {write_report([find_run(run) for run in options.runs], out)}")


def _plot_schedules(name: str, out: str | None) -> Path:
    from cleangpt.experiment import check_experiment
    from cleangpt.experiment_files import find_experiment, load_experiment
    from cleangpt.tracking.plots import schedule_preview
    from cleangpt.training.schedules import curves

    experiment = load_experiment(find_experiment(name))
    check_experiment(experiment)
    samples, planned = curves(experiment)
    path = Path(out) if out is not None else Path(f"{experiment.name}_schedule.png")
    return schedule_preview({key: (samples, values) for key, values in planned.items()}, path)


@dataclasses.dataclass
class ExportOptions:
    """What to export."""

    run: tyro.conf.Positional[str]
    """Folder of a run or of a checkpoint, an experiment's name for its newest run, or hf:NAME_OR_FOLDER."""
    format: Literal["hf", "gguf"] = "hf"
    """hf: a folder for Hugging Face's transformers; gguf: a file for llama.cpp (needs cleangpt[gguf])."""
    out: str | None = None
    """Folder or file to write; none: RUN-hf or RUN.gguf in the current folder."""
    force: bool = False
    """Replace an earlier export."""


def export_command(words: list[str]) -> None:
    """cleangpt export RUN"""
    about = "A run's best checkpoint in the format of another program."
    options = parse(ExportOptions, words, program="cleangpt export", about=about)
    from cleangpt.interchange.export import export
    from cleangpt.interchange.huggingface import open_checkpoint

    name = Path(options.run.removeprefix("hf:")).resolve().name
    out = Path(options.out or (f"{name}-hf" if options.format == "hf" else f"{name}.gguf"))
    export(open_checkpoint(options.run), options.format, out, options.force)
    print(f"export: {out}")


def _run_code(code: str | None) -> None:
    if code is not None:
        from cleangpt.experiment_files import find_experiment, run_file

        run_file(find_experiment(code))


def _runs() -> list[str]:
    """The names in runs/."""
    names = sorted(path.name for path in Path("runs").glob("*") if path.is_dir())
    return names or ["a run's folder; there is none in runs/ yet"]


# The demonstration ---------------------------------------------------------------------------------------------------
def demo_command(words: list[str]) -> None:
    """cleangpt demo"""

    @dataclasses.dataclass
    class Options:
        pass

    about = "Trains, scores, samples and reports two small models: an adder and a character model of Python code."
    parse(Options, words, program="cleangpt demo", about=about)
    from cleangpt.commands.demo import demo

    demo()


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": demo_command,
    "list": list_command,
    "prepare": prepare_command,
    "plan": plan_command,
    "tune": tune_command,
    "train": train_command,
    "resume": resume_command,
    "evaluate": evaluate_command,
    "sample": sample_command,
    "chat": chat_command,
    "report": report_command,
    "export": export_command,
}
