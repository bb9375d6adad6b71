"""Little stories from a grammar, on every machine and without a network: enough to see a model learn to write one.

Story i takes its words from the digits of i, one digit for each kind of word. A keyed permutation says which story
is at each position, as in `corpora/arithmetic.py`, so no two stories are the same and the splits cannot overlap.
What returns within a story (who it is about, what they wish for, what they give, he or she, the moral for one so proud
or so shy) is what there is to learn besides the words. It is no substitute for the stories of `corpora/tinystories.py`.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from cleangpt.corpora.base import Corpus, write_dataset
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.shuffle import permute
from cleangpt.data.tokenizers import ByteTokenizer
from cleangpt.data.writer import Chunk, Groups
from cleangpt.errors import UserError

GROUP = 1000
"""Stories written at a time."""

WORDS: dict[str, tuple[str, ...]] = {
    "once": (
        "Once upon a time", "Long ago", "Many years ago", "One cold winter", "One warm summer", "One rainy spring",
    ),
    "trait": ("proud", "shy", "lazy", "greedy", "curious", "brave", "lonely", "hasty"),
    "animal": (
        "fox", "hare", "mouse", "badger", "squirrel", "otter", "hedgehog", "beaver", "goat", "lamb", "kitten", "puppy",
    ),
    "hero": (
        "Mia", "Lina", "Ada", "Nora", "Ruby", "Hazel", "Wilma", "Elsa",
        "Tom", "Oscar", "Felix", "Hugo", "Emil", "Jasper", "Otto", "Leo",
    ),
    "home": (
        "in a hollow tree", "under an old bridge", "beside a quiet lake", "at the foot of a hill", "behind a red barn",
        "near a stony brook", "in a garden full of weeds", "at the edge of a wood",
    ),
    "wish": (
        "golden bell", "silver key", "red balloon", "wooden flute", "warm blanket", "blue lantern", "sweet apple",
        "round mirror", "little boat", "glass marble", "green umbrella", "paper kite",
    ),
    "seen": ("in a dream", "in a shop window", "on top of a cart", "in the hands of a king", "in an old book"),
    "way": (
        "through the dark forest", "over the snowy mountain", "across the wide river", "along the dusty road",
        "down into the deep valley", "past the broken mill",
    ),
    "helper": ("owl", "raven", "toad", "heron", "turtle", "donkey", "swan", "mole", "cricket", "bear"),
    "manner": ("kind", "wise", "tired", "cheerful", "grumpy", "gentle"),
    "gift": (
        "a song", "a piece of bread", "a button", "a funny riddle", "a handful of nuts", "a feather", "a kind word",
        "a jar of honey",
    ),
    "place": (
        "under a flat stone", "in the roots of an oak", "behind the waterfall", "at the bottom of a well",
        "inside an empty barrel", "in a nest of straw",
    ),
    "end": (
        "and they were friends for the rest of their lives", "and that night the moon shone for them both",
        "and they shared it every day from then on", "and all who saw it were glad",
    ),
}  # fmt: skip
"""Kinds of word, and the words of each kind."""

MORALS = {
    "proud": "to ask for help is no shame",
    "shy": "a friend may wait behind the first word",
    "lazy": "nothing comes to one who never sets out",
    "greedy": "what is shared grows",
    "curious": "good questions find good answers",
    "brave": "a brave heart may be a gentle one",
    "lonely": "nobody need walk alone",
    "hasty": "the slow road often arrives first",
}
"""What each trait has to learn."""

FEMALE = WORDS["hero"][:8]
STORY = (
    "{once} there lived a {trait} {animal} called {hero} {home}. {hero} had seen a {wish} {seen}, and wanted a {wish} "
    "more than anything else. So one morning {he} went {way} to look for one.\n"
    'On the way {he} met a {manner} {helper}. "Where are you going?" asked the {helper}. "I am looking for a {wish}," '
    'said {hero}. "Give me {gift}, and I will tell you where it is," said the {helper}.\n'
    "{hero} gave the {helper} {gift}. The {helper} smiled and led {him} to the {wish}, which lay {place}. {hero} "
    "thanked the {manner} {helper}, {end}.\n"
    "The {trait} {animal} had learned that {moral}.\n"
)


@dataclass(frozen=True, kw_only=True)
class Fables(Corpus):
    """Stories from a grammar, each a document; one token per byte."""

    train_stories: int = 4000
    """Stories to train on, about 680 bytes each."""
    val_stories: int = 400
    """Stories to validate with."""
    seed: int = 1337
    """Random seed of the choice of stories."""

    def check(self) -> None:
        """Raises UserError for a field out of range."""
        for name in ("train_stories", "val_stories"):
            if not 1 <= getattr(self, name) <= 10**8:
                raise UserError(f"corpus.{name} is {getattr(self, name)}; allowed: 1 to 100,000,000")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"corpus.seed is {self.seed}; allowed: a whole number of 0 or more")

    def story(self, position: int) -> str:
        """The story at a position; the validation stories come first."""
        sizes = [len(words) for words in WORDS.values()]
        (number,) = permute(np.array([position], dtype=np.int64), math.prod(sizes), self.seed)
        digits = np.unravel_index(number, sizes)
        words = {kind: WORDS[kind][digit] for kind, digit in zip(WORDS, digits, strict=True)}
        he, him = ("she", "her") if words["hero"] in FEMALE else ("he", "him")
        return STORY.format(**words, he=he, him=him, moral=MORALS[words["trait"]])

    def prepare(self, folder: Path, console: Console) -> TokenDataset:
        """Writes both splits."""
        total = self.val_stories + self.train_stories
        return write_dataset(self, folder, ByteTokenizer(), self._groups, total, console)

    def _groups(self, start: int) -> Groups:
        tokenizer = ByteTokenizer()
        end = np.array([tokenizer.eos_id], np.int64)
        splits = [("val", 0, self.val_stories), ("train", self.val_stories, self.val_stories + self.train_stories)]
        ranges = [
            (split, begin, min(begin + GROUP, last))
            for split, first, last in splits
            for begin in range(first, last, GROUP)
        ]
        for split, first, last in ranges[start:]:
            rows = [np.append(tokenizer.encode(self.story(position)), end) for position in range(first, last)]
            lengths = np.array([len(row) for row in rows])
            yield last, [Chunk(split, np.concatenate(rows), lengths, int(lengths.sum()) - len(rows))]
