"""Makes the enumerated molecules and caches them, or writes those that ship with the package.

    python -m domains.molecule.train.make_data --num-workers 2

fills the cache that `domains.molecule.sources.Enumerated` reads with the same settings; `--asset`
writes assets/enumerated.safetensors instead, where the default settings find it.
"""

import argparse
import time
from collections.abc import Sequence

from domains.molecule.chemistry.elements import EXPLICIT, HEAVY
from domains.molecule.data import histogram
from domains.molecule.sources import Enumerated

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = _parser().parse_args(arguments)
    source = Enumerated(
        options.max_heavy,
        options.num_attempts,
        options.seed,
        HEAVY if options.heavy else EXPLICIT,
        options.num_workers,
        cache_dir=options.cache_dir,
    )
    start = time.perf_counter()
    if options.asset:
        print(f"wrote {source.write_asset()}")
    packed = source.load()
    seconds = time.perf_counter() - start
    print(f"{len(packed)} molecules in {seconds:.0f} seconds; by number of atoms:")
    print(histogram(packed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--max-heavy", type=int, default=6, help="most heavy atoms")
    parser.add_argument("--num-attempts", type=int, default=300_000, help="molecules grown")
    parser.add_argument("--seed", type=int, default=0, help="seed of the growth")
    parser.add_argument("--heavy", action="store_true", help="keep heavy atoms only")
    parser.add_argument("--num-workers", type=int, default=0, help="processes; 0 uses this one")
    parser.add_argument("--cache-dir", default=None, help="folder of the arrays")
    parser.add_argument("--asset", action="store_true", help="write the file that ships")
    return parser


if __name__ == "__main__":
    main()
