"""What a change of the reward, in one line, does to the distributions of QED and logP.

Method: GRAFT on `configs/domains/molecule_heavy.yaml` with its own reward, QED, and with
`--reward domains.molecule.rewards.LogP --reward.target ...`, at equal reward calls. Then reference
and tuned models draw molecules of the same sizes from the same noise; QED and Crippen's logP of
those that are valid and connected are compared.

    python benchmarks/molecule_rewards.py --plot docs/molecule_rewards.png

Finished runs are kept, so an interrupted benchmark goes on where it stopped.
"""

from pathlib import Path

import numpy as np
import torch
from command_line import command_line, fit_and_test, folder_of, print_table, run_all
from molecule_models import sample
from numpy.typing import NDArray

from domains.molecule.chemistry import chemistry_of
from domains.molecule.data import AtomCounts
from domains.molecule.molecules import Molecules
from domains.molecule.pipeline import MoleculePipeline
from lit_rlft.core.sampling import Sampler

TARGET = 2.0
REWARDS = {
    "QED": [],
    f"logP {TARGET:g}": [
        *("--reward", "domains.molecule.rewards.LogP", "--reward.target", str(TARGET)),
    ],
}
DESCRIPTORS = ("qed", "logp")
OPTIONS = [
    *("--config", "configs/domains/molecule_heavy.yaml"),
    *("--config", "configs/algorithms/graft.yaml"),
    *("--model.num_candidates", "4", "--model.num_epochs", "4", "--model.minibatch_size", "128"),
    *("--model.lora.rank", "16", "--model.lora.alpha", "16", "--model.optimizer.lr", "1e-3"),
    *("--model.iterative", "true"),
    *("--model.sampling_batch_size", "512", "--data.batch_size", "128"),
    *("--data.num_test", "256", "--data.eval_batch_size", "256"),
]


def draw(model: str, num: int) -> Molecules:
    """Return molecules of a model, named or in a folder, from fixed sizes and noise."""
    pipeline = MoleculePipeline(model)
    counts = AtomCounts("qm9_heavy", num_train=num)
    counts.setup("fit")
    rows = counts.rows("train")
    sizes = torch.stack([rows[i]["num_atoms"] for i in range(num)])
    return sample(pipeline, sizes, Sampler(20, 1.0))[0]


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
    parser.add_argument("--rounds", type=int, default=10, help="of 512 reward calls")
    parser.add_argument("--num", type=int, default=1024, help="molecules to compare")
    parser.add_argument("--plot", type=Path, default=None, help="needs matplotlib")
    options, extra = parser.parse_known_args()
    seed = str(options.seeds[0])
    extra = ["--model.seed", seed, "--data.num_train", str(128 * options.rounds), *extra]
    jobs = [(reward,) for reward in REWARDS]

    def run(job: tuple[str]) -> dict[str, float]:
        return fit_and_test(options.root, job[0], [*OPTIONS, *REWARDS[job[0]], *extra])

    run_all(jobs, run, options.workers)
    models = {"reference": "heavy"}
    models |= {f"tuned: {r}": str(folder_of(options.root, r) / "tuned") for r in REWARDS}
    found, rows = {}, []
    for name, model in models.items():
        molecules = draw(model, options.num)
        found[name] = values_of(molecules)
        cells = [f"{values.mean():.3f} ± {values.std():.3f}" for values in found[name].values()]
        chemistry = chemistry_of(molecules)
        unique = len({smiles for smiles in chemistry.smiles if smiles}) / chemistry.valid.sum()
        rows.append([name, f"{chemistry.connected.mean():.3f}", f"{unique:.3f}", *cells])
    columns = ["model", "valid and connected", "unique of valid", "QED ± spread", "logP ± spread"]
    print_table(columns, rows)
    if options.plot is not None:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
