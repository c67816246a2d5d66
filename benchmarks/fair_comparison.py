"""All algorithms at equal reward calls or equal denoiser calls, each with searched settings.

Method: every arm has six trials: learning rates, or three of them with two values of what else
decides how far an algorithm goes (clip range, beta, reward scale). Rates are a factor of three
apart; they are lower by two places for three arms whose best was the lowest in a first search.
`--trials 3` tries every second of them, where a run is dear: rates a factor of ten apart, or with
the first of the two values; on shapes a factor of three around what `make demo` has. A trial is one
run with a seed of its own, 100, whose held-out conditions and noise are none of the reported ones.
Taken is the trial with the largest gain in the trained reward of those that keep what nothing
trains within the domain's bounds, as FID at most 5 higher; of the reward alone, exploited settings
are the best (`--reward-alone` takes those). Then the arm is trained with each of the reported
seeds. All train a LoRA of rank 16 (Noise PPO its policy) of the embedded model without guidance, in
rounds of 512 candidates, until the fit has spent its budget of reward calls (`--reward-calls`), or,
apart from trials, of rows of the denoiser (`--denoiser-calls`; runs that spent just as many under
the other budget are taken over). The seed sets the initialisation, the conditions and every sample.
Tuned and reference samples share held-out conditions and noise. The table gives the interquartile
mean of the seeds' paired gains with its 95 % bootstrap interval; what metrics were and became,
since samplers differ in noise and so start from other references; and the probability that a run
ends with more reward than one of the first arm's.
A second table has what every trial changed.

    python benchmarks/fair_comparison.py layout --root runs/fair --seeds 0 1 2 3 4 --workers 2
    python benchmarks/fair_comparison.py layout --denoiser-calls 400000 --root runs/fair_calls
    python benchmarks/fair_comparison.py molecule --reward-calls 5120 --trials 3

A finished run adds a line to `--results`, an interrupted one goes on from its checkpoint: the
committed files of `benchmarks/comparisons` draw their tables again without a run, and a benchmark
that was interrupted goes on where it stopped.
"""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aggregates import improvement, interquartile_mean
from command_line import Report, command_line, fit_and_test, print_table, run_all

from lit_rlft.runs.lines import append_lines, read_lines

RESULTS = Path(__file__).parent / "comparisons"
SEARCH_SEED = 100
COSTS = ("reward_calls", "denoiser_calls", "seconds")
TRIALS = 6
ROUND = 512  # candidates, which are reward calls
RATES = ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2", "3e-2")
LOWER = ("1e-5", "3e-5", *RATES[:4])
NARROW = {RATES: RATES[1:4], LOWER: RATES[:3]}
LORA = ["--model.lora.rank", "16", "--model.lora.alpha", "16"]


@dataclass(frozen=True)
class Domain:
    """Where algorithms are compared.

    Attributes:
        options: Configs and settings of the domain.
        steps: Steps of samplers.
        metrics: Names in metrics.json; the first is the reward that judges.
        bounds: How far some of them may move in a trial: up if positive, down if negative.
        reward_scales: Of adjoint matching, three to four and one over the standard deviation that
            the reward with a gradient has among reference samples.
        differentiable: Options that train for a reward with a gradient and judge by the domain's,
            or none where that has one.
        settings: What an algorithm needs there, by its config's name.
        dear: Whether a run is so dear that arms without a second setting have `NARROW` rates.
    """

    options: Sequence[str]
    steps: int
    metrics: Sequence[str]
    bounds: Mapping[str, float]
    reward_scales: Sequence[str]
    differentiable: Sequence[str] = ()
    settings: Mapping[str, Sequence[str]] = field(default_factory=dict)
    dear: bool = False


