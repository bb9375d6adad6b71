"""Episodes as rows: of an expert that plays now, and of files."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cleangpt.corpora import prepare_dataset
from cleangpt.corpora.demonstrations import Demonstrations
from cleangpt.corpora.episode_files import read_episodes, read_minari, write_episodes, write_minari
from cleangpt.corpora.episode_rows import EpisodeCorpus
from cleangpt.corpora.episodes import Episodes, expert_return
from cleangpt.data.dataset import TokenDataset
from cleangpt.data.modalities import Modalities
from cleangpt.data.timesteps import ACTION, FIRST_PLACE, HIDDEN
from cleangpt.data.trajectories import Trajectory
from cleangpt.environments.acting import Acting
from cleangpt.environments.gymnasium import Gymnasium, spaces
from cleangpt.errors import UserError
from cleangpt.rollouts.agent import Context
from tests.simulated import register

pytest.importorskip("gymnasium")

CARS = Demonstrations(
    env="MountainCar-v0", played=14, row=43, reference_episodes=2, noisy_share=0.5, noise=0.05, val_share=0.2
)
"""Steps of 4 tokens: two of the observation, separator, action."""


def prepared(corpus: EpisodeCorpus, folder: Path) -> TokenDataset:
    return prepare_dataset(corpus, folder, console=Console(quiet=True))


def rows(dataset: TokenDataset, split: str) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Tokens, mask, and places of each row."""
    length = dataset.row_length or 0
    for number in range(dataset.splits[split].documents):
        places = dataset.splits[split].read_column("places", number * length, length)
        yield *dataset.splits[split].read_row(number), places.tolist()


def steps_of(corpus: EpisodeCorpus) -> list[list[tuple[list[int], list[int]]]]:
    """Tokens and mask of every step of every episode."""
    steps = corpus.steps(corpus.tokenizer())
    found = []
    for episode in corpus.episodes(0):
        encoded = steps.encode(*episode.steps(0, len(episode)))
        found.append(list(zip(encoded.tokens.tolist(), encoded.mask.tolist(), strict=True)))
    return found


def row_steps(tokens: list[int], mask: list[int], size: int = 4) -> list[tuple[list[int], list[int]]]:
    """The steps in a row."""
    whole = [(tokens[at : at + size], mask[at : at + size]) for at in range(0, len(tokens) - size + 1, size)]
    return [step for step in whole if any(step[0])]


def places_of(row: list[Any], episodes: list[list[Any]]) -> list[tuple[int, int]]:
    """Episode and first step, wherever a row's steps are."""
    return [
        (number, start)
        for number, episode in enumerate(episodes)
        for start in range(len(episode) - len(row) + 1)
        if episode[start] == row[0] and episode[start : start + len(row)] == row
    ]


def test_rows_are_stretches_of_single_episodes_and_cover_every_step(tmp_path: Path) -> None:
    dataset, episodes = prepared(CARS, tmp_path), steps_of(CARS)
    covered = set[tuple[int, int]]()
    for split in ("train", "val"):
        for tokens, mask, _ in rows(dataset, split):
            row = row_steps(tokens, mask)
            found = places_of(row, episodes)
            assert found and (
                len(row) == 11 or all(start + len(row) == len(episodes[number]) for number, start in found)
            )
            covered |= {(number, start + step) for number, start in found for step in range(len(row))}
    assert covered == {(number, step) for number, episode in enumerate(episodes) for step in range(len(episode))}


def test_where_an_episode_ends_in_its_row_is_left_to_chance() -> None:
    """Else the length of what it remembers tells an agent that the end has come."""
    choices, room, length = np.random.default_rng(1), 11, 40
    found = [CARS._starts(length, room, choices) for _ in range(2_000)]
    assert all(starts[0] == 0 and max(np.diff(starts)) <= room for starts in found)
    ends = Counter(length - starts[-1] for starts in found)
    assert sorted(ends) == list(range(1, room + 1))
    assert max(ends.values()) < 1.35 * min(ends.values()), "of 2,000 about 182 each"


def test_held_out_episodes_are_whole(tmp_path: Path) -> None:
    dataset, episodes = prepared(CARS, tmp_path), steps_of(CARS)
    times = Counter(str(tokens) for episode in episodes for tokens, _ in episode)
    of = {str(tokens): number for number, episode in enumerate(episodes) for tokens, _ in episode}
    splits = {
        split: {of[step] for row in rows(dataset, split) for tokens, _ in row_steps(*row[:2])
                if times[step := str(tokens)] == 1}
        for split in ("train", "val")
    }  # fmt: skip
    assert 0 in splits["val"] and 1 in splits["train"] and not splits["train"] & splits["val"]


