"""Episodes as rows of tokens: what the corpora of recorded and of demonstrated episodes share.

A row is the task's text, perhaps a prompt, and as many whole steps of one episode as fit. A prompt is a part of another
episode of the task (Reed et al. 2022, section 2.1), which says what is to be done where observations do not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from cleangpt.corpora.base import Corpus, write_dataset
from cleangpt.data.bpe import train_bpe
from cleangpt.data.columns import Column
from cleangpt.data.dataset import Split, TokenDataset
from cleangpt.data.modalities import Modalities, Space
from cleangpt.data.records import PlacedRecords
from cleangpt.data.shuffle import mix
from cleangpt.data.timesteps import ACTION, FIRST_PLACE, HIDDEN, NO_PLACE, Steps, Timesteps, join_records, returns_to_go
from cleangpt.data.tokenizers import ByteTokenizer, ModalityTokenizer, Tokenizer, load_tokenizer
from cleangpt.data.trajectories import Trajectory
from cleangpt.data.writer import Chunk, Groups
from cleangpt.environments.acting import Acting
from cleangpt.environments.base import Environment
from cleangpt.environments.gymnasium import Arguments, Gymnasium, encode_text, spaces
from cleangpt.errors import UserError, parsing
from cleangpt.validation import Bounds, Count, CountOrZero, File, Share

GROUP = 32
"""Episodes written at a time, and the most that a prompt is chosen from."""
PROMPTS = 64
"""Rows of the validation split that an agent's prompts are chosen from."""
PLACES = {"places": Column(dtype="uint16", role="input")}
"""The column of tokens' places in their observations."""


@dataclass(frozen=True)
class References:
    """What scores are measured by."""

    expert_return: float
    random_return: float


