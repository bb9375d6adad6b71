"""How a policy acts in simulations: from its distribution over an action's tokens to the action."""

from dataclasses import dataclass
from typing import Literal

from cleangpt.validation import Checked, Count, CountOrZero, Positive


class Lost(Exception):  # noqa: N818 - not an error
    """Raised by an expert that does not know what to do; ends the episode that is recorded."""


@dataclass(frozen=True, kw_only=True)
class Acting(Checked, section="corpus.acting"):
    """How actions are chosen, and what of an episode is in the context."""

    numbers: Literal["mean", "median", "sample", "argmax"] = "mean"
    """For numbers: the bin with the distribution's mean or median, one that is sampled, or the most probable. Experts
    that reach their bounds put much of the probability into the outermost bins, which argmax then always takes."""
    choices: Literal["sample", "argmax"] = "sample"
    """For discrete values."""
    temperature: Positive = 1.0
    """Divides the logits before all that."""
    see_actions: bool = True
    """Whether the policy sees its own earlier actions; some copy them instead of looking at the observation."""
    context: Count | None = None
    """Tokens that the policy reads at most; when an episode outgrows them, the older half of its steps is forgotten.
    None: model.max_seq_len."""
    prompt: CountOrZero = 0
    """Steps of a held-out episode of the corpus that the agent reads before its own, at most; 0: none."""
    target: float | None = None
    """The return to ask for, where the corpus has `returns`; None: the expert's."""
