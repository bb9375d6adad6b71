"""Greedy generation is Hugging Face's, with and without a cache; whatever else is in the batch changes nothing."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, MistralForCausalLM, MixtralForCausalLM, PreTrainedModel, Qwen3ForCausalLM
from transformers import LlamaForCausalLM as TheirLlama

from cleangpt.config import ModelConfig
from cleangpt.errors import UserError
from cleangpt.inference.engine import Engine, Token
from cleangpt.inference.sampling import GREEDY, Sampling
from cleangpt.interchange.huggingface import mapping_of
from cleangpt.models import build_model
from cleangpt.models.base import LanguageModel
from cleangpt.models.gpt import GPTConfig
from cleangpt.models.llama import LlamaConfig
from tests.generation import greedy
from tests.scripted import Bigrams

CPU = torch.device("cpu")
CONFIG = GPTConfig(vocab_size=50, max_seq_len=24, n_layers=2, n_heads=2, dim=32)
LLAMA: dict[str, Any] = {
    "vocab_size": 50, "max_seq_len": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "dim": 32, "hidden_dim": 48
}  # fmt: skip
KINDS = {
    "gpt2": (CONFIG, GPT2LMHeadModel),
    "llama": (LlamaConfig(**LLAMA), TheirLlama),
    "mistral": (LlamaConfig(**LLAMA, sliding_window=4), MistralForCausalLM),
    "qwen3": (LlamaConfig(**LLAMA, qk_norm=True), Qwen3ForCausalLM),
    "mixtral": (LlamaConfig(**LLAMA, n_experts=4), MixtralForCausalLM),
}
DOCUMENTS = LlamaConfig(**LLAMA, ngrams=(2, 3), ngram_rows=60, separator=3, sliding_window=5)
"""Everything that a cache keeps besides keys and values."""


def model(config: ModelConfig = CONFIG, seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    built = build_model(config)
    for parameter in built.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return built.eval()


MODELS = {"gpt2": model(), "mistral": model(KINDS["mistral"][0]), "documents": model(DOCUMENTS), "bigrams": Bigrams(1)}


def theirs_of(ours: nn.Module, config: Any, kind: type[PreTrainedModel]) -> PreTrainedModel:
    """Hugging Face's model with the same weights."""
    mapping = mapping_of(config)
    entries = mapping.config_to_huggingface(config)
    built = kind(kind.config_class(**{name: value for name, value in entries.items() if name != "architectures"}))
    missing, strange = built.load_state_dict(mapping.to_huggingface(config, ours.state_dict()), strict=False)
    assert not strange and set(missing) <= {"lm_head.weight"}
    built.tie_weights()
    return built.eval()


def expected_tokens(theirs: PreTrainedModel, prompts: Tensor, count: int) -> Tensor:
    return theirs.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=count, min_new_tokens=count, do_sample=False,
        pad_token_id=0, eos_token_id=None,
    )[:, prompts.shape[1] :]  # fmt: skip


def ids(tokens: Sequence[Token]) -> list[int]:
    return [token.id for token in tokens]


def alone(
    model: LanguageModel, prompt: Sequence[int], count: int, sampling: Sampling = GREEDY, **options: Any
) -> list[int]:
    (completion,) = Engine(model, CPU, **options).generate([prompt], max_new_tokens=count, sampling=sampling)
    return ids(completion.tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_is_that_of_hugging_face_with_and_without_a_cache(kind: str) -> None:
    config, their_kind = KINDS[kind]
    ours, prompts = model(config), torch.randint(50, (3, 5), generator=torch.Generator().manual_seed(1))
    if kind == "mixtral":  # Hugging Face keeps experts stacked in memory, and apart in files only
        expected = greedy(ours, prompts, 15, cached=False)
    else:
        expected = expected_tokens(theirs_of(ours, config, their_kind), prompts, 15)
    assert torch.equal(greedy(ours, prompts, 15), expected)
    assert torch.equal(greedy(ours, prompts, 15, cached=False), expected)


@pytest.mark.default(2)
@pytest.mark.parametrize("kind", ["documents", *KINDS])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.5, seed=3, repetition_penalty=1.3)])
def test_each_row_of_a_batch_gets_what_it_would_get_alone(kind: str, sampling: Sampling) -> None:
    """Beyond the longest sequence too, which the rows reach one after the other."""
    ours = model(DOCUMENTS if kind == "documents" else KINDS[kind][0])
    prompts = [[1], list(range(20)), [4, 2, 9, 9, 1, 3]]
    for cached in (True, False):
        together = Engine(ours, CPU, cached=cached).generate(prompts, max_new_tokens=40, sampling=sampling)
        for row, prompt in enumerate(prompts):
            one = Sampling(**{**vars(sampling), "seed": sampling.seed + row})
            assert ids(together[row].tokens) == alone(ours, prompt, 40, one, cached=not cached)


