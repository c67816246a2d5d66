"""Values of all processes in one place; a process that fails stops the others with its sentence."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lit_rlft.core.checks import UsageError
from lit_rlft.distributed import gather, mean_of_all, telling, together


def processes(
    monkeypatch: pytest.MonkeyPatch, world_size: int, work: Callable[[int], Any]
) -> list[Any]:
    """Return what each process's work returns or raises; threads take the place of processes."""
    values: list[Any] = [None] * world_size
    barrier = threading.Barrier(world_size, timeout=5)
    number = threading.local()
    results: list[Any] = [None] * world_size

    def all_gather_object(out: list[Any], value: Any) -> None:
        values[number.rank] = value
        barrier.wait()
        out[:] = values
        barrier.wait()

    def run(rank: int) -> None:
        number.rank = rank
        try:
            results[rank] = work(rank)
        except Exception as error:
            results[rank] = error

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Unlike processes, threads share it: each puts back what it found, in any order.
    torch.compiler.set_stance("default")
    return results


def test_values_come_in_order_of_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes(monkeypatch, 3, lambda rank: gather(rank**2, 3)) == [[0, 1, 4]] * 3
    assert gather("own", 1) == ["own"]


def test_means_are_over_the_values_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [torch.tensor([1.0, 2.0]), torch.tensor([]), torch.tensor([6.0])]
    means = processes(monkeypatch, 3, lambda rank: mean_of_all(parts[rank], 3))
    assert means == [3.0] * 3


@pytest.mark.parametrize("fails_at", [0, 1, 2])
@pytest.mark.parametrize("failing", [{1}, {0, 2}, {0, 1, 2}])
def test_all_leave_when_one_fails(
    monkeypatch: pytest.MonkeyPatch, fails_at: int, failing: set[int]
) -> None:
    """Before, between and after what the block gathers."""

    def work(rank: int) -> None:
        with together(3):
            for step in range(3):
                if step == fails_at and rank in failing:
                    raise KeyError(f"of {rank}")
                if step < 2:
                    gather(step, 3)

    for rank, error in enumerate(processes(monkeypatch, 3, work)):
        if rank in failing:
            assert isinstance(error, KeyError) and error.args == (f"of {rank}",)
        else:
            assert isinstance(error, UsageError)
            assert str(error) == f"another process failed (KeyError: 'of {min(failing)}')"


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_is_told_at_what_is_gathered_next(
    monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    def work(rank: int) -> None:
        for step in range(2 + rank):  # processes with unequal numbers of batches
            with telling(2):
                if rank == failing and step == 1:
                    raise UsageError("set x to 1")
        gather("the means of an evaluation", 2)

    assert [str(error) for error in processes(monkeypatch, 2, work)] == ["set x to 1"] * 2


def test_an_error_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a block has another around it, the other processes gather no more than one value."""

    def work(rank: int) -> None:
        with together(2), together(2):
            if rank:
                raise UsageError("set x to 1")

    assert [str(error) for error in processes(monkeypatch, 2, work)] == ["set x to 1"] * 2


LOST = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:1",
    "[gloo/transport/tcp/pair.cc:5] Read error [::1]:1: Connection reset by peer",
    "NCCL error: ncclRemoteError: a remote process exiting prematurely",
)


@pytest.mark.parametrize("words", LOST)
def test_a_process_that_has_ended_is_told_of_in_a_sentence(
    words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch says of it would bury what the one that has failed says."""

    def gone(*args: Any) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr(torch.distributed, "all_gather_object", gone)
    sentence = "another process failed and has ended; its own message says why"
    with pytest.raises(UsageError, match=sentence):
        gather("own", 2)
    with pytest.raises(UsageError, match=sentence), telling(2):
        gone()
    with pytest.raises(KeyError, match="own"), telling(2):  # nobody is left to hear of it
        raise KeyError("own")
    with pytest.raises(RuntimeError, match=r"gloo|NCCL"), telling(1):
        gone()


def test_a_sentence_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(rank: int) -> None:
        with together(2):
            if rank:
                raise UsageError("set x to 1")

    assert [str(error) for error in processes(monkeypatch, 2, work)] == ["set x to 1"] * 2
    assert processes(monkeypatch, 2, lambda rank: None) == [None, None]
