"""What a process says of another that it waited for in vain, from the words that all have left of themselves."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from cleangpt.distributed import processes as room
from cleangpt.distributed.processes import Ranks, join
from cleangpt.errors import RunFailedError, UserError

TIMED_OUT = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 600000ms for recv operation")
CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> list[Ranks]:
    """Processes 0, 1 and 2 of machines m0, m1 and m2, in steps 120, 120 and 118."""
    monkeypatch.setattr(room, "PATIENCE", timedelta(seconds=0.2))
    store = HashStore()
    processes = [Ranks(rank, 0, 3, store, timeout=timedelta(seconds=600)) for rank in range(3)]
    for process, step in zip(processes, (120, 120, 118), strict=True):
        monkeypatch.setattr(room.platform, "node", lambda name=f"m{process.rank}": name)
        process.heartbeat(step)
    return processes


def said(process: Ranks, error: BaseException) -> str:
    with pytest.raises(RunFailedError) as failure:
        process.__exit__(type(error), error, None)
    return str(failure.value)


def test_a_silent_process_is_named_with_its_machine_and_its_step(three: list[Ranks]) -> None:
    line = "no answer within 600 s at step 120 from process 2 (machine m2), last heard of at step 118"
    assert [said(process, TIMED_OUT) for process in three[:2]] == [line, line]


def test_one_whose_connection_another_closed_as_it_timed_out_names_the_silent_one_too(three: list[Ranks]) -> None:
    line = "no answer within 600 s at step 120 from process 2 (machine m2), last heard of at step 118"
    assert [said(process, error) for process, error in zip(three[:2], (TIMED_OUT, CLOSED), strict=True)] == [line, line]


def test_the_host_of_the_store_stays_until_all_have_found_the_reason(
    three: list[Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take the store with it, and they could not tell its own end from the failure that they look for."""
    store = three[0].heartbeats
    assert store is not None
    store.set("error", "the disk is full")
    store.set("lost_1", "")
    monkeypatch.setattr(room, "PATIENCE", timedelta(seconds=20))  # for which it would stay at the most
    with ThreadPoolExecutor() as pool:
        host = pool.submit(said, three[0], CLOSED)
        time.sleep(0.3)
        assert not host.done()
        store.set("diagnosed_1", "")
        assert host.result(timeout=10) == "the disk is full"


def test_a_process_that_has_lost_the_same_one_is_not_named(three: list[Ranks]) -> None:
    three[1].heartbeat(118)
    said(three[1], CLOSED)
    line = "lost the connection at step 120 to process 2 (machine m2), last heard of at step 118"
    assert said(three[0], CLOSED) == line


def test_the_error_of_a_process_is_told_by_those_that_lose_it(three: list[Ranks]) -> None:
    three[2].__exit__(UserError, UserError("the disk is full"), None)
    for process in three[:2]:
        assert said(process, CLOSED) == "process 2 (machine m2) failed at step 118: the disk is full"


def test_an_error_of_its_own_is_left_as_it_is(three: list[Ranks]) -> None:
    with pytest.raises(ValueError, match="mine"), three[0]:
        raise ValueError("mine")


def test_a_process_alone_needs_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join(5) as alone:
        alone.heartbeat(1)
        assert alone == Ranks() and alone.main_process_first(lambda: 7) == 7


def test_an_error_of_the_main_process_alone_is_raised_where_there_is_no_other() -> None:
    def refuse() -> int:
        raise UserError("no")

    assert Ranks().on_main(lambda: 3) == 3
    with pytest.raises(UserError, match="no"):
        Ranks().on_main(refuse)


def test_what_the_first_process_of_a_launch_says_holds_after_restarts_too() -> None:
    store = HashStore()
    assert Ranks().across_restarts("end", "7") == "7"
    assert [Ranks(launch=store).across_restarts("end", value) for value in ("5", "6", "4")] == ["5"] * 3
    assert Ranks(launch=store).across_restarts("other", "6") == "6"