SAMPLINGS = [GREEDY, Sampling(temperature=1.5), Sampling(top_k=7, min_p=0.01), Sampling(repetition_penalty=1.4)]
requests = st.tuples(
    st.lists(st.integers(0, 3), min_size=1, max_size=30),  # the prompt; the fewest tokens that any of MODELS has
    st.integers(1, 30),  # max_new_tokens
    st.sampled_from(SAMPLINGS),
    st.integers(0, 2),  # the seed
    st.integers(0, 20),  # the step at which it is submitted
)


@pytest.mark.default(1)
@pytest.mark.parametrize("kind", ["documents", *(kind for kind in MODELS if kind != "documents")])
@settings(max_examples=6)
@given(submitted=st.lists(requests, min_size=2, max_size=6), max_batch=st.integers(1, 4))
def test_rows_that_join_and_leave_do_not_change_each_other(kind: str, submitted: list[Any], max_batch: int) -> None:
    ours = MODELS[kind]
    engine, tokens, requested = Engine(ours, CPU, max_batch=max_batch), dict[int, list[Token]](), dict[int, Any]()
    for step in range(200):
        for prompt, count, sampling, seed, at in submitted:
            if at == step:
                request_id = engine.submit(prompt, max_new_tokens=count, sampling=sampling, seed=seed)
                requested[request_id] = (prompt, count, Sampling(**{**vars(sampling), "seed": seed}))
        outputs = engine.step()
        assert len(outputs) <= max_batch
        for request_id, output in outputs.items():
            tokens.setdefault(request_id, []).append(output.token)
    assert not engine.unfinished and len(requested) == len(submitted)
    for request_id, (prompt, count, sampling) in requested.items():
        (expected,) = Engine(ours, CPU).generate([prompt], max_new_tokens=count, sampling=sampling)
        assert ids(tokens[request_id]) == ids(expected.tokens)
        logprobs = [token.logprob for token in tokens[request_id]]
        assert logprobs == pytest.approx([token.logprob for token in expected.tokens], abs=1e-4)


def test_a_request_joins_the_running_batch_at_the_next_step_and_leaves_at_its_end() -> None:
    engine, passes = Engine(model(), CPU), list[int]()
    engine.model.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    first = engine.submit([1, 2], max_new_tokens=5)
    assert engine.step().keys() == {first}
    second = engine.submit([3], max_new_tokens=2)
    assert [outputs.keys() for outputs in engine.steps()] == [{first, second}] * 2 + [{first}] * 2
    assert passes == [1, 1, 1, 2, 1, 1]


def test_samples_of_one_prompt_share_its_prefill() -> None:
    ours, prompt = model(), [1, 2, 3]
    sampling, passes = Sampling(temperature=1.5, seed=5), list[torch.Size]()
    expected = [alone(ours, prompt, 6, Sampling(temperature=1.5, seed=5 + row)) for row in range(4)]
    ours.register_forward_hook(lambda module, inputs, output: passes.append(inputs[0].shape))
    together = Engine(ours, CPU).generate([prompt] * 4, max_new_tokens=6, sampling=sampling)
    assert [ids(completion.tokens) for completion in together] == expected
    assert passes == [(1, 3), *[(4, 1)] * 5]


def test_a_cancelled_request_gets_no_more_tokens() -> None:
    engine = Engine(model(), CPU, max_batch=2)
    first, second, third = (engine.submit([number], max_new_tokens=9) for number in (1, 2, 3))
    engine.step()
    engine.cancel(first)
    assert engine.step().keys() == {second, third}
    engine.cancel(third)
    engine.cancel(second)
    assert not engine.unfinished and engine.step() == {}


def test_a_text_that_is_too_long_continues_from_its_last_half() -> None:
    ours, tokens, window = model(), list(range(20)), list(range(20))
    for token in alone(ours, tokens, 40):
        if len(window) > 24:
            window = window[-12:]
        assert token == int(ours(torch.tensor([window]))[0, -1].argmax())
        window.append(token)


def test_only_the_rows_that_are_too_long_are_read_again() -> None:
    ours, passes = model(), list[torch.Size]()
    ours.register_forward_hook(lambda module, inputs, output: passes.append(inputs[0].shape))
    Engine(ours, CPU).generate([[1], list(range(20))], max_new_tokens=8)
    assert passes == [(2, 20), *[(2, 1)] * 4, (1, 1), (1, 12), *[(2, 1)] * 2]


def test_a_stop_token_ends_its_row_alone_and_is_its_last() -> None:
    ours, prompts = model(), [[1], [2]]
    complete = [ids(completion.tokens) for completion in Engine(ours, CPU).generate(prompts, max_new_tokens=30)]
    stop = complete[0][4]
    engines = {"of the engine": (Engine(ours, CPU, eos_ids={stop}), ()), "of the request": (Engine(ours, CPU), {stop})}
    for engine, stop_ids in engines.values():
        for completion, expected in zip(
            engine.generate(prompts, max_new_tokens=30, stop_ids=stop_ids), complete, strict=True
        ):
            length = [*expected, stop].index(stop) + 1
            assert ids(completion.tokens) == expected[:length]
            assert completion.finish_reason == ("stop" if stop in expected else "length")
    assert stop not in complete[1] or complete[1].index(stop) != complete[0].index(stop)


