"""Batch sizes that become smaller where memory runs out."""

import copy
import pickle

import pytest
import torch

from domains.text_to_image.decode_size import DecodeSize, room_for
from lit_rlft.core.batch_size import BatchSize, sized

GIB = 2**30


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory.")


def work(size: BatchSize, total: int, room: int) -> tuple[list[int], list[slice], torch.Tensor]:
    """Return the rows done, the parts tried, and a number drawn for each part that went well."""
    done, tried, drawn = [], [], []
    torch.manual_seed(0)
    for part in size.parts(total):
        tried.append(part.rows)
        with part:
            own = torch.rand(())
            if part.rows.stop - part.rows.start > room:
                raise out_of_memory()
            done += range(total)[part.rows]
            drawn.append(own)
    return done, tried, torch.stack(drawn)


@pytest.mark.parametrize(("total", "start", "room", "ends"), [
    (10, None, 3, 2),
    (10, 64, 3, 2),
    (100, 64, 40, 32),
    (8, 8, 8, 8),
    (7, 4, 1, 1),
])  # fmt: skip
def test_the_same_rows_come_again_in_smaller_parts(
    total: int, start: int | None, room: int, ends: int
) -> None:
    said: list[str] = []
    size = BatchSize("some.key", "auto", start, said.append)
    done, tried, drawn = work(size, total, room)
    assert done == list(range(total)) and size.rows == ends
    assert len(said) == len(tried) - len(drawn)
    assert all("some.key is " in line for line in said)
    again = work(BatchSize("some.key", ends), total, room)
    assert again[0] == done and len(again[1]) == len(drawn)
    assert torch.equal(again[2], drawn)  # torch's own random numbers are as if it had begun so
    further = work(size, total, room)
    assert further[0] == done and len(further[1]) == len(drawn)  # it stays as small
    assert len(size.parts(total)) == len(drawn)


def test_given_numbers_stay_and_other_errors_pass() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        work(sized(4), 10, 3)
    with pytest.raises(torch.OutOfMemoryError):
        work(BatchSize("key", "auto", 4), 10, 0)
    size = BatchSize("key", "auto", 4)
    with pytest.raises(RuntimeError, match="another"):
        for part in size.parts(3):
            with part:
                raise RuntimeError("another")
    assert size.rows == 4
    given = sized(5)
    given.go_on(2)
    given.begin(1)
    assert given.rows == 5 and not given.fewer(5)


def test_what_an_earlier_run_has_found_is_where_it_begins() -> None:
    size = BatchSize("key", "auto")
    assert size.rows is None
    size.begin(16)
    size.begin(8)
    assert size.rows == 16
    again = pickle.loads(pickle.dumps(copy.deepcopy(size)))
    again.go_on(2)
    again.begin(8)
    assert (again.rows, size.rows) == (2, 16)


def test_pictures_at_a_time_from_pixels_and_free_memory() -> None:
    """Measured: 24 GiB for 32 pictures of 512 pixels in single precision, 96 for 1,024."""
    for pixels, peak in ((512, 24), (1024, 96)):
        each = pixels**2 * 3 * 2**10
        assert 32 * each == peak * GIB
        assert room_for(each, 2 * peak * GIB) == 32 and room_for(each, 2 * peak * GIB - 64) == 16
    assert room_for(512**2 * 3 * 2**10, 20 * GIB) == 8
    assert room_for(1024**2 * 20 * 2**10, 20 * GIB) == 1  # 20 GiB each, with a graph
    assert room_for(1, 999 * GIB) == 32


def test_a_processor_has_a_plain_default() -> None:
    size = DecodeSize("auto").at((8, 8), torch.device("cpu"), torch.float32, graph=False)
    assert size.rows == 32 and not size.begun
    given = DecodeSize(3).at((8, 8), torch.device("cpu"), torch.float32, graph=True)
    assert given.rows == 3 and not given.automatic
