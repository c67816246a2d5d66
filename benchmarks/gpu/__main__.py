r"""What this project reaches on a GPU: about 25 minutes, and a table of the results.

    python -m benchmarks.gpu                         # benchmarks/results/<device>.jsonl
    python -m benchmarks.gpu --parts limits sampling # some parts alone
    python -m benchmarks.gpu --tiny                  # tiny models, on any machine: tries the code
    python -m benchmarks.gpu table                   # docs/benchmarks/gpu.md from all results

Method: models have the real architectures and random weights, which cost what real ones do; they
are made on the device, and nothing is downloaded. Each part appends its rows to the file when it is
done; a part that is there is skipped, and one that was interrupted is run again. Arms take turns
after a warm-up; times are medians with quartiles, by the wall clock, the device's work included.
Out of memory is a result. Parts and what they measure stand in benchmarks/gpu/parts/.
"""

import argparse
import re
from pathlib import Path

import diffusers
import torch

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.runs import about, run
from benchmarks.gpu.table import PAGE, RESULTS, page


def main(words: list[str] | None = None) -> None:
    """Measure, or write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", nargs="?", choices=("run", "table"), default="run")
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), help="all of them if none")
    parser.add_argument("--results", type=Path, help="file of results, in JSON lines")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=25.0, help="for all parts together")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the code")
    options = parser.parse_args(words)
    if options.command == "table":
        PAGE.write_text(page(RESULTS))
        print(PAGE)
        return
    diffusers.utils.logging.set_verbosity_error()
    device = torch.device(options.device)
    if device.type == "cpu" and not options.tiny:
        parser.error("real sizes need a GPU; --tiny tries the code on a processor")
    name = re.sub(r"\W+", "_", about(device)["device"]).strip("_").lower()
    path = options.results or RESULTS / f"{'tiny_' if options.tiny else ''}{name}.jsonl"
    run(path, device, tiny=options.tiny, only=options.parts, minutes=options.minutes)
    print(path)


if __name__ == "__main__":
    main()
