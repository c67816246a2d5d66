"""What GRAFT's updates do not depend on: a cut of 0, microbatches, sampling batches, processes."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_rlft.algorithms.graft import GRAFT, PGRAFT
from lit_rlft.core.randomness import generators, seed_from
from lit_rlft.core.sampling import Sampler
from tests.algorithms.graft_support import W, fit, tuner_of


def test_graft_is_p_graft_without_a_cut(folder: Path) -> None:
    runs = [
        fit(tuner, num_rounds=2, default_root_dir=folder)
        for tuner in (
            tuner_of(GRAFT, num_epochs=2),
            tuner_of(PGRAFT, cut=0.0, num_epochs=2),
            tuner_of(PGRAFT, cut=0.0, num_epochs=2, train_from="clean"),
        )
    ]
    states = [run.tuner.pipeline.denoiser.state_dict() for run in runs]
    for state in states[1:]:
        assert all(torch.equal(states[0][name], state[name]) for name in state)
    assert not np.allclose(runs[0].learned, W, atol=1e-4)


def test_a_cut_changes_what_is_learned(folder: Path) -> None:
    learned = [
        fit(tuner_of(cut=cut, train_from=train_from), default_root_dir=folder).learned
        for cut, train_from in ((0.0, "clean"), (0.25, "clean"), (0.25, "intermediate"))
    ]
    assert all(not np.allclose(a, b) for a, b in itertools.combinations(learned, 2))


@pytest.mark.parametrize("microbatch_size", [1, 3, 4, 100])
def test_updates_do_not_depend_on_microbatches(folder: Path, microbatch_size: int) -> None:
    def learned(size: int | None) -> dict[str, Tensor]:
        tuner = tuner_of(
            cut=0.25,
            minibatch_size=7,
            microbatch_size=size,
            num_epochs=2,
            max_grad_norm=0.01,
            optimizer=lambda p: torch.optim.SGD(p, lr=10.0),
        )
        fit(tuner, 16, default_root_dir=folder)
        assert tuner.num_updates == 6
        return tuner.pipeline.denoiser.state_dict()

    whole, parts = learned(None), learned(microbatch_size)
    assert not torch.allclose(whole["logits"], torch.tensor(W).log().float(), atol=1e-3)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sampling_batch_size", [1, 5, 1000])
def test_candidates_do_not_depend_on_sampling_batches(
    folder: Path, sampling_batch_size: int
) -> None:
    sizes = (7, sampling_batch_size)
    tuners = [tuner_of(sampler=Sampler(8, 1.0), sampling_batch_size=size) for size in sizes]
    first, second = (fit(tuner, default_root_dir=folder).experiences[0] for tuner in tuners)
    assert first.seeds == second.seeds
    torch.testing.assert_close(first.states["x_s"], second.states["x_s"])


def test_an_update_is_a_step_on_the_mean_loss_with_clipped_gradients(folder: Path) -> None:
    sgd = {"optimizer": lambda p: torch.optim.SGD(p, lr=1.0), "minibatch_size": 100}
    tuner, twin = (tuner_of(cut=0.25, max_grad_norm=0.05, **sgd) for _ in range(2))
    (experience,) = fit(tuner, default_root_dir=folder).experiences
    noise = generators([seed_from(seed, 2, 0) for seed in experience.seeds])
    losses, _ = twin.loss(experience, noise)
    assert losses.shape == (8,)
    losses.mean().backward()
    parameters = list(twin.pipeline.denoiser.parameters())
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    assert norm > 0.05
    for ours, p in zip(tuner.pipeline.denoiser.parameters(), parameters, strict=True):
        torch.testing.assert_close(ours, p - p.grad * 0.05 / norm, rtol=1e-4, atol=1e-6)
