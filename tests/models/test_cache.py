"""Reading with a cache gives the logits of reading everything at once, however the tokens come."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cleangpt.models.cache import KVCache
from cleangpt.models.gpt import GPT, GPTConfig
from cleangpt.models.llama import Llama, LlamaConfig

LENGTH, VOCABULARY = 24, 17
SIZE = {"vocab_size": VOCABULARY, "max_seq_len": LENGTH, "n_layers": 3, "n_heads": 4, "dim": 32}
KINDS = {
    "gpt": GPTConfig(**SIZE),
    "llama": LlamaConfig(**SIZE, hidden_dim=48),
    "shared keys": LlamaConfig(**SIZE, hidden_dim=48, n_kv_heads=2, qk_norm=True),
    "window": LlamaConfig(**SIZE, hidden_dim=48, n_kv_heads=1, sliding_window=4),
    "window in some blocks": LlamaConfig(**SIZE, hidden_dim=48, sliding_window=4, global_every=2),
    "documents": LlamaConfig(**SIZE, hidden_dim=48, separator=3),
    "documents in a window": LlamaConfig(**SIZE, hidden_dim=48, separator=3, sliding_window=5),
    "value residual": LlamaConfig(**SIZE, hidden_dim=48, value_residual=True, logit_soft_cap=5.0),
    "experts": LlamaConfig(**SIZE, hidden_dim=48, n_experts=4),
    "n-grams": LlamaConfig(**SIZE, hidden_dim=48, ngrams=(2, 4), ngram_rows=50),
    "n-grams in documents and windows": LlamaConfig(
        **SIZE, hidden_dim=48, ngrams=(3,), ngram_rows=50, separator=3, sliding_window=4
    ),
}


def sharp(kind: str) -> nn.Module:
    """A model that depends much on what it sees."""
    torch.manual_seed(0)
    config = KINDS[kind]
    model = GPT(config) if isinstance(config, GPTConfig) else Llama(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


MODELS = {kind: sharp(kind) for kind in KINDS}
COMMON = ["gpt", "shared keys", "n-grams in documents and windows"]


def every_kind(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a test of one kind of model for each, the common ones by default."""
    kinds = [*COMMON, *(kind for kind in KINDS if kind not in COMMON)]
    return pytest.mark.default(3)(pytest.mark.parametrize("kind", kinds)(test))


def assert_close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@every_kind
@torch.no_grad()
def test_the_models_look_far_enough_back_for_the_tests_to_mean_something(kind: str) -> None:
    """Another token three places back changes the logits by more than the tolerance."""
    model, tokens = MODELS[kind], torch.full((1, 8), 5)
    other = tokens.clone()
    other[0, 4] = 6
    assert (model(tokens)[0, -1] - model(other)[0, -1]).abs().max() > 1e-2


@every_kind
@settings(max_examples=10)
@given(seed=st.integers(0, 1000), cuts=st.sets(st.integers(1, LENGTH - 1)))
@torch.no_grad()
def test_tokens_may_come_in_pieces_of_any_size(kind: str, seed: int, cuts: set[int]) -> None:
    model = MODELS[kind]
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    cache = model.new_cache()
    pieces = torch.tensor_split(tokens, sorted(cuts), dim=1)
    assert_close(torch.cat([model(piece, cache=cache) for piece in pieces], dim=1), model(tokens))


@every_kind
@settings(max_examples=10)
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 14), min_size=3, max_size=3),
    steps=st.lists(st.integers(1, 4), max_size=4),
)
@torch.no_grad()
def test_rows_of_different_lengths_do_not_meet(kind: str, seed: int, lengths: list[int], steps: list[int]) -> None:
    """Shorter rows are padded and taken back to their own lengths; then all grow alike, several tokens at a time."""
    model = MODELS[kind]
    tokens = torch.randint(VOCABULARY, (3, LENGTH + 8), generator=torch.Generator().manual_seed(seed))
    longest, cache = max(lengths), model.new_cache(rollback_tokens=max(lengths) - min(lengths))
    read = model(tokens[:, :longest], cache=cache)
    cache.rewind(lengths)
    alone = [model(row[None, :LENGTH])[0] for row in tokens]
    for row, length in enumerate(lengths):
        assert_close(read[row, :length], alone[row][:length])
    for step in steps:
        if max(lengths) + step > LENGTH:
            break
        new = torch.stack([row[length : length + step] for row, length in zip(tokens, lengths, strict=True)])
        read = model(new, cache=cache)
        for row, length in enumerate(lengths):
            assert_close(read[row], alone[row][length : length + step])
        lengths = [length + step for length in lengths]


