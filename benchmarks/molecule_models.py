"""Quality of the embedded molecule models, beside that of their training data.

Method: molecules with numbers of atoms drawn from the training data, by several samplers from one
seed; shares with the standard error of a share, by the bond tables and RDKit. The data's row is
measured on as many of the training molecules.

    python benchmarks/molecule_models.py --num 512
"""

import argparse
import math
import time

import numpy as np
import torch
from torch import Tensor

from domains.molecule.chemistry.elements import HEAVY
from domains.molecule.metrics import MoleculeMeasures, type_total_variation
from domains.molecule.pipeline import EMBEDDED, MoleculePipeline
from domains.molecule.samples import Molecules
from domains.molecule.sources import Enumerated
from domains.molecule.sources.packed import molecules_of
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.sampling import Sampler
from lit_rlft.evaluation.measurements import Measurements

SAMPLERS = [Sampler(20, 0.0), Sampler(50, 0.0), Sampler(20, 0.5)]
SAMPLERS += [Sampler(num_steps, 1.0) for num_steps in (20, 50, 100)]
COLUMNS = ("atom_stability", "molecule_stability", "validity", "connected", "uniqueness")


def data_of(pipeline: MoleculePipeline, num: int) -> Molecules:
    """Return molecules of the data that an embedded model was trained on, drawn at random."""
    source = Enumerated()
    if pipeline.architecture.implicit_hydrogens:
        source = Enumerated(max_heavy=9, num_attempts=30_000, elements=HEAVY)
    packed = source.load()
    rows = np.random.default_rng(0).permutation(len(packed))[:num]
    return molecules_of(packed, source.elements, rows)


@torch.no_grad()
def sample(pipeline: MoleculePipeline, sizes: Tensor, sampler: Sampler) -> tuple[Molecules, float]:
    """Return one molecule per entry of `sizes`, and the CPU-seconds it took."""
    condition = pipeline.encode({"num_atoms": sizes})
    torch.manual_seed(1)
    start = time.process_time()
    x_1 = pipeline.process.prior(pipeline.blank(condition)).sample()
    x_0 = sampler.sample(pipeline, pipeline.process, x_1, condition)
    return pipeline.decode(x_0, condition), time.process_time() - start


def row(label: str, molecules: Molecules, data: Molecules) -> str:
    """Return a line of the table; shares in percent."""
    condition = Condition([{}], {}, torch.zeros(len(molecules), dtype=torch.int64))
    metric, values = MoleculeMeasures(), Measurements()
    columns, features = (f(molecules, condition) for f in (metric.evaluate, metric.features))
    values.add("all", 0, columns, None, [""] * len(molecules), [features])
    found = values.summary(1, [metric], errors=True)["all"]
    cells = []
    for name in COLUMNS:
        mean, error = 100 * found[name]["mean"], 100 * found[name]["sem"]
        cells.append("-" if math.isnan(mean) else f"{mean:.1f} ± {error:.1f}")
    cells.append(f"{type_total_variation(molecules, data):.3f}")
    return f"| {label} | {' | '.join(cells)} |"


def main() -> None:
    """Print a table for every embedded model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--num", type=int, default=512, help="molecules per row")
    parser.add_argument("models", nargs="*", help="names or folders; all embedded ones if none")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    names = settings.models or sorted(path.name for path in EMBEDDED.iterdir() if path.is_dir())
    for name in names:
        pipeline = MoleculePipeline(name)
        data = data_of(pipeline, settings.num)
        print(f"| {name} | {' | '.join(COLUMNS)} | type TV |")
        print(row("data", data, data))
        for sampler in SAMPLERS:
            molecules, seconds = sample(pipeline, data.num_atoms, sampler)
            label = f"{sampler.num_steps} steps, eta {sampler.eta:g} ({seconds:.1f} CPU-s)"
            print(row(label, molecules, data), flush=True)


if __name__ == "__main__":
    main()
