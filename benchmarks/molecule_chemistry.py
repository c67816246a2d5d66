"""Molecules per CPU-second of stability, SMILES and descriptors; and how good real ones are.

Method: one process, one thread, processor time. Molecules are those of a file (.npz, .sdf or
.xyz), or the enumerated ones that ship with the package. Stability is the median of seven runs over
all of them; the rest is run once over the first few thousand, after a warm-up on others that loads
RDKit's tables, each stage from the results of the one before: SMILES from positions take bond
orders, sanitised graphs, fragments and SMILES together. The data row is what a perfect model of
these molecules would get by the same tables.

    python benchmarks/molecule_chemistry.py --path qm7_xyz.npz
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from domains.molecule.chemistry import bonds
from domains.molecule.chemistry.batch import Chemistry
from domains.molecule.chemistry.descriptors import DESCRIPTORS
from domains.molecule.metrics import Drugs, MoleculeMeasures
from domains.molecule.samples import Molecules
from domains.molecule.sources import Enumerated, MoleculeFile, Source
from domains.molecule.sources.packed import molecules_of
from lit_rlft.core.pipeline import Condition

REPEATS = 7
WARM_UP = 64


def seconds(work: Callable[[], object]) -> float:
    """Return the processor time that a call takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def speeds(molecules: Molecules, num_slow: int) -> dict[str, float]:
    """Return molecules per CPU-second of each piece of work."""
    times = [seconds(lambda: bonds.molecule_stability(molecules)) for _ in range(REPEATS)]
    found = {"stability": len(molecules) / statistics.median(times)}
    warm = Chemistry(molecules.index(slice(0, WARM_UP)))
    for name in DESCRIPTORS:
        warm.values(name)
    view = Chemistry(molecules.index(slice(WARM_UP, WARM_UP + num_slow)))
    found["sanitised SMILES"] = len(view) / seconds(lambda: Chemistry(view.molecules).smiles)
    assert view.connected.any()
    for name in DESCRIPTORS:
        found[name] = len(view) / seconds(lambda name=name: view.values(name))  # type: ignore[misc]
    few = Chemistry(view.molecules.index(slice(0, num_slow // 4)))
    assert few.connected.any()
    found["strain"] = len(few) / seconds(few.strain)
    return found


def row(molecules: Molecules) -> dict[str, float]:
    """Return the means of the metrics over a set of molecules."""
    condition = Condition([{}], {}, torch.zeros(len(molecules), dtype=torch.int64))
    measures = MoleculeMeasures()
    values = measures.evaluate(molecules, condition) | Drugs().evaluate(molecules, condition)
    means = {name: float(np.nanmean(value.numpy())) for name, value in values.items()}
    return means | measures.compare(measures.features(molecules, condition))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--path", help="a .npz, .sdf or .xyz file; enumerated molecules without")
    parser.add_argument("--num-slow", type=int, default=2000, help="molecules of the slow work")
    options = parser.parse_args()
    torch.set_num_threads(1)
    source: Source = MoleculeFile(options.path) if options.path else Enumerated()
    molecules = molecules_of(source.load(), source.elements)
    print(f"{len(molecules)} molecules of {source.label}, {molecules.types.shape[1]} slots")
    for name, speed in speeds(molecules, options.num_slow).items():
        print(f"{name:18} {speed:10,.0f} molecules per CPU-second")
    for name, value in row(molecules).items():
        print(f"{name:18} {value:10.4f}")


if __name__ == "__main__":
    main()
