"""Quality of the embedded layout models by steps of the sampler, beside that of their data.

Method: pages of which nothing is given, by samplers of several steps and noises, a seed of noise
each; values with the standard error over pages, FID with the embedded encoder against 2,048 other
pages of the grammar (with its jackknife error). A model in a folder is named by its path.

    python benchmarks/layout_models.py --steps 12 24 48 96 288 --seeds 0 1
"""

import argparse
import time
from collections.abc import Iterator, Sequence

import torch

from domains.layout.metrics import LayoutMeasures, SetDistances, source_layouts
from domains.layout.pipeline import LayoutPipeline
from domains.layout.samples import Layouts
from domains.layout.sources import Grammar
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.randomness import generators, seed_from
from lit_rlft.core.sampling import Sampler
from lit_rlft.evaluation.measurements import Measurements

COLUMNS = ("alignment_100", "overlap", "num_elements", "coverage", "fid", "class_tv")
MODELS = ("grammar", "grammar_mixed", "grammar_gibbs")
BATCH = 256


@torch.no_grad()
def sample(
    pipeline: LayoutPipeline, num: int, sampler: Sampler, seed: int
) -> Iterator[tuple[Layouts, Condition]]:
    """Iterate over batches of pages, and what they were drawn under."""
    for start in range(0, num, BATCH):
        condition = pipeline.example().repeat(min(BATCH, num - start))
        noise = generators([seed_from(seed, start + i) for i in range(len(condition))])
        x_1 = pipeline.process.prior(pipeline.blank(condition)).sample(noise)
        x_0 = sampler.sample(pipeline, pipeline.process, x_1, condition, noise)
        yield pipeline.decode(x_0, condition), condition


def row(label: str, batches: Sequence[tuple[Layouts, Condition]]) -> str:
    """Return a line of the table."""
    each, distances, values = LayoutMeasures(), SetDistances(), Measurements()
    for i, batch in enumerate(batches):
        columns, features = each.evaluate(*batch), distances.features(*batch)
        values.add("all", i, columns, None, [""] * len(batch[1]), [features])
    found = values.summary(1, [distances], errors=True)["all"]
    cells = [f"{found[name]['mean']:.3f} ± {found[name]['sem']:.3f}" for name in COLUMNS]
    return f"| {label} | {' | '.join(cells)} |"


def main() -> None:
    """Print a table for every model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=1024, help="pages per row")
    parser.add_argument("--steps", type=int, nargs="+", default=[12, 25, 50, 100])
    parser.add_argument("--eta", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("models", nargs="*", default=MODELS, help="names or folders")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    for name in settings.models:
        pipeline = LayoutPipeline(name)
        print(f"| {name} | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
        data = source_layouts(Grammar(num_pages=settings.num, seed=2), settings.num)
        print(row("data", [(data, pipeline.example().repeat(settings.num))]))
        for eta in settings.eta:
            for steps in settings.steps:
                for seed in settings.seeds:
                    start = time.process_time()
                    pages = list(sample(pipeline, settings.num, Sampler(steps, eta), seed))
                    label = f"{steps} steps, eta {eta:g} ({time.process_time() - start:.1f} CPU-s)"
                    print(row(label, pages), flush=True)


if __name__ == "__main__":
    main()
