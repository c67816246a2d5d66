import hashlib
import re
from pathlib import Path

import pytest
import torch

from lit_rlft.core import randomness
from lit_rlft.core.randomness import (
    Seeded,
    generators,
    own_rng,
    rand_like,
    randn_like,
    seed_from,
)


def test_seeds_are_integers_of_63_bits_without_collisions() -> None:
    seeds = [seed_from(a, b) for a in range(100) for b in range(100)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_from(1, 23) != seed_from(12, 3) != seed_from(123)
    assert seed_from(torch.tensor(5), 2) == seed_from(5, 2)


def test_seeds_are_the_same_in_every_process_and_version() -> None:
    digest = hashlib.blake2b(b"3,-1,7", digest_size=8).digest()
    assert seed_from(3, -1, 7) == int.from_bytes(digest, "big") // 2 == 6869678837803109945


def test_a_generator_is_that_of_its_seed() -> None:
    (ours,) = generators([42])
    exact = torch.Generator().manual_seed(42)
    assert torch.equal(torch.rand(5, generator=ours), torch.rand(5, generator=exact))


@pytest.mark.parametrize("draw", [randn_like, rand_like])
@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 40)])
def test_a_row_depends_on_its_generator_alone(draw, shape: tuple[int, ...]) -> None:
    like = torch.zeros(shape)
    whole = draw(like, generators([1, 2, 3, 4]))
    assert whole.shape == like.shape
    chunks = torch.cat([draw(like[:1], generators([1])), draw(like[1:], generators([2, 3, 4]))])
    assert torch.equal(whole, chunks)
    shuffled = draw(like, generators([4, 2, 1, 3]))
    assert torch.equal(shuffled, whole[[3, 1, 0, 2]])


@pytest.mark.parametrize("draw", [randn_like, rand_like])
def test_draws_go_on_where_the_generator_stopped(draw) -> None:
    noise = generators([7])
    first, second = draw(torch.zeros(1, 5), noise), draw(torch.zeros(1, 5), noise)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("draw", [randn_like, rand_like])
def test_without_generators_torch_decides(draw) -> None:
    like = torch.zeros(3, 2, dtype=torch.float64)
    torch.manual_seed(5)
    first = draw(like)
    torch.manual_seed(5)
    assert torch.equal(first, draw(like)) and first.dtype == torch.float64


def test_generators_are_made_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(seeds: list[int]) -> list[torch.Generator]:
        made.extend(seeds)
        return generators(seeds)

    monkeypatch.setattr(randomness, "generators", counted)
    noise, like = Seeded([5, 7, 5], 3, 1), torch.empty(3, 2)
    assert len(noise) == 3 and not made
    expected = generators([seed_from(seed, 3, 1) for seed in (5, 7, 5)])
    for _ in range(2):  # draws go on, so each is made once
        assert torch.equal(randn_like(like, noise), randn_like(like, expected))
    assert [one is two for one, two in zip(noise, noise[:3], strict=True)] == [True] * 3
    assert len(made) == 3


def test_every_row_needs_its_generator() -> None:
    with pytest.raises(ValueError, match="2 generators were given for a batch of 3"):
        randn_like(torch.zeros(3), generators([1, 2]))


def test_own_numbers_leave_the_global_generator_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def looked_at(*_: object) -> None:
        raise AssertionError("a run on the processor began to use a GPU")

    monkeypatch.setattr(torch.cuda, "current_device", looked_at)
    monkeypatch.setattr(torch.cuda, "get_rng_state", looked_at)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with own_rng(7):
        drawn = torch.rand(5)
    assert torch.equal(drawn, torch.rand(5, generator=torch.Generator().manual_seed(7)))
    with own_rng():
        assert torch.equal(torch.rand(2), expected)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("package", ["lit_rlft", "domains"])
def test_nothing_forks_the_generators_of_all_gpus(package: str) -> None:
    sources = sorted((Path(randomness.__file__).parents[2] / package).rglob("*.py"))
    assert sources
    assert not [path for path in sources if re.search(r"fork_rng\(\)", path.read_text())]
