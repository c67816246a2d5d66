"""Streams of randomness: one for each use of a seed, so that no two draw the same numbers."""

from enum import IntEnum

__all__ = ["Stream"]


class Stream(IntEnum):
    """The second number of a key of `seed_from`, after the run's seed or a sample's.

    Their values are part of what a seed means: changing one changes every run.
    """

    DATA = 0
    """Noise of training on data."""
    EVALUATE = 1
    """Samples of an evaluation."""
    UPDATE = 2
    """Noise inside the loss, by sample and pass."""
    ORDER = 3
    """Order of a round's samples in its updates."""
    DIVERGENCE = 4
    """Steps at which the path KL is estimated."""
    BEST_OF_CANDIDATES = 5
    """Further candidates of best-of-n."""
    BEST_OF_AGAIN = 6
    """Noise on the way when a chosen x_1 is walked again."""
    COMPLETION = 7
    """Fresh noise from a state on the way to the data."""
    ROLLOUT = 10
    """Samples of a round of training."""
    SELECT = 11
    """Randomness of an acceptance rule."""
    PLAN = 12
    """Which steps of an update carry reward gradients."""
    STEPS = 13
    """Which steps of a round a policy gradient trains."""
    AUGMENT = 14
    """Random moves of data samples."""
    WINDOW = 15
    """Where a round's window of noisy steps is."""
    DATA_NOISE = 20
    """Noise added to data before they are inverted."""
    BASE_PROBE = 21
    """Noise for the samples that give a base sampler's fingerprint."""
