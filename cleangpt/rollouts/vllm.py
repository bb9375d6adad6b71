"""Generation by vLLM, on GPUs, behind the protocol of `Sampler`; needs that package.

The weights are handed over at the start of every round. vLLM's arithmetic is not the trainer's, and its random numbers
are its own, so rollouts differ from the engine's; importance weights (`rollouts.importance_cap`) correct for the first.
Tested with a stand-in for vLLM; it has not been run on hardware yet.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from cleangpt.errors import UserError, require
from cleangpt.inference.engine import Completion
from cleangpt.inference.sampling import Sampling

Weights = Iterable[tuple[str, Tensor]]
"""Names and tensors as Hugging Face has them."""


def load_vllm(folder: str, max_model_len: int, seed: int) -> tuple[Any, Callable[..., Any]]:
    """A `vllm.LLM` of the model exported to `folder`, on this process's GPU, whose log-probabilities are those of the
    distribution sampled from; and `vllm.SamplingParams`.

    Raises:
        UserError: vLLM is not installed.
    """
    vllm: Any = require("vllm")
    llm = vllm.LLM(
        model=folder, skip_tokenizer_init=True, max_model_len=max_model_len, seed=seed,
        logprobs_mode="processed_logprobs", enable_prefix_caching=True,
    )  # fmt: skip
    return llm, vllm.SamplingParams


class VLLMSampler:
    """Collects requests and has vLLM answer all of them at once; those submitted meanwhile come next.

    Args:
        llm: a `vllm.LLM`.
        weights: the policy's current ones.
        sampling_params: `vllm.SamplingParams`.
    """

    def __init__(self, llm: Any, weights: Weights, sampling_params: Callable[..., Any]) -> None:
        self.llm, self.sampling_params = llm, sampling_params
        self._waiting: list[tuple[int, list[int], Any]] = []
        self._submitted = 0
        named = list(weights)
        llm.apply_model(lambda model: model.load_weights(named))
        llm.reset_prefix_cache()  # its keys and values are the old weights'

    def submit(
        self, prompt: Sequence[int], *, max_new_tokens: int, sampling: Sampling, seed: int | None,
        stop_ids: Collection[int], inputs: Mapping[str, Tensor] | None = None,
    ) -> int:  # fmt: skip
        """Adds a request and returns its id.

        Raises:
            UserError: `sampling` leaves tokens out, or the policy reads more than tokens.
        """
        if inputs:
            raise UserError(f"rollouts.sampler is 'vllm'; allowed for prompts with {', '.join(inputs)}: engine")
        if not sampling.plain:
            raise UserError(
                "top_k, top_p, min_p or repetition_penalty is set; allowed with rollouts: a temperature alone"
            )
        params = self.sampling_params(
            temperature=sampling.temperature, max_tokens=max_new_tokens, stop_token_ids=sorted(stop_ids), logprobs=0,
            seed=None if seed is None else seed % 2**63, detokenize=False, ignore_eos=True,
        )  # fmt: skip
        self._waiting.append((self._submitted, list(prompt), params))
        self._submitted += 1
        return self._submitted - 1

    def completions(self) -> Iterator[tuple[int, Completion]]:
        """The id and the tokens of each request, until there are no more."""
        while self._waiting:
            requests, self._waiting = self._waiting, []
            prompts = [{"prompt_token_ids": prompt} for _, prompt, _ in requests]
            outputs = self.llm.generate(prompts, [params for _, _, params in requests], use_tqdm=False)
            for (request_id, _, _), output in zip(requests, outputs, strict=True):
                (answer,) = output.outputs
                ids = list(answer.token_ids)
                logprobs = [found[token].logprob for token, found in zip(ids, answer.logprobs, strict=True)]
                yield request_id, Completion(ids, logprobs, answer.finish_reason)