def test_padding_of_the_vocabulary_is_never_sampled() -> None:
    assert max(alone(model(), [1], 200, Sampling(temperature=5.0), vocab_size=10)) < 10
    assert max(alone(model(), [1], 50, vocab_size=10)) < 10


def test_log_probabilities_are_those_of_the_model_itself() -> None:
    """Whatever the temperature and the restrictions with which the token was sampled; over the tokenizer's tokens."""
    ours, prompt = model(), [3, 1, 4]
    sampling = Sampling(temperature=2.0, top_k=5)
    (completion,) = Engine(ours, CPU, vocab_size=40).generate([prompt], max_new_tokens=15, sampling=sampling)
    text = prompt + ids(completion.tokens)
    expected = ours(torch.tensor([text]))[0, :, :40].log_softmax(-1).detach()
    for place, token in enumerate(completion.tokens, start=2):
        assert token.logprob == pytest.approx(float(expected[place, token.id]), abs=1e-4)
    (scored,) = Engine(ours, CPU, vocab_size=40).logprobs([text])
    assert scored[2:].tolist() == pytest.approx([token.logprob for token in completion.tokens], abs=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_log_probabilities_of_given_texts_are_those_of_each_text_alone(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, generator = MODELS[kind], torch.Generator().manual_seed(0)
    rows = [torch.randint(4, (length,), generator=generator).tolist() for length in (3, 16, 1, 7, 2, 17, 7)]
    for held in (4096, 20, 1):
        monkeypatch.setattr("cleangpt.inference.engine.SCORED_TOKENS", held)
        for row, scored in zip(rows, Engine(ours, CPU).logprobs(rows), strict=True):
            expected = ours(torch.tensor([row[:16]]))[0].log_softmax(-1).detach()
            assert len(scored) == len(row) - 1
            for place, token in enumerate(row[1:]):
                assert float(scored[place]) == pytest.approx(float(expected[place, token]), abs=1e-4)


def test_what_the_model_cannot_read_is_refused_in_one_line() -> None:
    engine = Engine(model(), CPU)
    with pytest.raises(UserError, match="the prompt has no tokens"):
        engine.submit([], max_new_tokens=1)
    with pytest.raises(UserError, match="the prompt has the token 50; allowed: 0 to 49"):
        engine.generate([[1], [50]], max_new_tokens=1)
    with pytest.raises(UserError, match="a text has 26 tokens; allowed: up to 25"):
        engine.logprobs([[1] * 26])


def test_logits_that_are_not_finite_are_told_in_one_line() -> None:
    broken = model()
    nn.init.constant_(next(broken.parameters()), torch.nan)
    for sampling in (GREEDY, Sampling()):
        with pytest.raises(UserError, match="not finite"):
            Engine(broken, CPU).generate([[1]], max_new_tokens=1, sampling=sampling)


def test_a_model_without_a_cache_reads_everything_again_each_time() -> None:
    tokens = alone(Bigrams(1), [0], 40)
    for before, after in zip([0, *tokens], tokens, strict=False):
        assert after == int(Bigrams(1).table[before].argmax())


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_tokens() -> None:
    ours, prompts = model(KINDS["mistral"][0]), [[1, 2, 3], [4]]
    plain, compiled = (
        [ids(row.tokens) for row in Engine(ours, CPU, compiled=compiled).generate(prompts, max_new_tokens=40)]
        for compiled in (False, True)
    )
    assert plain == compiled


def test_what_a_row_samples_follows_from_its_seed() -> None:
    ours, sampling = model(), Sampling(seed=11)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = alone(ours, [1], 10, sampling)
    assert one == alone(ours, [1], 10, sampling)
    assert one != alone(ours, [1], 10, Sampling(seed=12))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_long_row_that_has_ended_makes_room_before_its_cache_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others that have joined later go on; it is one of too many to leave by itself."""
    monkeypatch.setattr("cleangpt.inference.decoding.cache_slots", lambda needed, compiled: needed)
    ours, engine = model(), Engine(model(), CPU)
    requests = [(list(range(12)), 3), *(([number], 13) for number in range(7))]
    numbers = [engine.submit(requests[0][0], max_new_tokens=requests[0][1])]
    engine.step()
    numbers += [engine.submit(prompt, max_new_tokens=count) for prompt, count in requests[1:]]
    found = dict(engine.completions())
    assert [found[number].ids for number in numbers] == [alone(ours, prompt, count) for prompt, count in requests]
