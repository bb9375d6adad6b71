"""The reference model: the policy as it was at the start, frozen."""

from collections.abc import Callable
from typing import Any

from cleangpt.distributed.tensors import load_weights
from cleangpt.environments.config import RolloutConfig
from cleangpt.models.base import LanguageModel
from cleangpt.models.lora import adapters_off, is_adapter
from cleangpt.objectives.policy import PolicyObjective


def reads_reference(config: RolloutConfig, objective: PolicyObjective) -> bool:
    """Whether rounds read a reference model."""
    return config.measure_kl or objective.kl_coef > 0


class ReferenceModel:
    """Calls the initial model: the policy with its adapters off, if it has any, else a frozen copy.

    The copy is taken at the first use, before the first update, and is in every snapshot from then on, so that it stays
    the same bit for bit whatever becomes of `init_from`.

    Args:
        policy: the model that is trained.
        build: makes a model of the same architecture, in evaluation mode and sharded in the same way.
    """

    def __init__(self, policy: LanguageModel, build: Callable[[], LanguageModel]) -> None:
        self.policy, self.build = policy, build
        self.adapted = any(is_adapter(name) for name, _ in policy.named_parameters())
        self.copy: LanguageModel | None = None

    def call(self, score: Callable[[LanguageModel], Any]) -> Any:
        """The result of a function of the reference model."""
        if self.adapted:
            with adapters_off(self.policy):
                return score(self.policy)
        if self.copy is None:
            self.copy = self.build()
            self.copy.load_state_dict(self.policy.state_dict())
        return score(self.copy)

    def state_dict(self) -> dict[str, Any]:
        """The copy's weights; empty without one."""
        return {} if self.copy is None else dict(self.copy.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""
        if state:
            self.copy = self.copy or self.build()
            load_weights(self.copy, state)
