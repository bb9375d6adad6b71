"""Openings of fables: one sentence that begins as asked and is scored by the bright words in it.

The grammar of `corpora/fables.py` writes such sentences. A model that has learned them from it scores about 1.3; the
best that the grammar allows is 5. What a model gives up for a higher score shows in the share of its sentences that
are still the grammar's.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

from cleangpt.data.dataset import TokenDataset
from cleangpt.environments.base import Environment, Episode, Feedback, Prompt

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
"""The words of each kind."""

LONGEST = 24
"""Maximum number of tokens in an answer; the grammar's have about 11."""

BRIGHT = frozenset(
    {
        "brave", "curious", "kitten", "puppy", "lamb", "squirrel", "Mia", "Ruby", "Leo", "Oscar", "quiet", "lake",
        "garden", "hill",
    }
)  # fmt: skip
"""The words that are wanted."""


def opening(trait: str, animal: str, hero: str, home: str) -> str:
    """What follows the prompt in the grammar's first sentence."""
    return f" {trait} {animal} called {hero} {home}."


def prompts() -> list[str]:
    """The texts that a sentence may begin with."""
    return [f"{once} there lived a" for once in WORDS["once"]]


def _choice(words: list[str] | tuple[str, ...]) -> str:
    return f"(?:{'|'.join(map(re.escape, words))})"


CHOICES = [_choice(WORDS[kind]) for kind in ("trait", "animal", "hero", "home")]
GRAMMAR = re.compile(_choice(prompts()) + opening(*CHOICES).removesuffix(".") + r"\.")


def grammatical(text: str) -> bool:
    """Whether a text is exactly one of the grammar's sentences."""
    return GRAMMAR.fullmatch(text) is not None


def gold(text: str, ended: bool = True) -> float:
    """The number of different bright words in a text, minus 0.5 for each repeated one, and 1 if it has not `ended`."""
    found = [word for word in re.findall(r"[A-Za-z]+", text) if word in BRIGHT]
    return len(set(found)) - 0.5 * (len(found) - len(set(found))) - (not ended)


@dataclass(frozen=True)
class FablesGold(Environment):
    """Each sample of a dataset of openings is a task: its prompt is to be continued, and `gold` scores the sentence."""

    metric: ClassVar[str] = "gold"

    dataset: TokenDataset
    """With a row length and a loss mask that starts where the prompt ends."""

    def tasks(self, split: str) -> int:
        """The number of samples in the split."""
        return self.dataset.splits[split].documents

    def reset(self, split: str, task: int) -> Prompt:
        """The prompt of a sample."""
        tokens, counted = self.dataset.splits[split].read_row(task)
        stop_ids = tuple(self.dataset.tokenizer.stop_ids)
        return Prompt(tokens[: counted.index(1)], max_new_tokens=LONGEST, stop_ids=stop_ids)

    def step(self, episode: Episode, action: list[int]) -> Feedback:
        """The score of the sentence, which has ended if the end-of-text token is last."""
        text = self.dataset.tokenizer.decode([*episode.prompt.tokens, *action])
        return Feedback(reward=gold(text, ended=action[-1:] == [self.dataset.tokenizer.eos_id]))

    def measures(self, episode: Episode) -> dict[str, float]:
        """Whether the sentence is grammatical."""
        return {"grammatical": float(grammatical(self.dataset.tokenizer.decode(episode.tokens)))}
