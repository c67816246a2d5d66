"""FID, KID, precision and recall of the embedded image models at several numbers of steps.

Method: draws as many images as there are real ones to compare with, from the same initial noise
for every number of steps, and compares them with the first half of the real images; "real" is the
second half. The digits' model was trained on most of both halves, so copies of its training data
would score as well as "real"; the shapes are painted anew, with a seed of their own. All sets have
the same size, errors are the jackknife's, and seconds are CPU time on one thread for sampling
alone.

    python benchmarks/image_models.py --model digits
    python benchmarks/image_models.py --model shapes --num 1000
"""

import argparse
import time

import numpy as np
import torch
from torch import Tensor

from domains.image.metrics import SetDistances
from domains.image.networks.features import features_of
from domains.image.pipeline import ImagePipeline
from domains.image.sources import Digits, Generated, Images, Source
from domains.text_to_image.shapes.pictures import paint
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Sampler
from lit_rlft.evaluation.jackknife import compared

BATCH_SIZE = 100


class Part(Source):
    """Some of a source's images.

    Args:
        images: All of them.
        rows: Which.
    """

    def __init__(self, images: Images, rows: np.ndarray) -> None:
        self.images = Images(images.pixels[rows])

    def load(self) -> Images:
        return self.images


@torch.no_grad()
def draw(pipeline: ImagePipeline, sampler: Sampler, num: int) -> Tensor:
    """Return images [num, 3, H, W] of the seeds 0, 1, ..."""
    parts = []
    for start in range(0, num, BATCH_SIZE):
        seeds = range(start, min(num, start + BATCH_SIZE))
        condition, noise = pipeline.encode({"index": seeds}), generators(list(seeds))
        x_1 = pipeline.process.prior(pipeline.blank(condition)).sample(noise)
        x_0 = sampler.sample(pipeline, pipeline.process, x_1, condition, noise)
        parts.append(pipeline.decode(x_0, condition))
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=["digits", "shapes"], default="digits")
    parser.add_argument("--num", type=int, default=898, help="images in each set")
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 5, 10, 20, 50])
    options = parser.parse_args()
    torch.set_num_threads(1)
    real = (
        Digits() if options.model == "digits" else Generated(paint, 2 * options.num, 32, seed=3)
    ).load()
    if not 0 < 2 * options.num <= len(real):
        raise SystemExit(
            f"--num {options.num} asks for two sets of as many real images, but {options.model} "
            f"has {len(real)}; give --num {len(real) // 2} or less"
        )
    order = np.random.default_rng(0).permutation(len(real))[: 2 * options.num]
    first, second = np.split(order, 2)
    metric = SetDistances(Part(real, first), f"{options.model}_features", max_images=None)
    held_out = torch.from_numpy(real.pixels[second]).expand(-1, 3, -1, -1)
    rows: dict[str, tuple[Tensor, float]] = {"real": (held_out, 0.0)}
    pipeline = ImagePipeline(options.model).eval()
    samplers = [Sampler(num_steps) for num_steps in options.steps] + [Sampler(20, 1.0)]
    for sampler in samplers:
        start = time.process_time()
        pictures = draw(pipeline, sampler, options.num)
        name = f"{sampler.num_steps} steps, eta {sampler.eta:g}"
        rows[name] = pictures, time.process_time() - start
    print(f"{options.model}, {options.num} images a set, features {metric.name}")
    for name, (pictures, seconds) in rows.items():
        features = {"features": features_of(metric.network, pictures)}
        values = compared(metric, {"all": features}, metric.num_draws)["all"]
        text = ", ".join(
            f"{key.partition('_')[0]} {value['mean']:.4f} ± {value['sem']:.4f}"
            for key, value in values.items()
        )
        print(f"{name}: {text}, {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
