"""Stability, validity, uniqueness and novelty of the molecule domain under each algorithm.

Method: `configs/domains/molecule.yaml` (for DRTune `molecule_soft.yaml`, whose reward has a
gradient) and one algorithm's config, trained and tested once per arm and seed through the command
line. Every arm may score as many molecules (`--reward-calls`), in rounds of 512 candidates, with a
LoRA of rank 16 (Noise PPO: its policy); what is set besides is in `ARMS`. The reward is binary:
every atom has its valence, and the molecule is in one piece. De-duplication keeps one of the
accepted candidates of a condition that have the same SMILES. The test draws 1,024 molecules; tuned
and reference molecules share noise. Uniqueness is within batches of 256 (4 of each of 64
conditions), because it depends on how many are looked at: of 256 molecules of the training data
98 % differ, of 1,024 only 92 %. The gain is the mean over seeds of the tuned model's mean minus the
reference's, its standard error that over seeds.

    python benchmarks/molecule_algorithms.py --root runs/molecule_algorithms --workers 2

Finished runs are kept, so an interrupted benchmark goes on where it stopped.
"""

from pathlib import Path

from command_line import Report, compare_arms, fit_and_test

ROUND = 512  # reward calls
EPOCHS, MINIBATCH = 2, 128  # of GRAFT, whose learning rate falls over all its updates
LORA = ["--model.lora.rank", "16", "--model.lora.alpha", "16"]
ACCEPT = ["--model.selection", "lit_rlft.core.selection.Threshold"]
UNIQUE = ["--model.selection", "lit_rlft.core.selection.Unique"]
UNIQUE += ["--model.selection.init_args.inner", "lit_rlft.core.selection.Threshold"]
CANDIDATES = 32  # of a condition
GRAFT = [*LORA, "--model.num_candidates", str(CANDIDATES), "--model.num_epochs", str(EPOCHS)]
GRAFT += ["--model.minibatch_size", str(MINIBATCH), "--model.optimizer.init_args.lr", "2e-3"]
GRAFT += ["--model.iterative", "true", "--model.contrast", "16"]
GRAFT += ["--model.lr_scheduler", "torch.optim.lr_scheduler.LinearLR"]
GRAFT += ["--model.lr_scheduler.init_args.start_factor", "1.0"]
GRAFT += ["--model.lr_scheduler.init_args.end_factor", "0.05"]
F = 0.1  # share of the steps that the reference runs
CUT = ["--model.cut", str(F)]
RANDOM = ["--model.selection.init_args.k", "8"]
DDPO = [*LORA, "--model.num_candidates", "4", "--model.minibatch_size", "64"]
DDPO += ["--model.microbatch_size", "1024", "--model.clip_range", "1e-2"]
DDPO += ["--model.optimizer.init_args.lr", "3e-3"]
DDPO += ["--model.num_train_steps", "5"]  # of 20: all cost three times as much
DRTUNE = [*LORA, "--model.optimizer.init_args.lr", "5e-4", "--model.minibatch_size", "64"]
DRTUNE += ["--model.sampler.num_steps", "20", "--model.method.init_args.k", "4"]
# To the end: soft valences of molecules predicted before it say nothing about those sampled.
DRTUNE += ["--model.method.init_args.m", "1"]
# Arm: domain, algorithm, conditions of a round (candidates times these are ROUND), settings.
ARMS: dict[str, tuple[str, str, int, list[str]]] = {
    "P-GRAFT (f = 0.1), unique": ("molecule", "p_graft", 16, [*GRAFT, *CUT, *UNIQUE]),
    "P-GRAFT (f = 0.1)": ("molecule", "p_graft", 16, [*GRAFT, *CUT, *ACCEPT]),
    "GRAFT, unique": ("molecule", "graft", 16, [*GRAFT, *UNIQUE]),
    "RandomK (f = 0.1)": ("molecule", "random_k", 16, [*GRAFT, *CUT, *RANDOM]),
    "DDPO": ("molecule", "ddpo", 128, DDPO),
    "DRTune (soft reward)": ("molecule_soft", "drtune", 512, DRTUNE),
    "Noise PPO": ("molecule", "noise_ppo", 64, []),
}
METRICS = (
    "molecule_stability",
    "atom_stability",
    "validity",
    "connected",
    "uniqueness",
    "novelty",
    "type_tv",
)


def falling(num_rounds: int) -> list[str]:
    """Return the setting by which GRAFT's learning rate falls over all updates of its rounds."""
    total = num_rounds * EPOCHS * ROUND // MINIBATCH
    return ["--model.lr_scheduler.init_args.total_iters", str(total)]


def run(root: Path, arm: str, seed: int, reward_calls: int, extra: list[str]) -> Report:
    """Train and test one arm with one seed; return its metrics.json."""
    domain, algorithm, num_conditions, settings = ARMS[arm]
    num_rounds = reward_calls // ROUND
    options = ["--config", f"configs/domains/{domain}.yaml"]
    options += ["--config", f"configs/algorithms/{algorithm}.yaml", *settings]
    if "--model.lr_scheduler" in settings:
        options += falling(num_rounds)
    options += ["--data.batch_size", str(num_conditions), "--trainer.max_epochs", "1"]
    options += ["--data.num_train", str(num_conditions * num_rounds)]
    options += ["--model.sampling_batch_size", "512"]
    options += ["--model.seed", str(seed), "--data.seed", str(seed), *extra]
    return fit_and_test(root, f"{arm} {seed}", options)


if __name__ == "__main__":
    compare_arms(__doc__, "runs/molecule_algorithms", ARMS, METRICS, run, 8 * ROUND)