def test_noise_is_read_and_not_imitated(tmp_path: Path) -> None:
    noisy = dataclasses.replace(CARS, noisy_share=1.0, noise=0.2)
    episodes = list(noisy.episodes(0))
    share = np.mean(np.concatenate([~episode.learned for episode in episodes]))
    assert 0.2 < share < 0.8
    dataset = prepared(noisy, tmp_path)
    learned = sum(sum(mask) for split in ("train", "val") for _, mask, _ in rows(dataset, split))
    actions = sum(
        place == ACTION for split in ("train", "val") for _, _, places in rows(dataset, split) for place in places
    )
    assert 0.2 < 1 - learned / actions < 0.8
    quiet = dataclasses.replace(CARS, noisy_share=0.0)
    assert all(episode.learned.all() for episode in quiet.episodes(0))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_actions_are_hidden_in_a_share_of_the_rows(share: float, tmp_path: Path) -> None:
    dataset = prepared(dataclasses.replace(CARS, hide_actions=share, played=30), tmp_path)
    hidden = [HIDDEN in places for _, _, places in rows(dataset, "train")]
    assert all((HIDDEN in places) != (ACTION in places) for _, _, places in rows(dataset, "train"))
    assert abs(np.mean(hidden) - share) < 0.15


@pytest.mark.parametrize("counts", [True, False])
def test_a_text_stands_before_every_row_and_counts_or_not(counts: bool, tmp_path: Path) -> None:
    dataset = prepared(dataclasses.replace(CARS, instruction="Up!", learn_text=counts), tmp_path)
    for tokens, mask, places in rows(dataset, "train"):
        assert bytes(tokens[:3]) == b"Up!" and mask[:3] == [counts] * 3 and places[:3] == [0, 0, 0]
        assert places[3:7] == [3, 4, 0, ACTION] and mask[3:6] == [0, 0, 0]


def test_words_are_tokens_where_they_are_named(tmp_path: Path) -> None:
    corpus = dataclasses.replace(CARS, words="up hill drive", instruction="drive hill: drive up, now")
    tokenizer = corpus.tokenizer()
    ids = tokenizer.encode(corpus.instruction)
    assert [tokenizer.decode([token]) for token in ids[:6]] == ["drive", " hill", ":", " drive", " up", ","]
    assert len(ids) > 7 and tokenizer.decode(ids) == corpus.instruction
    tokens, _, places = next(rows(prepared(corpus, tmp_path), "train"))
    assert tokens[: len(ids)] == ids.tolist() and places[len(ids)] == FIRST_PLACE


def test_prompts_are_parts_of_other_episodes_half_of_them_ends(tmp_path: Path) -> None:
    corpus = dataclasses.replace(CARS, prompt_share=1.0, noisy_share=0.0, played=24)
    dataset, episodes = prepared(corpus, tmp_path), steps_of(corpus)
    ends = []
    for tokens, mask, _ in rows(dataset, "train"):
        row = row_steps(tokens, mask)
        prompts, own = ({number for number, _ in places_of(part, episodes)} for part in (row[:5], row[5:]))
        assert prompts and own and len(prompts | own) > 1
        ends.append(any(episode[-5:] == row[:5] for episode in episodes))
    assert 0.35 < np.mean(ends) < 0.7


def test_images_and_vectors_stand_at_their_tokens(tmp_path: Path) -> None:
    modalities = Modalities(vector=4, image_height=8, image_width=8, image_tokens=4)
    corpus = Demonstrations(
        env=register(), played=6, row=40, reference_episodes=2, noisy_share=0.0, modalities=modalities, prompt_share=0.5
    )
    dataset = prepared(corpus, tmp_path)
    for split in dataset.splits.values():
        for number in range(split.documents):
            start = number * corpus.row_length
            tokens, places = split.read_row(number)[0], split.read_column("places", start, corpus.row_length)
            images = split.records["images"].read(start, corpus.row_length)
            vectors = split.records["vectors"].read(start, corpus.row_length)
            count = int((places == FIRST_PLACE).sum())
            assert bytes(tokens[:6]) == b"follow" and 1 <= len(images.ends) == len(vectors.ends) == count <= 34 // 8
            assert np.array_equal(images.ends, 6 + 8 * np.arange(count) + 4) and np.array_equal(
                vectors.ends, images.ends + 1
            )
            assert (places[vectors.ends - 1] == FIRST_PLACE + 4).all()
            columns = np.round((np.expm1(vectors.values[:, 0] * np.log1p(25600)) / 100) * 24).astype(int)
            assert (np.abs(images.values[:, 0, :, 0].argmax(1) - columns / 3) <= 1).all()
            assert (
                np.array(tokens)[vectors.ends + 2] - corpus.tokenizer().ranges.first_choice == columns * 3 // 24
            ).all()