DOMAINS = {
    "layout": Domain(
        [
            *("--config", "configs/domains/layout.yaml", "--data.source.num_pages", "65536"),
            *("--data.num_test", "256", "--data.eval_batch_size", "256"),
        ],
        20,
        ("WeightedSum", "fid", "diversity", "kl"),
        {"fid": 5.0, "diversity": -0.05},
        ("30", "10"),
    ),
    "molecule": Domain(
        [
            *("--config", "configs/domains/molecule.yaml", "--data.num_train", "65536"),
            *("--data.num_test", "256", "--data.eval_batch_size", "256"),
        ],
        20,
        ("Stability", "uniqueness", "novelty", "kl"),
        {"uniqueness": -0.1},
        ("10", "3"),
        [
            *("--config", "configs/domains/molecule_soft.yaml"),
            *("--metrics.parts+", "domains.molecule.rewards.Stability"),
            *("--metrics.parts.connected", "true"),
        ],
        {"drtune": ["--model.method.init_args.m", "1"]},  # rewards say nothing of earlier estimates
    ),
    "shapes": Domain(
        [
            *("--config", "configs/domains/shapes.yaml", "--pipeline.guidance_scale", "1.0"),
            *("--data.num_train_prompts", "65536", "--data.num_test_prompts", "192"),
            *("--pipeline.channels_last", "true"),
        ],
        10,
        ("ShapesEval", "CLIPScore", "diversity", "kl"),
        {"CLIPScore": -0.02},
        ("1.2", "0.4"),
        [
            *("--reward", "domains.text_to_image.rewards.ShapesClassifier"),
            *("--metrics.parts+", "domains.text_to_image.rewards.ShapesEval"),
        ],
        {"drtune": ["--model.method.init_args.m", "5"]},  # half of the steps, as elsewhere
        dear=True,
    ),
}


@dataclass(frozen=True)
class Arm:
    """One algorithm.

    Attributes:
        config: Its config's name.
        candidates: Candidates of a condition; 1 for reward gradients.
        settings: What is set besides.
        rates: Learning rates to choose from.
        second: Another setting to choose, and its values; with none they are the domain's.
        gradient: Whether it needs the reward's gradient.
    """

    config: str
    candidates: int
    settings: Sequence[str] = ()
    rates: tuple[str, ...] = RATES
    second: tuple[str, Sequence[str]] | None = None
    gradient: bool = False

    def trials(self, domain: Domain) -> dict[str, list[str]]:
        """Return the settings to choose from, by name; all arms have as many."""
        own = NARROW[self.rates] if domain.dear and self.second is None else self.rates
        rates = {lr: ["--model.optimizer.init_args.lr", lr] for lr in own}
        if self.second is None:
            return rates
        key, values = self.second
        return {
            f"{lr} {value}": [*rate, f"--model.{key}", value]
            for lr, rate in rates.items()
            for value in values or domain.reward_scales
        }


_FIT = [*LORA, "--model.num_epochs", "2", "--model.minibatch_size", "128"]
_NOISE = ["--model.sampler.eta", "1.0"]  # as GRAFT and the policy gradients sample
_POLICY: Mapping[str, Any] = {
    "settings": [*LORA, "--model.minibatch_size", "256", "--model.microbatch_size", "1024"],
    "rates": RATES[1:4],
    "second": ("clip_range", ("1e-4", "5e-3")),
}
ARMS: Mapping[str, Arm] = {
    "P-GRAFT (f = 0.25)": Arm("p_graft", 4, _FIT),
    "GRAFT": Arm("graft", 4, _FIT),
    "GRAFT, iterative, contrast 16": Arm(
        "graft", 4, [*_FIT, "--model.iterative", "true", "--model.contrast", "16"]
    ),
    "RandomK (control)": Arm("random_k", 4, _FIT),
    "RAFT": Arm("raft", 4, _FIT, LOWER),
    "RWR": Arm("rwr", 4, _FIT),
    "DiffusionNFT": Arm("nft", 4, [*_FIT, *_NOISE], LOWER),
    "DiffusionNFT (eta = 0)": Arm("nft", 4, _FIT),
    "Diffusion-DPO": Arm("dpo", 4, [*_FIT, *_NOISE], RATES[:3], ("beta", ("20", "200"))),
    "DDPO": Arm("ddpo", 4, **_POLICY),
    "GRPO": Arm("grpo", 8, **_POLICY),
    "Flow-GRPO": Arm("flow_grpo", 8, **_POLICY),
    "MixGRPO": Arm("mix_grpo", 8, **_POLICY),
    "Noise PPO": Arm("noise_ppo", 4),
    "DRTune": Arm("drtune", 1, [*LORA, "--model.minibatch_size", "64"], LOWER, gradient=True),
    "Adjoint matching": Arm(
        "adjoint_matching", 1, LORA, RATES[:3], ("reward_scale", ()), gradient=True
    ),
}


