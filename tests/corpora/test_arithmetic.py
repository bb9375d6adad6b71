"""Adder and multiplier: every row is a true problem, only its answer counts, and the splits share none."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cleangpt.corpora import Adder, Multiplier, prepare_dataset
from cleangpt.corpora.adder_chat import AdderChat
from cleangpt.corpora.arithmetic import Arithmetic
from cleangpt.data.dataset import TokenDataset
from cleangpt.errors import UserError

QUIET = Console(quiet=True)
KINDS = st.sampled_from([Adder, Multiplier])


def solved(left: int, right: int, corpus: Arithmetic) -> str:
    """The row as Python's own arithmetic writes it."""
    n = corpus.digits
    add = isinstance(corpus, Adder)
    result = str(left + right if add else left * right).zfill(n + 1 if add else 2 * n)[::-1]
    sign = ("+" if add else "x") if corpus.operator_sign else ""
    return f"{left:0{n}d}{sign}{right:0{n}d}{'=' if corpus.equals_sign else ''}{result}\n"


def rows(store: TokenDataset, split: str) -> list[str]:
    length = store.row_length
    assert length is not None
    text = store.tokenizer.decode(store.splits[split].read(0, store.splits[split].tokens).tolist())
    return [text[start : start + length] for start in range(0, len(text), length)]


def test_an_addition_reads_as_documented() -> None:
    assert solved(123, 456, Adder()) == "123+456=9750\n"
    assert solved(12, 34, Multiplier(digits=2)) == "12x34=8040\n"


@given(KINDS, st.integers(1, 6), st.booleans(), st.booleans(), st.integers(0, 2**63 - 1), st.data())
def test_every_row_is_a_true_problem(
    kind: type[Arithmetic], digits: int, operator: bool, equals: bool, seed: int, data: st.DataObject
) -> None:
    corpus = kind(digits=digits, operator_sign=operator, equals_sign=equals, seed=seed)
    positions = data.draw(st.lists(st.integers(0, corpus.problems - 1), min_size=1, max_size=20))
    tokens, mask, text_bytes = corpus.rows(np.array(positions, np.int64))
    assert text_bytes == tokens.size
    assert tokens.shape == mask.shape == (len(positions), corpus.row_length)
    for ids, counted in zip(tokens, mask, strict=True):
        row = corpus.tokenizer().decode(ids)
        left, right = int(row[:digits]), int(row[digits + operator : 2 * digits + operator])
        assert row == solved(left, right, corpus)
        answer = "".join(character for character, counts in zip(row, counted, strict=True) if counts)
        assert answer == row[2 * digits + operator + equals :]


@pytest.mark.parametrize("kind", [Adder, Multiplier])
@pytest.mark.parametrize("digits", [1, 2])
def test_the_splits_are_every_problem_once(kind: type[Arithmetic], digits: int, tmp_path: Path) -> None:
    corpus = kind(digits=digits)
    store = prepare_dataset(corpus, tmp_path, console=QUIET)
    parts = {name: rows(store, name) for name in ("train", "val", "test")}
    every = {solved(left, right, corpus) for left in range(10**digits) for right in range(10**digits)}
    assert sorted(itertools.chain(*parts.values())) == sorted(every)
    assert [len(parts[name]) * 10 for name in ("val", "test")] == [len(every), len(every)]


def test_sizes_are_as_asked(tmp_path: Path) -> None:
    corpus = Adder(digits=3, train_samples=70_000, val_samples=30, test_samples=20)
    store = prepare_dataset(corpus, tmp_path, console=QUIET)
    parts = [set(rows(store, name)) for name in ("train", "val", "test")]
    assert [len(part) for part in parts] == [70_000, 30, 20]
    assert len(set.union(*parts)) == 70_050
    assert all(split.masked and split.row_length == 13 for split in store.splits.values())


def test_the_mask_is_stored(tmp_path: Path) -> None:
    store = prepare_dataset(Adder(digits=1), tmp_path, console=QUIET)
    split = store.splits["train"]
    assert split.read_mask(0, split.tokens).reshape(-1, 7).tolist() == [[0, 0, 0, 0, 1, 1, 1]] * 80


def test_by_default_three_digits_are_all_used_and_six_are_capped() -> None:
    assert Adder().sizes() == {"val": 10_000, "test": 10_000, "train": 980_000}
    assert Multiplier(digits=6).sizes() == {"val": 10_000, "test": 10_000, "train": 1_000_000}


def test_another_seed_holds_out_other_problems() -> None:
    positions = np.arange(100)
    assert not np.array_equal(Adder(seed=1).rows(positions)[0], Adder(seed=2).rows(positions)[0])


@pytest.mark.parametrize(
    ("corpus", "field"),
    [
        (Adder(digits=0), "corpus.digits is 0; allowed: 1 to 6"),
        (Multiplier(digits=7), "corpus.digits is 7"),
        (Adder(seed=-1), "corpus.seed is -1"),
        (Adder(digits=1, val_samples=0), "corpus.val_samples is 0"),
        (Adder(digits=1, val_samples=99), "corpus.test_samples"),
        (Adder(digits=1, test_samples=90), "corpus.test_samples is 90; allowed: 1 to 89"),
        (Adder(digits=1, train_samples=81), "corpus.train_samples is 81; allowed: 1 to 80"),
    ],
)
def test_a_field_out_of_range_is_named_and_nothing_is_made(corpus: Arithmetic, field: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        prepare_dataset(corpus, tmp_path / "data", console=QUIET)
    assert field in str(caught.value)
    assert not (tmp_path / "data").exists()


# As conversations ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.data())
def test_an_answer_that_shows_its_work_is_true_at_every_step(digits: int, data: st.DataObject) -> None:
    left, right = (data.draw(st.integers(0, 10**digits - 1)) for _ in range(2))
    *steps, said = AdderChat(digits=digits).answer(left, right).split(", ")
    assert said == f"so {left + right}"
    written = 0
    for place, step in enumerate(steps):
        numbers, total = step.split("=")
        assert sum(map(int, numbers.split("+"))) == int(total)
        written += (int(total) % 10 if place < digits - 1 else int(total)) * 10**place
    assert len(steps) == digits and written == left + right


def test_a_row_is_one_conversation_and_its_answer_is_the_target(tmp_path: Path) -> None:
    corpus = AdderChat(digits=1)
    store = prepare_dataset(corpus, tmp_path, console=QUIET)
    template = store.chat_template
    assert template is not None
    asked = set()
    for split in store.splits.values():
        tokens = split.read(0, split.tokens).reshape(-1, corpus.row_length)
        mask = split.read_mask(0, split.tokens).reshape(tokens.shape)
        for ids, counted in zip(tokens, mask, strict=True):
            text = store.tokenizer.decode(ids.tolist()).rstrip("\0")
            question, answer = text.removeprefix("user\n").split("\nassistant\n")
            left, right = map(int, re.findall(r"\d+", question))
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": corpus.answer(left, right)},
            ]
            assert f"{text}<|endoftext|>" == template.render(messages)
            assert store.tokenizer.decode(ids[counted == 1].tolist()) == answer
            assert ids[counted == 1][-1] == store.tokenizer.eos_id
            asked.add((left, right))
    assert asked == {(left, right) for left in range(10) for right in range(10)}
    assert store.description["splits"]["val"]["text_bytes"] < store.description["splits"]["val"]["tokens"]


def test_the_longest_conversation_fills_a_row() -> None:
    corpus = AdderChat(digits=1)
    tokens, mask, _ = corpus.rows(np.arange(corpus.problems))
    assert (mask[:, -1] == 1).any() and tokens.shape == (100, corpus.row_length)