def test_episodes_of_low_return_are_left_out(tmp_path: Path) -> None:
    corpus = dataclasses.replace(CARS, least_score=80.0)
    dataset = prepared(corpus, tmp_path)
    low, high = dataset.source["random_return"], dataset.source["expert_return"]
    kept = [episode.total >= low + 0.8 * (high - low) for episode in corpus.episodes(0)]
    counts = [dataset.description["splits"][split]["counts"] for split in ("train", "val")]
    assert 0 < sum(kept) < 14
    assert sum(count["episodes"] for count in counts) == sum(kept)
    assert sum(count["left out, their return"] for count in counts) == 14 - sum(kept)


def test_returns_to_come_begin_the_observations(tmp_path: Path) -> None:
    dataset = prepared(dataclasses.replace(CARS, returns=True, noisy_share=0.0), tmp_path)
    environment = CARS.environment(dataset)
    assert isinstance(environment, Gymnasium)
    steps = dataclasses.replace(environment, returns=True).steps
    for tokens, _, places in rows(dataset, "val"):
        assert steps.size == 5 and places[:5] == [3, 4, 5, 0, ACTION]
        compressed = (np.array(tokens[: 5 * places.count(3) : 5]) - steps.ranges.first_bin) / 512 - 1
        assert (np.diff(compressed) >= 0).all() and (compressed < 0).all()


@pytest.mark.parametrize("see_actions", [True, False])
def test_prompts_at_play_are_steps_of_held_out_episodes(see_actions: bool, tmp_path: Path) -> None:
    corpus = dataclasses.replace(
        CARS, instruction="Up!", hide_actions=0.5, acting=Acting(prompt=3, see_actions=see_actions)
    )
    environment, episodes = corpus.environment(prepared(corpus, tmp_path)), steps_of(corpus)
    assert isinstance(environment, Gymnasium) and environment.prompts
    for prompt in environment.prompts:
        row = list(zip(prompt.tokens.tolist(), [[0, 0, 0, 1]] * 3, strict=True))
        tokens = [[(step, [0, 0, 0, 1]) for step, _ in episode] for episode in episodes]
        assert places_of(row, tokens)
        assert prompt.places.tolist() == [[3, 4, 0, ACTION if see_actions else HIDDEN]] * 3
    chosen = [environment.prompt(seed) for seed in (1, 1, 2, 3, 4, 5)]
    assert chosen[0] is chosen[1] and len({id(prompt) for prompt in chosen}) > 1
    assert not CARS.environment(prepared(CARS, tmp_path / "none")).prompts  # type: ignore[union-attr]


def test_prompts_at_play_have_images_and_vectors(tmp_path: Path) -> None:
    modalities = Modalities(vector=4, image_height=8, image_width=8, image_tokens=4)
    fields: dict[str, Any] = {"noisy_share": 0.0, "modalities": modalities, "acting": Acting(prompt=2)}
    corpus = Demonstrations(env=register(), played=6, row=40, reference_episodes=2, **fields)
    environment = corpus.environment(prepared(corpus, tmp_path))
    assert isinstance(environment, Gymnasium)
    steps, played = environment.steps, list(corpus.episodes(0))
    for prompt in environment.prompts:
        expected = [steps.encode(*one.steps(at, at + 2)) for one in played for at in range(len(one) - 1)]
        assert any(
            np.array_equal(prompt.tokens, one.tokens)
            and all(np.array_equal(prompt.records[name], one.records[name]) for name in ("images", "vectors"))
            for one in expected
        )
        context = Context.of(np.arange(5), prompt)
        assert context.tokens[5:].tolist() == prompt.tokens.reshape(-1).tolist()
        assert context.records["images"].ends.tolist() == [9, 17]


def test_the_environment_has_the_measured_references(tmp_path: Path) -> None:
    environment = CARS.environment(prepared(CARS, tmp_path))
    assert isinstance(environment, Gymnasium)
    assert environment.random_return == -200 and -160 < environment.expert_return < -80
    assert environment.score(environment.expert_return) == 100 and environment.score(-200) == 0


