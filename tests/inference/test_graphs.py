"""Decoding ahead by CUDA graphs, with a stand-in on the CPU that does again what was recorded, in place.

`python -m benchmarks.gpu cache graphs` compares real graphs with the CPU.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cleangpt.errors import UserError
from cleangpt.inference import engine, graphs
from cleangpt.inference.engine import Engine
from cleangpt.inference.sampling import Sampling
from cleangpt.models import build_model
from cleangpt.models.llama import LlamaConfig

CPU = torch.device("cpu")
CONFIG = LlamaConfig(vocab_size=17, max_seq_len=24, n_layers=2, n_heads=2, dim=16, separator=3, sliding_window=5)


class Recorder:
    """In place of `record`; counts recordings and replays."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.fails = False

    def __call__(self, function: Callable[[], Tensor], undo: Callable[[], object]) -> Callable[[], Tensor] | None:
        self.recorded += 1
        result = function()  # a warm-up
        undo()
        if self.fails:
            return None

        def replay() -> Tensor:
            self.replayed += 1
            return result.copy_(function())

        return replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr(graphs, "record", found)
    monkeypatch.setattr(engine, "DEVICES", frozenset({"cpu"}))
    return found


def model() -> Any:
    torch.manual_seed(0)
    return build_model(CONFIG).eval()


requests = st.tuples(
    st.lists(st.integers(0, 16), min_size=1, max_size=20),
    st.integers(1, 30),
    st.sampled_from([Sampling(temperature=0), Sampling(temperature=1.2), Sampling(top_k=5, top_p=0.9)]),
    st.sampled_from([[], [5], [1, 2, 3, 4]]),
)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(submitted=st.lists(requests, min_size=1, max_size=5), max_batch=st.integers(1, 4))
def test_steps_ahead_change_no_token_however_rows_join_stop_and_leave(
    submitted: list[Any], max_batch: int, recorder: Recorder
) -> None:
    found = []
    for patience in (None, 0):
        ours = Engine(model(), CPU, max_batch=max_batch, patience=patience)
        for seed, (prompt, count, sampling, stops) in enumerate(submitted):
            ours.submit(prompt, max_new_tokens=count, sampling=sampling, seed=seed, stop_ids=stops)
        found.append({number: completion.ids for number, completion in ours.completions()})
    assert found[0] == found[1]


def test_a_batch_is_recorded_once_it_has_stayed_the_same_and_again_when_it_has_changed(recorder: Recorder) -> None:
    ours = Engine(model(), CPU, patience=2)
    ours.submit([1, 2], max_new_tokens=12)
    ours.submit([4], max_new_tokens=6)
    for _ in range(5):  # the first token comes from the prompt, and two more wait
        ours.step()
    assert (recorder.recorded, recorder.replayed) == (1, 3), "of which one is ahead"
    ours.step()
    assert recorder.replayed == 3 + 1, "one row may go on"
    list(ours.steps())  # the other has left: of six more steps, two wait
    assert (recorder.recorded, recorder.replayed, ours.steps_ahead) == (2, 4 + 4, 3 + 4)


def test_a_request_that_joins_stops_steps_ahead(recorder: Recorder) -> None:
    ours = Engine(model(), CPU, patience=2)
    ours.submit([1, 2], max_new_tokens=20)
    first = [ours.step()[0].token.id for _ in range(6)]
    ours.submit([4, 4, 4], max_new_tokens=20)
    rest = list(ours.steps())
    expected = Engine(model(), CPU, cached=False).generate([[1, 2], [4, 4, 4]], max_new_tokens=20)
    assert [*first, *(step[0].token.id for step in rest if 0 in step)] == expected[0].ids
    assert [step[1].token.id for step in rest if 1 in step] == expected[1].ids
    assert recorder.recorded == 3, "alone, together, and the second once the first had left"


def test_a_repetition_penalty_reads_the_tokens_so_far_and_so_runs_no_step_ahead(recorder: Recorder) -> None:
    Engine(model(), CPU, patience=2).generate([[1, 2]], max_new_tokens=10, sampling=Sampling(repetition_penalty=1.3))
    assert recorder.recorded == 0


def test_a_model_that_cannot_be_recorded_goes_on_without_and_is_not_tried_again(recorder: Recorder) -> None:
    recorder.fails = True
    found, expected = (
        [one.ids for one in Engine(model(), CPU, cached=cached, patience=2).generate([[1, 2], [3]], max_new_tokens=15)]
        for cached in (True, False)
    )
    assert found == expected
    assert (recorder.recorded, recorder.replayed) == (1, 0)


def test_logits_that_are_not_finite_are_told_though_nobody_has_waited_for_them(recorder: Recorder) -> None:
    broken = model()
    ours = Engine(broken, CPU, patience=2)
    ours.submit([1, 2], max_new_tokens=15, sampling=Sampling(temperature=1))
    for _ in range(5):
        ours.step()
    broken.final_norm.weight.data.fill_(float("nan"))
    ours.step()
    with pytest.raises(UserError, match="not finite"):
        ours.step()
