r"""Which law does each loss of `contrast.py` learn? On a mixture, where all of them are known.

The reward is a point's first coordinate; the best of each 4 is accepted, whose law has the density
4 F(x)^3 p(x) with F the coordinate's distribution function. Posterior means under it, and so the
exact denoiser of the accepted law, are Gauss-Hermite sums over the mixture's components. So is the
prediction at which each loss is stationary, its limit: with A(x) and R(x) the weights with which a
sample is fitted and mirrored, f_ref + c (E[A (x_0 - f_ref)] - E[R (x_0 - f_ref)]) / (E[A] + E[R])
given x_t, with c the strength of the contrast, or 1 / beta of DiffusionNFT.

`run` trains each loss from the exact model as `contrast.py` does, all weights, on 1,024 to 65,536
groups of 4 candidates, and `limits` samples with each limit itself, without training. Of both:

- gain of the reward on 8,192 samples, over the reference's with the same noise;
- error: mean squared error of the prediction to that of the accepted law's denoiser, in units of
  the reference's, at that law's noised samples and the sampler's 20 levels; 0 is exact;
- MMD^2 of the samples to the accepted law, in units of the reference's;
- own error: as error, but to the loss's own limit.

The rate is chosen per loss among four at 4,096 groups, with a seed of its own, by the own error.

    python benchmarks/contrast_mixture.py run --out contrast_mixture.jsonl --seeds 0 1 2
    python benchmarks/contrast_mixture.py limits --out contrast_mixture.jsonl
    python benchmarks/contrast_mixture.py snr --out contrast_mixture.jsonl
    python benchmarks/contrast_mixture.py table --out contrast_mixture.jsonl
"""

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from contrast import LOSSES, SEARCH_SEED, SEARCHED, STEPS, STRENGTH, M, Store, snr, train, write
from cut_regimes import conditions, mean_and_error
from numpy.polynomial.hermite_e import hermegauss
from quiet import quiet_trainer
from torch import Tensor

from domains.gaussian_mixture.closed_form.mixture import Mixture
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.graft import PGRAFT
from lit_rlft.core.implicit import group_probabilities
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.randomness import generators, seed_from
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import State, tensor_of
from lit_rlft.kit.statistics import gaussian, median_distance, mmd
from lit_rlft.runs.lines import read_lines

GROUPS = (1024, 4096, 16384, 65536)
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
TEST, PER_LEVEL, NODES = 8192, 1024, 48
Weight = Callable[[Tensor], Tensor]
"""Of points by their reward, float64 in the shape of the rewards."""


def distribution(mixture: Mixture, reward: Tensor) -> Tensor:
    """Return the share of the mixture whose first coordinate is lower."""
    apart = (reward.unsqueeze(-1) - mixture.means[:, 0]) / mixture.stds
    return (mixture.weights * 0.5 * torch.erfc(-apart / math.sqrt(2))).sum(dim=-1)


def expected(
    mixture: Mixture, alpha: Tensor, sigma: Tensor, x_t: Tensor, weight: Weight
) -> tuple[Tensor, Tensor]:
    """Return E[w | x_t] and E[w x_0 | x_t] under the mixture, [B] and [B, 2], in float64.

    Args:
        mixture: p.
        alpha: Level of the signal, [B, 1].
        sigma: Level of the noise, [B, 1].
        x_t: Noised points, [B, 2].
        weight: w.
    """
    data = mixture.stds.square()
    variance = alpha**2 * data + sigma**2  # [B, K]
    offset = x_t.unsqueeze(1) - alpha.unsqueeze(-1) * mixture.means
    log_share = mixture.weights.log() - 0.5 * offset.square().sum(dim=-1) / variance
    share = (log_share - variance.log()).softmax(dim=1)
    means = mixture.means + (alpha * data / variance).unsqueeze(-1) * offset  # [B, K, 2]
    std = sigma * (data / variance).sqrt()
    places, masses = (torch.from_numpy(part) for part in hermegauss(NODES))
    first = means[..., :1] + std.unsqueeze(-1) * places  # [B, K, nodes]
    own = weight(first) * masses / math.sqrt(2 * math.pi)
    total = own.sum(dim=-1)
    moved = torch.stack([(own * first).sum(dim=-1), total * means[..., 1]], dim=-1)
    return (share * total).sum(dim=1), (share.unsqueeze(-1) * moved).sum(dim=1)