def test_how_an_agent_is_scored_plays_no_episodes_again(tmp_path: Path) -> None:
    other = dataclasses.replace(CARS, acting=Acting(temperature=0.5), scored_episodes=3)
    dataset = prepared(CARS, tmp_path)
    assert prepared(other, tmp_path).folder == dataset.folder
    environment = other.environment(dataset)
    assert isinstance(environment, Gymnasium)
    assert (environment.acting.temperature, environment.tasks("val")) == (0.5, 3)
    assert prepared(dataclasses.replace(CARS, hide_actions=0.5), tmp_path).folder != dataset.folder


def test_the_expert_return_is_the_largest_mean_of_a_tenth() -> None:
    returns = np.array([1.0, 5.0, 3.0, 8.0, 2.0, 9.0] * 5)
    windows = [returns[start : start + 3].mean() for start in range(28)]
    assert expert_return(returns) == pytest.approx(max(windows))
    assert expert_return(np.array([4.0, 7.0])) == 7.0


# Files ----------------------------------------------------------------------------------------------------------------
def same(one: Trajectory, other: Trajectory) -> bool:
    pairs = [(one.observations, other.observations), (one.actions, other.actions), (one.rewards, other.rewards)]
    return all(np.allclose(left, right) for left, right in pairs) and one.terminated == other.terminated


def test_episodes_are_written_as_lines_and_read(tmp_path: Path) -> None:
    episodes = list(CARS.episodes(4))
    write_episodes(tmp_path / "cars.jsonl", episodes)
    again = list(read_episodes(tmp_path / "cars.jsonl", spaces("MountainCar-v0")))
    assert len(again) == 10 and all(map(same, episodes, again))
    assert [one.learned.tolist() for one in again] == [one.learned.tolist() for one in episodes]


def test_a_corpus_of_files_has_the_rows_of_those_played(tmp_path: Path) -> None:
    write_episodes(tmp_path / "cars.jsonl", CARS.episodes(0))
    fields = {"env": CARS.env, "row": CARS.row, "val_share": CARS.val_share}
    corpus = Episodes(**fields, files=(str(tmp_path / "cars.jsonl"),), expert_return=-100.0, random_return=-200.0)
    dataset, played = prepared(corpus, tmp_path), prepared(CARS, tmp_path)
    for split in ("train", "val"):
        assert list(rows(dataset, split)) == list(rows(played, split))
    environment = corpus.environment(dataset)
    assert isinstance(environment, Gymnasium) and environment.score(-150) == 50
    write_episodes(tmp_path / "cars.jsonl", CARS.episodes(13))
    assert next(iter(corpus.changed_inputs(dataset))).endswith("has changed")


@pytest.mark.filterwarnings("ignore::UserWarning:minari.*")
def test_minari_keeps_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    episodes = list(CARS.episodes(10))
    write_minari("cars/test-v0", episodes, "MountainCar-v0", author="me")
    again = list(read_minari("cars/test-v0", spaces("MountainCar-v0")))
    assert len(again) == 4 and all(map(same, episodes, again))


GOOD: dict[str, Any] = {"observations": [[0.1, 0.0], [0.2, 0.0]], "actions": [1, 2], "rewards": [-1, -1]}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([1], "list where an episode should be"),
        ({key: GOOD[key] for key in ("observations", "actions")}, "has no 'rewards'"),
        (GOOD | {"actions": [1]}, "2 observations, 1 actions, 2 rewards"),
        (GOOD | {"rewards": []}, "2 observations, 2 actions, 0 rewards"),
        (GOOD | {"observations": [[0.1], [0.2]]}, "not of the environment's spaces"),
        (GOOD | {"observations": "high"}, "not of the environment's spaces"),
        (GOOD | {"learned": [True]}, "2 rewards; allowed"),
        (GOOD | {"actions": [1, 3]}, "below 3"),
        (GOOD | {"observations": [[0.1, None], [0.2, 0.0]]}, "not of the environment's spaces|NaN"),
    ],
)
def test_other_lines_are_refused_in_one(entry: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [GOOD, GOOD, entry]), encoding="utf-8")
    corpus = Episodes(env=CARS.env, row=8, files=(str(path),), random_return=-200.0, expert_return=-100.0)
    with pytest.raises(UserError, match=message):
        prepared(corpus, tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"env": "MountainCart-v0"}, "no expert for 'MountainCart-v0'"),
        ({"row": 2}, "corpus.row is 2; allowed: 3 or more"),
        ({"words": "up", "tokenizer_file": "a.json"}, "corpus.words and corpus.tokenizer_file are both set"),
        ({"played": 1}, "split train is empty|split val is empty"),
    ],
)
def test_fields_that_cannot_work_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        prepared(dataclasses.replace(CARS, **fields), tmp_path)