class Comparison:
    """Runs of one domain.

    Args:
        domain: Its name.
        root: Folder of the runs.
        results: JSON lines, one a finished run.
        options: Of every run besides: what ends the fit, and further ones.
        trials: How many of an arm's are tried, evenly spaced.
    """

    def __init__(
        self, domain: str, root: Path, results: Path, options: Sequence[str], trials: int = TRIALS
    ) -> None:
        self.domain, self.root, self.results, self.options = DOMAINS[domain], root, results, options
        self.name, self.num_trials = domain, trials
        self.finished = {tuple(line["options"]): line for line in read_lines(results)}

    def run(self, arm: str, trial: str, seed: int) -> Report:
        """Train and test an arm unless that was done; return what metrics.json says of it."""
        options = self._options(arm, trial, seed)
        if (held := self.finished.get(tuple(options))) is not None:
            return held
        report = fit_and_test(self.root, f"{self.name} {arm} {trial} {seed}", options)
        kept = {name: report[name] for name in ("reference", "tuned", "gain")}
        kept["cost"] = {name: report["cost"][name] for name in COSTS}
        line = {"arm": arm, "trial": trial, "seed": seed, **kept, "options": options}
        append_lines(self.results, json.dumps(line) + "\n")
        self.finished[tuple(options)] = line
        return line

    def take(self, other: "Comparison", cost: str, spent: int) -> None:
        """Take over another's runs that spent just so much: a budget of that is the same run."""
        for line in list(other.finished.values()):
            if line["cost"][cost] == spent:
                options = self._options(line["arm"], line["trial"], line["seed"])
                self.finished.setdefault(tuple(options), line)

    def _options(self, arm: str, trial: str, seed: int) -> list[str]:
        own, domain = ARMS[arm], self.domain
        options = [*domain.options, *(domain.differentiable if own.gradient else [])]
        options += ["--config", f"configs/algorithms/{own.config}.yaml", *own.settings]
        options += domain.settings.get(own.config, ())
        options += ["--data.batch_size", str(ROUND // own.candidates)]
        if own.candidates > 1:
            options += ["--model.num_candidates", str(own.candidates)]
        options += ["--model.sampler.num_steps", str(domain.steps)]
        options += [*own.trials(domain)[trial], *self.options]
        return [*options, "--model.seed", str(seed), "--data.seed", str(seed)]

    def gain(self, report: Report) -> float:
        """Return the gain in the reward that the domain is about."""
        return float(report["gain"][self.domain.metrics[0]]["mean"])

    def moved(self, report: Report, metric: str) -> float:
        """Return by how much a metric of the samples changed."""
        return float(report["tuned"][metric]["mean"] - report["reference"][metric]["mean"])

    def search(self, arms: Sequence[str], workers: int) -> dict[str, dict[str, Report]]:
        """Return what each trial of each arm gave."""
        trials = {arm: spaced(ARMS[arm].trials(self.domain), self.num_trials) for arm in arms}
        jobs = [(arm, trial, SEARCH_SEED) for arm in arms for trial in trials[arm]]
        found = run_all(jobs, lambda job: self.run(*job), workers)
        return {
            arm: {trial: found[arm, trial, SEARCH_SEED] for trial in trials[arm]} for arm in arms
        }

    def best(self, trials: Mapping[str, Report], reward_alone: bool = False) -> str:
        """Return the trial with the largest gain of those within the domain's bounds.

        Where none is, the trial nearest to them is taken.

        Args:
            trials: What each trial gave.
            reward_alone: Ask for the largest gain alone.
        """
        bounds = {} if reward_alone else self.domain.bounds

        def merit(trial: str) -> tuple[float, float]:
            report = trials[trial]
            used = [self.moved(report, metric) / bound for metric, bound in bounds.items()]
            return -max([1.0, *used]), self.gain(report)

        return max(trials, key=merit)

    def row(self, arm: str, trial: str, reports: list[Report], against: list[Report]) -> list[str]:
        """Return one line of the table."""
        reward = self.domain.metrics[0]
        gains = [self.gain(report) for report in reports]
        ends, others = ([r["tuned"][reward]["mean"] for r in runs] for runs in (reports, against))
        cells = [arm, trial, f"{interquartile_mean(gains):+.3f}"]
        for metric in self.domain.metrics:
            was, became = (
                statistics.mean(report[side][metric]["mean"] for report in reports)
                for side in ("reference", "tuned")
            )
            cells.append(f"{was:.3f} → {became:.3f}")
        cells.append(f"{improvement(ends, others):.2f}")
        for cost in COSTS:
            cells.append(f"{statistics.mean(r['cost'][cost] for r in reports):,.0f}")
        return cells

    def trial_row(self, arm: str, trials: Mapping[str, Report]) -> list[str]:
        """Return one line of the table of trials: gain, what is bounded, and path KL of each."""
        shown = (*self.domain.bounds, "kl")
        return [arm] + [
            f"{trial}: {self.gain(report):+.3f}, "
            + ", ".join(f"{self.moved(report, metric):+.3g}" for metric in shown)
            for trial, report in trials.items()
        ]


def spaced(trials: Iterable[str], num: int) -> list[str]:
    """Return so many of the trials, evenly spaced from the first on."""
    every = list(trials)
    return every[:: max(1, len(every) // num)]


def _budget(kind: str, calls: int, extra: Sequence[str]) -> list[str]:
    """Return the options of runs that end at a number of calls."""
    callback = ["--trainer.callbacks+", "lit_rlft.callbacks.budget.Budget"]
    limit = [f"--trainer.callbacks.{kind}", str(calls)]
    return [*callback, *limit, "--trainer.max_epochs", "9", *extra]


def main() -> None:
    """Search, run all arms and print the tables."""
    parser = command_line(__doc__ or "", "runs/fair_comparison", ARMS, range(5))
    parser.add_argument("domain", choices=list(DOMAINS))
    parser.add_argument("--reward-calls", type=int, default=20 * ROUND, help="default: 20 rounds")
    parser.add_argument("--denoiser-calls", type=int, help="of the reported runs, instead")
    parser.add_argument(
        "--results", type=Path, help="default: benchmarks/comparisons/<domain>.jsonl"
    )
    parser.add_argument(
        "--reward-alone", action="store_true", help="choose trials without a look at the bounds"
    )
    parser.add_argument("--trials", type=int, default=TRIALS, choices=(3, TRIALS))
    options, extra = parser.parse_known_args()
    results = options.results or RESULTS / f"{options.domain}.jsonl"
    spent = _budget("reward_calls", options.reward_calls, extra)
    searched = Comparison(options.domain, options.root, results, spent, options.trials)
    trials = searched.search(options.arms, options.workers)
    compared = searched
    if options.denoiser_calls is not None:
        budget = _budget("denoiser_calls", options.denoiser_calls, extra)
        compared = Comparison(options.domain, options.root, results, budget)
        compared.take(searched, "denoiser_calls", options.denoiser_calls)
    best = {arm: compared.best(trials[arm], options.reward_alone) for arm in options.arms}
    jobs = [(arm, best[arm], seed) for seed in options.seeds for arm in options.arms]
    found = run_all(jobs, lambda job: compared.run(*job), options.workers)
    reports = {arm: [found[arm, best[arm], s] for s in options.seeds] for arm in options.arms}
    against = reports[options.arms[0]]
    rows = [compared.row(arm, best[arm], reports[arm], against) for arm in options.arms]
    columns = ["arm", "settings", "gain, IQM (95 %)", *compared.domain.metrics]
    columns += [f"P(above {options.arms[0]})", *(name.replace("_", " ") for name in COSTS)]
    print_table(columns, rows)
    print()
    shown = ", ".join(("trials: gain", *compared.domain.bounds, "kl"))
    columns = ["arm", shown, *[""] * (options.trials - 1)]
    print_table(columns, [compared.trial_row(arm, trials[arm]) for arm in options.arms])


if __name__ == "__main__":
    main()