class Limits:
    """Exact predictions of x_0 on the pretrained mixture.

    Args:
        pipeline: The exact model.
    """

    def __init__(self, pipeline: GaussianMixturePipeline) -> None:
        self.mixture, self.schedule = pipeline.mixture, pipeline.process.schedule
        points = self.mixture.sample(M * 2**16, torch.Generator().manual_seed(0))
        groups = points[:, 0].view(-1, M)
        self.spread = float((groups - groups.mean(dim=1, keepdim=True)).std(correction=0))
        best = groups.argmax(dim=1) + M * torch.arange(len(groups))
        self.accepted = points[best]
        """Exact draws of the accepted law, [65536, 2]."""
        grid = torch.linspace(-4, 4, 801, dtype=torch.float64)
        self._good = self._good_on(grid, groups[:4096, 1:])

    def _good_on(self, rewards: Tensor, others: Tensor) -> Tensor:
        """Return the mean of DiffusionNFT's r at each reward, over groups of others [n, M - 1]."""
        rows = []
        for reward in rewards:
            groups = torch.cat([reward.expand(len(others), 1), others], dim=1)
            rows.append(group_probabilities(groups, self.spread, 1.0)[:, 0].mean())
        return torch.stack(rows)

    def good(self, reward: Tensor) -> Tensor:
        """Return DiffusionNFT's mean r at each reward, between the grid's points on a line."""
        place = ((reward + 4) * 100).clamp(0, 799.999)
        low = place.long()
        return self._good[low].lerp(self._good[low + 1], place - low)

    def bad(self, reward: Tensor) -> Tensor:
        """Return 1 - r."""
        return 1 - self.good(reward)

    def share(self, reward: Tensor) -> Tensor:
        """Return how likely a candidate of a reward is accepted, F^3."""
        return distribution(self.mixture, reward) ** (M - 1)

    def fitted(self, reward: Tensor) -> Tensor:
        """Return the mean weight that the contrast fits a candidate with."""
        return self.share(reward) * (1 - 1 / M)

    def rejected(self, reward: Tensor) -> Tensor:
        """Return the mean weight that the contrast fits a candidate's mirror image with."""
        return (1 - self.share(reward)) / M

    def reference(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return E[x_0 | x_t] of the mixture, [B, 2]."""
        return self._expected(x_t, t, torch.ones_like)[1]

    def law(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return E[x_0 | x_t] of the accepted law, [B, 2], the limit of the published loss."""
        total, moved = self._expected(x_t, t, self.share)
        return moved / total.unsqueeze(1)

    def of(self, loss: str, x_t: Tensor, t: Tensor) -> Tensor:
        """Return a loss's limit, [B, 2]."""
        if loss in ("published", "control variate"):
            return self.law(x_t, t)
        nft = loss == "DiffusionNFT"
        weights: tuple[Weight, Weight] = (
            (self.good, self.bad) if nft else (self.fitted, self.rejected)
        )
        reference, sums = self.reference(x_t, t), []
        for weight in weights:
            total, moved = self._expected(x_t, t, weight)
            sums.append((total, moved - total.unsqueeze(1) * reference))
        (up, ascent), (down, descent) = sums
        apart = (ascent - descent) / (up + down).unsqueeze(1)
        return reference + strength_of(loss) * apart

    def noise(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the noise that takes x_0 to x_t, [B, 2], which the model predicts."""
        alpha, sigma = self._levels(t)
        return (x_t - alpha * x_0) / sigma

    def _expected(self, x_t: Tensor, t: Tensor, weight: Weight) -> tuple[Tensor, Tensor]:
        return expected(self.mixture, *self._levels(t), x_t.double(), weight)

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.schedule.levels(t.double())
        return alpha.unsqueeze(1), sigma.unsqueeze(1)


def strength_of(loss: str) -> float:
    """Return how far a loss steps from the reference; DiffusionNFT's is 1 / beta."""
    if loss == "DiffusionNFT":
        return 1.0
    return float(loss.removeprefix("contrast") or STRENGTH)


class Limit(GaussianMixturePipeline):
    """A model that predicts a loss's limit.

    Args:
        loss: Its name.
    """

    def __init__(self, loss: str) -> None:
        super().__init__()
        self.limits, self.loss = limits(), loss

    def predict(self, x_t: State, t: Tensor, condition: Condition) -> Tensor:
        x = tensor_of(x_t)
        x_0 = self.limits.of(self.loss, x, t)
        return self.process.prediction(x_0, self.limits.noise(x_0, x, t), t).to(x)


@cache
def limits() -> Limits:
    """Return what is exact on the mixture."""
    return Limits(GaussianMixturePipeline())


def base(seed: int, pipeline: GaussianMixturePipeline | None = None) -> PGRAFT:
    """Return GRAFT on the exact model, all weights trained."""
    tuner = PGRAFT(
        pipeline or GaussianMixturePipeline(),
        Coordinate(),
        cut=0.0,
        sampler=Sampler(STEPS, 1.0),
        seed=seed,
        sampling_batch_size=4096,
    )
    tuner.trainer = quiet_trainer()
    tuner.setup("test")
    return tuner


class Test:
    """What a model is measured with.

    Args:
        seed: Of the samples' noise, and of the noised points.
    """

    def __init__(self, seed: int) -> None:
        self.seeds = [seed_from(seed, 2, i) for i in range(TEST)]
        exact, process = limits().accepted, GaussianMixturePipeline().process
        self.t = process.times(STEPS)[:STEPS].double().repeat_interleave(PER_LEVEL)
        x_0 = exact[torch.arange(len(self.t)) % len(exact)].float()
        noise = generators([seed_from(seed, 4, i) for i in range(len(self.t))])
        self.x_t = process.noised(x_0, torch.zeros_like(self.t), self.t, noise)
        self.exact = exact[-TEST:]
        self.kernel = gaussian(median_distance(self.exact))
        self.law = self._noise(limits().law(self.x_t, self.t))
        reference = self._noise(limits().reference(self.x_t, self.t))
        self.unit = float((reference - self.law).square().mean())
        tuner = base(seed)
        self.before = self.points(tuner, reference=True)
        self.apart = mmd(self.exact, self.before, self.kernel)

    def _noise(self, x_0: Tensor) -> Tensor:
        return limits().noise(x_0, self.x_t, self.t)

    @torch.no_grad()
    def points(self, tuner: PGRAFT, *, reference: bool = False) -> Tensor:
        """Return samples of a model, [8192, 2]."""
        route = tuner.reference_route() if reference else tuner.route()
        (x_0,) = tuner.rollouts.draw(route, conditions(tuner, TEST), self.seeds, keep=[STEPS])
        return tensor_of(x_0)

    @torch.no_grad()
    def of(self, tuner: PGRAFT, loss: str) -> dict[str, float]:
        """Return what a model has learnt, by the names of the table."""
        condition = conditions(tuner, len(self.t))
        prediction = tuner.pipeline(self.x_t, self.t, condition).double()
        own = self._noise(limits().of(loss, self.x_t, self.t))
        points = self.points(tuner)
        return {
            "gain": float((points - self.before)[:, 0].mean()),
            "error": float((prediction - self.law).square().mean()) / self.unit,
            "mmd": mmd(self.exact, points, self.kernel) / self.apart,
            "own_error": float((prediction - own).square().mean()) / self.unit,
        }


COLUMNS = ("gain", "error", "mmd", "own_error")
MEASURED = ("published", "contrast 2", "contrast 4", "contrast", "DiffusionNFT", "control variate")


def run(out: Path, seeds: Sequence[int], losses: Sequence[str], groups: Sequence[int]) -> None:
    """Search each loss's rate, then train at all sizes; what is in the file is not repeated."""
    held: tuple[int, Store, Test] | None = None
    for what, seed, loss, num, given in jobs(seeds, losses, groups):
        line = {"what": what, "seed": seed, "loss": loss, "groups": num}
        line["rate"] = rate = given or best_rate(out, loss)
        if any(line.items() <= known.items() for known in read_lines(out)):
            continue
        if held is None or held[0] != seed:
            size = SEARCHED if what == "search" else max(groups)
            held = (seed, Store(base(seed), size), Test(seed))
        start, tuner = time.process_time(), base(seed)
        train(tuner, held[1], loss, num, rate)
        own = held[2].of(tuner, loss)
        write(out, line | own | {"processor_seconds": time.process_time() - start})


def jobs(
    seeds: Sequence[int], losses: Sequence[str], groups: Sequence[int]
) -> Iterator[tuple[str, int, str, int, float | None]]:
    """Iterate over the search and what comes after it, whose rate is not known yet."""
    for loss in losses:
        for rate in RATES:
            yield "search", SEARCH_SEED, loss, SEARCHED, rate
    for seed in seeds:
        for num in groups:
            for loss in losses:
                yield "curve", seed, loss, num, None


def best_rate(out: Path, loss: str) -> float:
    """Return the rate that came nearest to the loss's own limit in the search."""
    tried = {
        line["rate"]: line["own_error"]
        for line in read_lines(out)
        if (line["what"], line.get("loss")) == ("search", loss)
    }
    return min(tried, key=lambda rate: tried[rate])


def sample_limits(out: Path, seeds: Sequence[int], losses: Sequence[str]) -> None:
    """Measure each loss's limit."""
    for seed in seeds:
        test = Test(seed)
        for loss in losses:
            found = test.of(base(seed, Limit(loss)), loss)
            write(out, {"what": "limit", "seed": seed, "loss": loss, **found})


def table(out: Path) -> None:
    """Print the tables."""
    found: dict[tuple[str, int, str, float], list[dict[str, Any]]] = defaultdict(list)
    for line in read_lines(out):
        if line["what"] in ("limit", "curve"):
            key = (line["what"], line.get("groups", 0), line["loss"], line.get("rate", 0.0))
            found[key].append(line)
    print(
        "| groups | loss | rate | gain | error | MMD² | own error |\n|---|---|---|---|---|---|---|"
    )
    for (_, groups, loss, rate), lines in sorted(found.items()):
        size, own = (f"{groups:,}", f"{rate:g}") if groups else ("limit", "")
        cells = [mean_and_error([line[name] for line in lines]) for name in COLUMNS]
        print(f"| {size} | {loss} | {own} | {' | '.join(cells)} |")


def main() -> None:
    """Train, sample the limits, measure gradients, or print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["run", "limits", "snr", "table"])
    parser.add_argument("--out", type=Path, default=Path("contrast_mixture.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--groups", type=int, nargs="+", default=list(GROUPS))
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(MEASURED))
    options = parser.parse_args()
    if options.what == "run":
        run(options.out, options.seeds, options.losses, options.groups)
    elif options.what == "limits":
        sample_limits(options.out, options.seeds, options.losses)
    elif options.what == "snr":
        snr(options.out, base(options.seeds[0]), {"seed": options.seeds[0]})
    else:
        table(options.out)


if __name__ == "__main__":
    main()