@dataclass(frozen=True, kw_only=True)
class EpisodeCorpus(Corpus):
    """Episodes of one task; several tasks are a mixture, in which a source's weight is the task's."""

    local_fields: ClassVar[tuple[str, ...]] = (*Corpus.local_fields, "tokenizer_file")
    scoring_fields: ClassVar[tuple[str, ...]] = ("scored_episodes", "acting")
    rows_version: ClassVar[int] = 2  # the last row may begin anywhere; objects say on which sides of the start they lie

    env: str
    """Name of the environment in Gymnasium, such as CartPole-v1."""
    arguments: Arguments = ()
    """Keyword arguments of its constructor, in pairs."""
    modalities: Modalities = Modalities()  # noqa: RUF009 - frozen
    """How values become tokens."""
    tokenizer_file: File | None = None
    """The tokenizer of texts: a tokenizer.json, or a model's as hf:NAME; None: bytes."""
    words: str = ""
    """In place of that: words of the texts, in any order, each of which becomes a token; others are in pieces. Needs
    tokenizers."""
    instruction: str = ""
    """A text at the start of every row, before that of the environment, if it has one."""
    row: Annotated[int, Bounds(2, 2**20)] = 128
    """Tokens per sample; data.seq_len must be equal to it, in a mixture at least."""
    windows: Count = 1
    """How many rows each step is in, about: rows begin at other steps each time."""
    prompt_share: Share = 0.0
    """Share of the rows that begin with a prompt, a part of another episode: its end in half of them, else any. The
    paper has 0.25."""
    learn_text: bool = True
    """Whether texts count in the loss, as in the paper. One that says what to do, and follows from nothing, teaches
    nothing."""
    hide_actions: Share = 0.0
    """Share of the rows in which the model cannot see earlier actions, so that it does not learn to copy them."""
    returns: bool = False
    """Begin each observation with the return that is to come (Chen et al. 2021, "Decision transformer")."""
    least_score: Annotated[float, Bounds()] | None = None
    """Leave out episodes that score less, of which 0 is a random policy's and 100 the expert's; the paper's is 80.
    None: keep all."""
    val_share: Annotated[float, Bounds(above=0, below=1)] = 0.05
    """Share of the episodes that are held out for validation."""
    scored_episodes: Count = 50
    """Episodes that the agent plays to be scored."""
    acting: Acting = Acting()  # noqa: RUF009 - frozen
    """How the agent chooses actions."""
    seed: CountOrZero = 1337
    """Random seed of the episodes, of the rows and of the episodes that are scored."""

    # What a subclass defines ------------------------------------------------------------------------------------------

    def survey(self) -> tuple[int, References]:
        """The number of episodes, and the returns of expert and random policy."""
        raise NotImplementedError

    def episodes(self, start: int) -> Iterator[Trajectory]:
        """The episodes from number `start` on."""
        raise NotImplementedError

    def source(self) -> dict[str, Any]:
        """What the dataset is made from, besides the fields."""
        return {}

    # What they share --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises UserError if two fields name a tokenizer."""
        if self.words and self.tokenizer_file is not None:
            raise UserError("corpus.words and corpus.tokenizer_file are both set; allowed: one of them")

    @property
    def row_length(self) -> int:
        """Tokens in every row; a sample has one less."""
        return self.row + 1

    def tokenizer(self) -> ModalityTokenizer:
        """The tokenizer of texts and values."""
        return ModalityTokenizer(self._text_tokenizer(), self.modalities)

    def _text_tokenizer(self) -> Tokenizer:
        if self.words:  # each as at the start of a text, and as after a blank
            return train_bpe([*self.words.split(), f" {self.words}"], 2**16)
        return ByteTokenizer() if self.tokenizer_file is None else load_tokenizer(self.tokenizer_file)

    def steps(self, tokenizer: ModalityTokenizer) -> Timesteps:
        """How steps become tokens."""
        return Timesteps(tokenizer.ranges, *self.spaces(), self.returns)

    def spaces(self) -> tuple[Space, Space]:
        """The spaces of observations and actions."""
        return spaces(self.env, self.arguments, self.modalities)

    def prepare(self, folder: Path, console: Console) -> TokenDataset:
        """Writes both splits."""
        tokenizer, (count, references) = self.tokenizer(), self.survey()
        steps = self.steps(tokenizer)

        def groups(start: int) -> Groups:
            following = self.episodes(start * GROUP)
            for first in range(start * GROUP, count, GROUP):
                numbers = range(first, min(first + GROUP, count))
                played = [next(following) for _ in numbers]
                yield numbers.stop, self._chunks(dict(zip(numbers, played, strict=True)), steps, tokenizer, references)

        return write_dataset(
            self, folder, tokenizer, groups, count, console, source={**vars(references), **self.source()},
            row_length=self.row_length, columns=PLACES, records=steps.records,
        )  # fmt: skip

    def environment(self, dataset: TokenDataset) -> Environment:
        """The simulation of the task, in which checkpoints are scored."""
        assert isinstance(dataset.tokenizer, ModalityTokenizer)
        with parsing(dataset.folder):
            expert, random = (float(dataset.source[name]) for name in ("expert_return", "random_return"))
        return Gymnasium(
            self.env, dataset.tokenizer, self.arguments, acting=self.acting, expert_return=expert, random_return=random,
            episodes=self.scored_episodes, returns=self.returns, instruction=self.instruction, seed=self.seed,
            prompts=self._prompts(dataset, self.steps(dataset.tokenizer)) if self.acting.prompt else (),
        )  # fmt: skip

    def _prompts(self, dataset: TokenDataset, steps: Timesteps) -> list[Steps]:
        """The first steps of some validation rows, as many as an agent is to read, or as the longest row has."""
        split = dataset.splits["val"]
        found = [_first_steps(split, row * self.row_length, self.row_length, steps) for row in range(PROMPTS)
                 if row < split.documents]  # fmt: skip
        for one in found:
            acted = np.isin(one.places, (ACTION, HIDDEN))
            one.places[acted] = ACTION if self.acting.see_actions else HIDDEN
        steps_read = min(self.acting.prompt, max((len(one.tokens) for one in found), default=0))
        return [one.part(0, steps_read) for one in found if len(one.tokens) >= max(steps_read, 1)]

    def remedy(self, split: str) -> str:
        """What to do where a split has no tokens."""
        return "give more episodes"

    def _chunks(
        self, episodes: dict[int, Trajectory], steps: Timesteps, tokenizer: ModalityTokenizer, references: References
    ) -> list[Chunk]:
        """The rows of a group of episodes, by split."""
        low, high = references.random_return, references.expert_return
        least = -np.inf if self.least_score is None else low + self.least_score / 100 * (high - low)
        kept = {number: one for number, one in episodes.items() if one.total >= least}
        rows: dict[str, list[Row]] = {"train": [], "val": []}
        counts = {split: dict.fromkeys(("episodes", "steps", "steps of noise", LEFT_OUT), 0) for split in rows}
        for number, one in episodes.items():
            split = self._split(number)
            counts[split][LEFT_OUT] += number not in kept
            if number in kept:
                counts[split]["episodes"] += 1
                counts[split]["steps"] += len(one)
                counts[split]["steps of noise"] += int((~one.learned).sum())
        encoded = {number: _encode(steps, one) for number, one in kept.items()}
        for number, one in kept.items():
            text = encode_text(tokenizer, self.instruction, one.text)
            others = [other for key, other in encoded.items() if key != number]
            choices = np.random.default_rng(mix(self.seed, number, 1))
            rows[self._split(number)] += self._rows(encoded[number], others, text, choices)
        return [self._chunk(split, found, counts[split]) for split, found in rows.items()]

    def _split(self, number: int) -> str:
        """The split of an episode, by a hash of its number; the first two are in one each."""
        share = mix(self.seed, number, 2) / 2**64
        return ("val", "train")[number] if number < 2 else "val" if share < self.val_share else "train"

    def _rows(
        self, episode: Steps, others: Sequence[Steps], text: NDArray[np.int64], choices: np.random.Generator
    ) -> Iterator["Row"]:
        """The rows of an episode, padded."""
        room = (self.row_length - len(text)) // episode.tokens.shape[1]
        if room < 1:
            raise UserError(
                f"corpus.row is {self.row}; allowed: {len(text) + episode.tokens.shape[1] - 1} or more, into which a "
                "text and a step fit"
            )
        for start in self._starts(len(episode.tokens), room, choices):
            parts = list[Steps]()
            if others and choices.random() < self.prompt_share:
                parts.append(_prompt(others[int(choices.integers(len(others)))], room // 2, choices))
            left = room - sum(len(part.tokens) for part in parts)
            parts.append(episode.part(start, start + left))
            hidden = choices.random() < self.hide_actions
            yield _row(text, parts, self.row_length, hidden, self.learn_text)

    def _starts(self, length: int, room: int, choices: np.random.Generator) -> list[int]:
        """The first step of every row, which cover all steps; the first row is full where the episode is long enough.

        Where the last row begins, chance decides. If it always ended with the episode, a full context would tell the
        agent that the end has come, such as the time to drop what it carries.
        """
        starts = list[int]()
        for _ in range(self.windows):
            offset = int(choices.integers(room)) if length > room else 0
            starts += np.unique(np.arange(-offset, length, room).clip(0)).tolist()
        return starts

    def _chunk(self, split: str, rows: Sequence["Row"], counts: dict[str, int]) -> Chunk:
        if not rows:
            none = np.zeros(0, np.int64)
            return Chunk(split, none, none, 0, none.astype(np.uint8), counts, {"places": none})
        tokens, places, mask, records = zip(*rows, strict=True)
        return Chunk(
            split, np.concatenate(tokens), np.full(len(rows), self.row_length), 0, np.concatenate(mask), counts,
            {"places": np.concatenate(places)}, join_records([(of_row, self.row_length) for of_row in records]),
        )  # fmt: skip


LEFT_OUT = "left out, their return"
"""A count on the card."""


class Row(NamedTuple):
    """A row of a dataset; all but the records are `(row_length,)`."""

    tokens: NDArray[np.int64]
    places: NDArray[np.int64]
    mask: NDArray[np.uint8]
    records: dict[str, PlacedRecords]


def _first_steps(split: Split, start: int, length: int, steps: Timesteps) -> Steps:
    """The steps in the row of a dataset that begins at token `start`, without its text and padding."""
    places = split.read_column("places", start, length).astype(np.int64)
    begins = np.flatnonzero(places == FIRST_PLACE)
    first, count = int(begins[0]) if len(begins) else 0, len(begins)
    taken, shape = slice(first, first + count * steps.size), (count, steps.size)
    tokens = split.read(start, length).astype(np.int64)[taken].reshape(shape)
    found = Steps(tokens, places[taken].reshape(shape), np.zeros(shape, np.uint8))
    empty = steps.observe(steps.observation.stack([]))
    for name, ends in empty.ends.items():
        placed = split.records[name].read(start, length)
        found.records[name] = placed.values.reshape(count, len(ends), *placed.values.shape[1:])
        found.ends[name] = ends
    return found


def _encode(steps: Timesteps, episode: Trajectory) -> Steps:
    seen, done, learned = episode.steps(0, len(episode))
    return steps.encode(seen, done, learned, returns_to_go(episode.rewards))


def _prompt(episode: Steps, room: int, choices: np.random.Generator) -> Steps:
    """A part of an episode: in half of the cases its end."""
    last = max(0, len(episode.tokens) - room)
    start = last if choices.random() < 0.5 else int(choices.integers(last + 1))
    return episode.part(start, start + room)


def _row(text: NDArray[np.int64], parts: Sequence[Steps], length: int, hidden: bool, learn_text: bool) -> Row:
    """A row: text, which counts in the loss if `learn_text`, and steps; padding is token 0 and never counts."""
    records = join_records([({}, len(text)), *((part.placed(), part.tokens.size) for part in parts)])
    row = Row(np.zeros(length, np.int64), np.full(length, NO_PLACE), np.zeros(length, np.uint8), records)
    row.tokens[: len(text)], row.mask[: len(text)] = text, learn_text
    end = len(text)
    for part in parts:
        begin, end = end, end + part.tokens.size
        row.tokens[begin:end], row.places[begin:end] = part.tokens.reshape(-1), part.places.reshape(-1)
        row.mask[begin:end] = part.mask.reshape(-1)
    if hidden:
        row.places[row.places == ACTION] = HIDDEN
    return row
