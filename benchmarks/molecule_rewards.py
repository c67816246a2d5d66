"""What a change of the reward, in one line, does to the distributions of QED and logP.

Method: P-GRAFT on `configs/domains/molecule_heavy.yaml` with its own reward, QED, and with
`--reward domains.molecule.rewards.LogP --reward.target ...`, at equal reward calls, with the
settings of `configs/experiments/molecule_p_graft.yaml` but for the 8 best of 32 and a contrast of
32. Then reference and tuned models draw molecules of the same sizes from the same noise; QED and
Crippen's logP of those that are valid and connected are compared.

    python benchmarks/molecule_rewards.py --plot docs/molecule_rewards.png

Finished runs are kept, so an interrupted benchmark goes on where it stopped.
"""

from pathlib import Path

import numpy as np
import torch
from command_line import command_line, fit_and_test, folder_of, print_table, run_all
from molecule_algorithms import CANDIDATES, CUT, GRAFT, ROUND, F, falling
from numpy.typing import NDArray

from domains.molecule.chemistry.batch import chemistry_of
from domains.molecule.data import AtomCounts
from domains.molecule.pipeline import MoleculePipeline
from domains.molecule.samples import Molecules
from lit_rlft.core.sampling import walk

TARGET, WIDTH = 0.0, 0.5  # of logP and its reward
REWARDS = {
    "QED": [],
    f"logP {TARGET:g}": [
        *("--reward", "domains.molecule.rewards.LogP", "--reward.target", str(TARGET)),
    ],
}
DESCRIPTORS = ("qed", "logp")
REFERENCE, NUM_STEPS = "heavy", 20
OPTIONS = [
    *("--config", "configs/domains/molecule_heavy.yaml"),
    *("--config", "configs/algorithms/p_graft.yaml", *GRAFT, *CUT),
    *("--model.selection.init_args.k", "8", "--model.contrast", "32"),
    *("--model.sampling_batch_size", str(ROUND), "--data.batch_size", str(ROUND // CANDIDATES)),
    *("--data.num_test", "256", "--data.eval_batch_size", "256"),
]


@torch.no_grad()
def draw(model: str, num: int) -> Molecules:
    """Return molecules of fixed sizes and noise; the reference runs the last steps, as in training.

    Args:
        model: Name or folder.
        num: Number of molecules.
    """
    tuned, reference = MoleculePipeline(model), MoleculePipeline(REFERENCE)
    counts = AtomCounts("qm9_heavy", num_train=num)
    counts.setup("fit")
    rows = counts.rows("train")
    condition = tuned.encode({"num_atoms": torch.stack([rows[i]["num_atoms"] for i in range(num)])})
    torch.manual_seed(1)
    x = tuned.process.prior(tuned.blank(condition)).sample()
    times, cut_step = tuned.process.times(NUM_STEPS), round((1 - F) * NUM_STEPS)
    for denoiser, leg in ((tuned, times[: cut_step + 1]), (reference, times[cut_step:])):
        *_, (_, x) = walk(denoiser, tuned.process, x, condition, leg, eta=1.0)
    return tuned.decode(x, condition)


def values_of(molecules: Molecules) -> dict[str, NDArray[np.float64]]:
    """Return the descriptors of valid and connected molecules."""
    chemistry = chemistry_of(molecules)
    return {name: chemistry.values(name)[chemistry.connected] for name in DESCRIPTORS}


def plot(found: dict[str, dict[str, NDArray[np.float64]]], path: Path) -> None:
    """Draw the distributions of each descriptor under each model."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for name, axes in zip(DESCRIPTORS, panels, strict=True):
        bins = np.histogram_bin_edges(np.concatenate([v[name] for v in found.values()]), 30)
        for model, values in found.items():
            axes.hist(values[name], bins, density=True, histtype="step", label=model)
        axes.set(xlabel={"qed": "QED", "logp": "logP"}[name], ylabel="density")
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run both rewards, print the table, draw the plot."""
    parser = command_line(__doc__, "runs/molecule_rewards", seeds=[0])
    parser.add_argument("--rounds", type=int, default=8, help="of 512 reward calls")
    parser.add_argument("--num", type=int, default=1024, help="molecules to compare")
    parser.add_argument("--plot", type=Path, default=None, help="needs matplotlib")
    options, extra = parser.parse_known_args()
    seed = str(options.seeds[0])
    num_train = str(options.rounds * ROUND // CANDIDATES)
    extra = ["--model.seed", seed, "--data.num_train", num_train, *falling(options.rounds), *extra]
    jobs = [(reward,) for reward in REWARDS]

    def run(job: tuple[str]) -> dict[str, float]:
        return fit_and_test(options.root, job[0], [*OPTIONS, *REWARDS[job[0]], *extra])

    run_all(jobs, run, options.workers)
    models = {"reference": REFERENCE}
    models |= {f"tuned: {r}": str(folder_of(options.root, r) / "tuned") for r in REWARDS}
    found, rows = {}, []
    for name, model in models.items():
        molecules = draw(model, options.num)
        found[name] = values_of(molecules)
        cells = [f"{values.mean():.3f} ± {values.std():.3f}" for values in found[name].values()]
        chemistry = chemistry_of(molecules)
        unique = len({smiles for smiles in chemistry.smiles if smiles}) / chemistry.valid.sum()
        near = (np.abs(found[name]["logp"] - TARGET) < WIDTH).mean()
        shares = [f"{share:.3f}" for share in (chemistry.connected.mean(), unique, near)]
        rows.append([name, *shares, *cells])
    columns = ["model", "valid and connected", "different, of valid"]
    columns += [f"logP within {WIDTH:g} of {TARGET:g}", "QED ± spread", "logP ± spread"]
    print_table(columns, rows)
    if options.plot is not None:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