@every_kind
@settings(max_examples=10)
@given(
    seed=st.integers(0, 1000),
    lengths=st.tuples(*[st.lists(st.integers(1, 14), min_size=1, max_size=3)] * 2),
    room=st.tuples(st.integers(18, LENGTH), st.integers(18, LENGTH)),
    data=st.data(),
)
@torch.no_grad()
def test_rows_of_two_caches_go_on_in_one(
    kind: str, seed: int, lengths: tuple[list[int], list[int]], room: tuple[int, int], data: st.DataObject
) -> None:
    """Whatever their lengths and the sizes of the caches; then some rows leave, and others are copied."""
    model = MODELS[kind]
    count = len(lengths[0]) + len(lengths[1])
    tokens = torch.randint(VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    caches = []
    for part, rows, size in zip(lengths, tokens.split([len(part) for part in lengths]), room, strict=True):
        cache = model.new_cache(max(part) - min(part))
        cache.resize(size, cache.rollback_tokens)
        model(rows[:, : max(part)], cache=cache)
        cache.rewind(part)
        caches.append(cache)
    cache, other = caches
    cache.join(other)
    alone, ends = [model(row[None])[0] for row in tokens], [*lengths[0], *lengths[1]]
    kept = list(range(count))
    for _ in range(4):
        read = model(torch.stack([tokens[row, ends[row]] for row in kept])[:, None], cache=cache)
        for place, row in enumerate(kept):
            assert_close(read[place, 0], alone[row][ends[row]])
        ends = [end + (row in kept) for row, end in enumerate(ends)]
        places = data.draw(st.lists(st.integers(0, len(kept) - 1), min_size=1, max_size=4))
        kept = [kept[place] for place in places]
        cache.select(places)


@every_kind
@settings(max_examples=10)
@given(seed=st.integers(0, 1000), back=st.integers(1, 5), length=st.integers(6, 16))
@torch.no_grad()
def test_what_is_taken_back_is_as_if_never_read(kind: str, seed: int, back: int, length: int) -> None:
    model = MODELS[kind]
    tokens, others = torch.randint(VOCABULARY, (2, 2, LENGTH), generator=torch.Generator().manual_seed(seed))
    cache = model.new_cache(rollback_tokens=5)
    model(tokens[:, :length], cache=cache)
    cache.rewind([length - back] * 2)
    whole = torch.cat([tokens[:, : length - back], others[:, : back + 2]], dim=1)
    assert_close(model(others[:, : back + 2], cache=cache), model(whole)[:, length - back :])


@every_kind
@torch.no_grad()
def test_logits_may_be_had_after_some_tokens_only(kind: str) -> None:
    model, tokens = MODELS[kind], torch.randint(VOCABULARY, (2, 9))
    positions = torch.tensor([[3, 8], [0, 5]])
    expected = model(tokens)[torch.arange(2)[:, None], positions]
    assert_close(model(tokens, logit_positions=positions), expected)


def test_a_window_bounds_what_is_kept() -> None:
    cache = MODELS["window in some blocks"].new_cache(rollback_tokens=2)
    MODELS["window in some blocks"](torch.zeros(1, 20, dtype=torch.long), cache=cache)
    assert [block.keys.shape[2] for block in cache.blocks] == [6, LENGTH, 6]


def test_heads_that_share_keys_keep_them_once() -> None:
    cache = MODELS["shared keys"].new_cache()
    MODELS["shared keys"](torch.zeros(1, 2, dtype=torch.long), cache=cache)
    assert [block.keys.shape for block in cache.blocks] == [(1, 2, LENGTH, 8)] * 3


def test_a_full_cache_says_so() -> None:
    cache = KVCache([None], max_len=4)
    cache.begin(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="3 tokens and 2 more; this cache holds at most 4"):
        cache.begin(torch.zeros(1, 2, dtype=torch.long))


@every_kind
@settings(max_examples=10)
@given(seed=st.integers(0, 1000), lengths=st.tuples(*[st.integers(1, LENGTH - 8)] * 3))
@torch.no_grad()
def test_a_token_read_from_all_slots_gives_the_same_and_leaves_every_tensor_where_it_is(
    kind: str, seed: int, lengths: tuple[int, ...]
) -> None:
    model = MODELS[kind]
    tokens = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(seed))
    caches = [model.new_cache(rollback_tokens=LENGTH) for _ in range(2)]
    for cache in caches:
        model(tokens[:, : max(lengths)], cache=cache)
        cache.rewind(lengths)
    plain, fixed = caches
    places = [(fixed.lengths.data_ptr(), *(block.keys.data_ptr() for block in fixed.blocks))]
    for step in range(4):
        read = torch.stack([row[length + step] for row, length in zip(tokens, lengths, strict=True)])[:, None]
        expected = model(read, cache=plain)
        with fixed.all_slots():
            assert_close(model(read, cache=fixed), expected)
        fixed.end += 1
        places.append((fixed.lengths.data_ptr(), *(block.keys.data_ptr() for block in fixed.blocks)))
    assert len(set(places)) == 1
    assert fixed.lengths.tolist() == plain.lengths.tolist()
