"""Values as tokens and back."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cleangpt.data.modalities import PAPER, Box, Dict, Discrete, Modalities, TokenRanges, inverse_mu_law, mu_law
from cleangpt.data.tokenizers import ByteTokenizer, CharTokenizer, ModalityTokenizer, from_json
from cleangpt.errors import UserError

RANGES = TokenRanges(257)
LAYOUTS = [
    TokenRanges(257, Modalities(bins=bins, choices=9, choice_ids=ids, action_bins=own, separator=separator))
    for bins, ids, own, separator in itertools.product((2, 1024), ("own", "text"), ("shared", "own"), ("own", "none"))
]
numbers = st.floats(-1e4, 1e4)


def test_the_papers_layout_is_that_of_its_section_2_1() -> None:
    ranges = TokenRanges(32_000, PAPER)
    assert Box((1,)).ids(ranges)[0][:2] == (32_000, 33_024)
    assert Discrete((1024,)).ids(ranges)[0][:2] == (0, 1024)
    assert ranges.separator == 33_024


@pytest.mark.parametrize("ranges", LAYOUTS, ids=str)
def test_ranges_do_not_overlap_but_where_they_are_shared(ranges: TokenRanges) -> None:
    modalities = ranges.modalities
    used = [set(range(257)), {*range(*Box((1,)).ids(ranges)[0][:2])}]
    if modalities.action_bins == "own":
        used.append({*range(*Box((1,)).ids(ranges, action=True)[0][:2])})
    if modalities.choice_ids == "own":
        used.append({*range(*Discrete((9,)).ids(ranges)[0][:2])})
    if ranges.separator is not None:
        used.append({ranges.separator})
    assert sorted(itertools.chain(*used)) == list(range(ranges.vocab_size))


@given(numbers)
def test_the_mu_law_is_that_of_the_paper(x: float) -> None:
    expected = math.copysign(math.log(abs(x) * 100 + 1) / math.log(256 * 100 + 1), x)
    assert mu_law(np.array(x)) == pytest.approx(expected)
    assert inverse_mu_law(mu_law(np.array(x))) == pytest.approx(x, rel=1e-9, abs=1e-12)


@given(st.lists(numbers, min_size=6, max_size=6), st.booleans(), st.sampled_from(LAYOUTS))
def test_a_number_comes_back_within_half_a_bin_or_clipped(
    values: list[float], action: bool, ranges: TokenRanges
) -> None:
    box, array = Box((2, 3)), np.array(values).reshape(1, 2, 3)
    tokens = box.encode(array, ranges, action)
    first, end, _ = box.ids(ranges, action)[0]
    assert tokens.shape == (1, 6) and first <= tokens.min() <= tokens.max() < end
    back = box.decode(tokens, ranges, action)
    difference = mu_law(back) - np.clip(mu_law(array), -1, 1)
    assert back.shape == (1, 2, 3) and np.abs(difference).max() <= 1 / ranges.modalities.bins + 1e-9


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=2))
def test_a_bounded_number_is_scaled_by_its_bounds(values: list[float]) -> None:
    box = Box((2,), low=(-2.0, 0.0), high=(2.0, 3.0))
    back = box.decode(box.encode(np.array([values]), RANGES, action=True), RANGES, action=True)[0]
    for value, found, low, high in zip(values, back, box.low, box.high, strict=True):
        assert abs(found - min(max(value, low), high)) <= (high - low) / 1024 / 2 + 1e-9


def test_actions_in_minus_1_to_1_are_not_compressed() -> None:
    box = Box((1,), low=(-1.0,), high=(1.0,))
    tokens = box.encode(np.array([[-1.0], [-0.5], [0.0], [0.5], [0.999], [1.0], [7.0]]), RANGES)
    assert (tokens[:, 0] - RANGES.first_bin).tolist() == [0, 256, 512, 768, 1023, 1023, 1023]


@pytest.mark.parametrize("ranges", LAYOUTS, ids=str)
@pytest.mark.parametrize("box", [Box((1,)), Box((1,), low=(-3.0,), high=(4.0,))], ids=["mu-law", "bounds"])
def test_every_bin_decodes_to_its_centre_which_is_of_that_bin(ranges: TokenRanges, box: Box) -> None:
    tokens = np.arange(*box.ids(ranges)[0][:2])[:, None]
    values = box.decode(tokens, ranges)
    assert np.array_equal(box.encode(values, ranges), tokens)
    bins = ranges.modalities.bins
    edges = np.linspace(-1, 1, bins + 1)
    assert np.allclose(box.compress(values, ranges)[:, 0], (edges[:-1] + edges[1:]) / 2)


@pytest.mark.parametrize("ranges", LAYOUTS, ids=str)
def test_discrete_values_come_back(ranges: TokenRanges) -> None:
    space = Discrete((3, 9), (2,), (-1, 5))
    values = np.array([[one, other] for one in range(-1, 2) for other in range(5, 14)])
    assert np.array_equal(space.decode(space.encode(values, ranges), ranges), values)
    single = Discrete((9,))
    assert np.array_equal(single.decode(single.encode(np.arange(9), ranges), ranges), np.arange(9))
    flags = Discrete((2, 2), (2,), boolean=True)
    truth = np.array(list(itertools.product([False, True], repeat=2)))
    back = flags.decode(flags.encode(truth, ranges), ranges)
    assert back.dtype == bool and np.array_equal(back, truth)


def test_dictionaries_are_flattened_in_the_order_of_their_keys() -> None:
    inner = Dict((("z", Discrete((4,))), ("a", Box((2,)))))
    space = Dict((("b", inner), ("B", Discrete((4,))), ("a", Box((1,)))))
    value = {"a": np.array([0.1]), "B": 2, "b": {"a": np.array([0.2, 0.3]), "z": 3}}
    batch = space.stack([value, value])
    parts = [
        Discrete((4,)).encode(np.array([2]), RANGES),
        Box((1,)).encode(np.array([[0.1]]), RANGES),
        Box((2,)).encode(np.array([[0.2, 0.3]]), RANGES),
        Discrete((4,)).encode(np.array([3]), RANGES),
    ]
    tokens = space.encode(batch, RANGES)
    assert np.array_equal(tokens, np.tile(np.concatenate(parts, axis=1), (2, 1)))
    assert [ids.numeric for ids in space.ids(RANGES)] == [False, True, True, True, False] and space.size == 5
    back = space.decode(tokens, RANGES)
    assert back["B"].tolist() == [2, 2] and back["b"]["z"].tolist() == [3, 3]
    assert np.allclose(back["b"]["a"], [[0.2, 0.3]], atol=0.01)


@pytest.mark.parametrize(
    ("space", "values", "message"),
    [
        (Box((2,)), [[1.0, math.nan]], "NaN"),
        (Box((2,)), [[1.0]], "1 numbers; allowed in this space: 2"),
        (Discrete((3,)), [3], "below 3"),
        (Discrete((3,)), [-1], "below 3"),
        (Discrete((3, 3), (2,)), [[1]], "allowed in this space: 2"),
        (Discrete((2000,)), [1], "2,000 possibilities; allowed: 1,024"),
        (Dict((("a", Box((1,))),)), {"b": [[1.0]]}, "no 'a'"),
    ],
)
def test_other_values_are_refused(space: Box | Discrete | Dict, values: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        space.encode(values, RANGES)


@pytest.mark.parametrize("text", [ByteTokenizer(), CharTokenizer("abc\n", "\n")])
@pytest.mark.parametrize("modalities", [Modalities(), Modalities(bins=8, choices=4, action_bins="own"), PAPER])
def test_the_tokenizer_is_written_and_read(text: ByteTokenizer | CharTokenizer, modalities: Modalities) -> None:
    tokenizer = ModalityTokenizer(text, modalities)
    again = from_json(tokenizer.to_json())
    assert isinstance(again, ModalityTokenizer) and again.to_json() == tokenizer.to_json()
    assert (again.ranges, again.vocab_size, again.eos_id) == (tokenizer.ranges, tokenizer.vocab_size, text.eos_id)
    ids = tokenizer.encode("abcab").tolist()
    assert tokenizer.decode(ids) == "abcab" == "".join(tokenizer.token_bytes(token).decode() for token in ids)
    first = text.vocab_size
    assert tokenizer.decode([*ids[:2], first, first + 3, ids[2]]) == "ab⟨0⟩⟨3⟩c"


def test_a_tokenizer_with_unknown_fields_is_refused() -> None:
    facts = ModalityTokenizer(ByteTokenizer(), Modalities()).to_json().replace('"mu"', '"nu"')
    with pytest.raises(UserError, match=r"modalities\.nu is not a field of Modalities; did you mean 'mu'"):
        from_json(facts)


def test_fields_are_checked() -> None:
    with pytest.raises(UserError, match=r"corpus\.modalities\.bins is 1"):
        replace(Modalities(), bins=1)
