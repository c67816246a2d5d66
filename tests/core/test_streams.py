"""Every use of randomness has numbers of its own."""

import torch

from lit_rlft.core.randomness import generators, seed_from
from lit_rlft.core.streams import Stream

# Part of what a seed means: runs of 0.1.0 were drawn with these.
VALUES = {
    "DATA": 0,
    "EVALUATE": 1,
    "UPDATE": 2,
    "ORDER": 3,
    "DIVERGENCE": 4,
    "BEST_OF_CANDIDATES": 5,
    "BEST_OF_AGAIN": 6,
    "COMPLETION": 7,
    "ROLLOUT": 10,
    "SELECT": 11,
    "PLAN": 12,
    "STEPS": 13,
    "AUGMENT": 14,
    "WINDOW": 15,
    "DATA_NOISE": 20,
    "BASE_PROBE": 21,
}


def test_streams_keep_their_values_and_differ() -> None:
    assert {stream.name: stream.value for stream in Stream.__members__.values()} == VALUES
    assert len(set(VALUES.values())) == len(Stream.__members__)  # an alias would be a shared stream


def test_streams_draw_different_numbers() -> None:
    noise = generators([seed_from(0, stream, 5) for stream in Stream])
    drawn = [tuple(torch.randn(4, generator=own).tolist()) for own in noise]
    assert len(set(drawn)) == len(Stream)


def test_a_stream_is_its_number_in_a_key() -> None:
    assert seed_from(0, Stream.ROLLOUT, 5) == seed_from(0, 10, 5)
