"""Alignment, overlap, reward, diversity and FID of the layout domain under each algorithm.

Method: `configs/domains/layout.yaml` and one algorithm's config, trained and tested once per arm
and seed through the command line. Every arm may score as many samples (`--reward-calls`), in
rounds of 512 candidates, with a LoRA of rank 16 (Noise PPO: its policy); what is set besides is in
`ARMS`. r is the domain's own reward, -O - 10 A + coverage / 2 + inside page. The seed sets the
adapter's initialisation, every sample drawn and the split of the pages. Tuned and reference samples
share noise; the gain is the mean over seeds of the paired difference, its standard error that of
the seeds' means. The mixed state runs with the algorithms that can.

    python benchmarks/layout_algorithms.py --root runs/layout_algorithms --seeds 0 1 2 --workers 1

Finished runs are kept, so an interrupted benchmark goes on where it stopped.
"""

from pathlib import Path

from command_line import Report, compare_arms, fit_and_test

GROUP = 512
LORA = ["--model.lora.rank", "16", "--model.lora.alpha", "16"]
GRAFT = [*LORA, "--model.num_epochs", "4", "--model.minibatch_size", "128"]
GRAFT += ["--model.optimizer.init_args.lr", "1e-3", "--model.num_candidates", "4"]
DDPO = [*LORA, "--model.optimizer.init_args.lr", "1e-3", "--model.minibatch_size", "256"]
DDPO += ["--model.num_candidates", "4", "--model.microbatch_size", "1024"]
DRTUNE = [*LORA, "--model.optimizer.init_args.lr", "1e-3", "--model.minibatch_size", "64"]
# Arm: domain, algorithm, conditions of a round (candidates times these are GROUP), settings.
ARMS: dict[str, tuple[str, str, int, list[str]]] = {
    "GRAFT": ("layout", "graft", 128, GRAFT),
    "P-GRAFT (f = 0.25)": ("layout", "p_graft", 128, GRAFT),
    "RandomK (f = 0.25)": ("layout", "random_k", 128, GRAFT),
    "DDPO": ("layout", "ddpo", 128, DDPO),
    "DRTune": ("layout", "drtune", 512, DRTUNE),
    "Noise PPO": ("layout", "noise_ppo", 64, []),
    "mixed: GRAFT": ("layout_mixed", "graft", 128, GRAFT),
    "mixed: P-GRAFT (f = 0.25)": ("layout_mixed", "p_graft", 128, GRAFT),
    "mixed: RandomK (f = 0.25)": ("layout_mixed", "random_k", 128, GRAFT),
    "mixed: DDPO": ("layout_mixed", "ddpo", 128, DDPO),
}
METRICS = (
    "WeightedSum",
    "alignment_100",
    "overlap",
    "num_elements",
    "class_tv",
    "diversity",
    "fid",
)


def run(root: Path, arm: str, seed: int, reward_calls: int, extra: list[str]) -> Report:
    """Train and test one arm with one seed; return its metrics.json."""
    domain, algorithm, num_conditions, settings = ARMS[arm]
    num_rounds = reward_calls // GROUP
    options = ["--config", f"configs/domains/{domain}.yaml"]
    options += ["--config", f"configs/algorithms/{algorithm}.yaml", *settings]
    options += ["--data.batch_size", str(num_conditions), "--trainer.max_epochs", "1"]
    options += ["--trainer.limit_train_batches", str(num_rounds)]
    options += ["--data.source.num_pages", str(num_conditions * num_rounds + 2048)]
    options += ["--model.sampling_batch_size", "512", "--data.num_test", "192"]
    options += ["--model.seed", str(seed), "--data.seed", str(seed), *extra]
    return fit_and_test(root, f"{arm} {seed}", options)


if __name__ == "__main__":
    compare_arms(__doc__, "runs/layout_algorithms", ARMS, METRICS, run, 20 * GROUP)
