"""Memory and time of loading a COCO file of PubLayNet's make, beside json.load.

Method: writes a synthetic file (300 MB unless told otherwise: images, then annotations with
segmentations of about PubLayNet's length, then categories), then loads it in a process of its own,
once through `PubLayNet` and once through `json.load`, and prints each one's peak memory
(ru_maxrss), and what the imports alone take.

    python benchmarks/layout_loading.py --megabytes 300
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ELEMENTS = 10
NAMES = ("text", "title", "list", "table", "figure")
MEASURE = """
import json, resource, sys, time
from domains.layout.sources import PubLayNet
imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start, what, path, cache = time.process_time(), *sys.argv[1:]
if what == "PubLayNet":
    count = len(PubLayNet(path, cache_dir=cache).load())
elif what == "json.load":
    with open(path) as file:
        count = len(json.load(file)["images"])
else:
    count = 0
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"{what}: {count} pages, {time.process_time() - start:.1f} CPU-seconds, peak "
      f"{peak / 1024:.0f} MB ({(peak - imports) / 1024:.0f} MB beyond the imports)")
"""


def write(path: Path, megabytes: int) -> None:
    """Write a file of about this size."""
    rng = random.Random(0)
    # A page's entries are about 4.4 kB: 10 elements with a polygon each.
    num_pages = round(megabytes * 1e6 / 4400)
    with path.open("w") as file:
        file.write('{"images": [')
        for i in range(num_pages):
            name = f"PMC{i:07d}_00001.jpg"
            image = {"file_name": name, "height": 792, "id": i, "width": 612}
            file.write((", " if i else "") + json.dumps(image))
        file.write('], "annotations": [')
        for i in range(num_pages * ELEMENTS):
            # Like PubLayNet's, annotations of a page need not lie side by side.
            page, place = i % num_pages, i // num_pages
            top = 60 + 65 * place + rng.random()
            points = [round(600 * rng.random(), 2) for _ in range(36)]
            annotation = {
                "segmentation": [points],
                "area": 500 * 60.0,
                "iscrowd": 0,
                "image_id": page,
                "bbox": [50.0, top, 500.0, 60.0],
                "category_id": 1 + rng.randrange(5),
                "id": i,
            }
            file.write((", " if i else "") + json.dumps(annotation))
        names = [{"supercategory": "", "id": 1 + i, "name": name} for i, name in enumerate(NAMES)]
        file.write(f'], "categories": {json.dumps(names)}}}')


def main() -> None:
    """Write the file, load it both ways, print both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.json"
        start = time.process_time()
        write(path, options.megabytes)
        seconds = time.process_time() - start
        print(f"{path.stat().st_size / 1e6:.0f} MB written in {seconds:.0f} s", flush=True)
        for what in ("imports alone", "PubLayNet", "json.load"):
            command = [sys.executable, "-c", MEASURE, what, str(path), folder]
            subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)


if __name__ == "__main__":
    main()
