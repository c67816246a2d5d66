"""Does a corrector beat more steps of its base on 32 x 32 patches of photographs?

Method: `photo_patches.py` cuts the patches, and splits them by place. `base` pretrains a flow on
the training ones through the command line, with `configs/experiments/
shapes_unconditional_pretrain.yaml` and these data. `run` draws pictures with every number of base
steps; then, for each of `--base-steps` and `--widths`, it trains a corrector (an MLP of three
hidden layers) on the inverted training patches, which are inverted once per number of steps, and
draws again, from the same initial noise. FID is against held-out patches, no pixel of which was
trained on, by three networks' features, as nothing here has seen photographs: random convolutions
(fixed seed); the same of pictures without their mean colour and contrast, "structure"; and those of
the embedded shapes. Training patches against held-out ones say what FID the data themselves have.
Errors are jackknife standard errors over the drawn pictures, of differences over pairs from the
same noise, and with several seeds that of their mean beside it; the held-out patches and the base
are taken as they are. FLOPs are of the forward passes of corrector and base, by torch's counter.
"Copies" asks whether inverted patches are copied: the place of their distance to the pictures among
those of 39 other sets of training patches, in ascending order. Where nothing is copied all places
are as likely, and the base, which has not seen these patches more than others, is the control.

    python benchmarks/photo_patches.py --out runs/patches
    python benchmarks/patch_correction.py base --root runs/patches
    python benchmarks/patch_correction.py run --root runs/patches
    python benchmarks/patch_correction.py table --root runs/patches
    python benchmarks/patch_correction.py figure --root runs/patches --figure costs.png
    python benchmarks/patch_correction.py pictures --root runs/patches --figure pictures.png

The pictures of each arm are kept in a file, so that an interrupted benchmark goes on.
"""

import argparse
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import fit, print_table, standard_error
from quiet import quiet_trainer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from domains.image.data import ImageData
from domains.image.metrics import SetDistances
from domains.image.networks.features import features_of
from domains.image.pipeline import ImagePipeline
from domains.image.rewards import Brightness
from domains.image.sources import Arrays
from lit_rlft.algorithms.inverse_noise_correction import InverseNoiseCorrection
from lit_rlft.core.fixed_point import FixedPoint
from lit_rlft.core.randomness import seed_from
from lit_rlft.core.reward import LeftOut
from lit_rlft.core.sampling import Sampler
from lit_rlft.evaluation.jackknife import compared
from lit_rlft.kit.leave_out import frechet_left_out

CONFIG = "configs/experiments/shapes_unconditional_pretrain.yaml"
DEPTH, CORRECTOR_STEPS = 3, 5
OTHER_SETS = 39
OWN, STRUCTURE, SHAPES = "random_convolutions", "structure", "shapes_features"


class RandomConvolutions(nn.Module):
    """Features of untrained networks: three convolutions, and each channel's mean and deviation.

    Args:
        standardised: Take each picture's mean colour and its contrast away first, so that only the
            structure counts; else nothing is normalised within a picture.
    """

    widths = (16, 32, 32)

    def __init__(self, standardised: bool = False) -> None:
        super().__init__()
        self.standardised = standardised
        self.name = STRUCTURE if standardised else OWN
        channels, layers = 3, []
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for i, width in enumerate(self.widths):
                layer = nn.Conv2d(channels, width, 3, stride=1 if i == 0 else 2, padding=1)
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                layers.append(layer)
                channels = width
        self.layers = nn.ModuleList(layers).requires_grad_(False)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the features of pictures [B, 3, H, W] in [0, 1], [B, 160]."""
        maps, found = 2 * pictures - 1, []
        if self.standardised:
            maps = maps - maps.mean(dim=(2, 3), keepdim=True)
            # What hardly varies, such as a sky, is not blown up to full contrast.
            maps = maps / (maps.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() + 0.05)
        for layer in self.layers:
            maps = layer(maps).relu()
            found += [maps.mean(dim=(2, 3)), maps.std(dim=(2, 3))]
        return torch.cat(found, dim=1)


Moment = tuple[float, float]
"""A number and its standard error."""


@dataclass(frozen=True)
class Arm:
    """What draws pictures: base steps, and the width of the corrector before them, 0 for none."""

    base_steps: int
    width: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        """For files."""
        return f"{self.base_steps}_width_{self.width}_seed_{self.seed}"

    @property
    def title(self) -> str:
        """For the rows of a figure."""
        steps = "1 step" if self.base_steps == 1 else f"{self.base_steps} steps"
        return f"{steps}, corrected" if self.width else steps

    @classmethod
    def of(cls, path: Path) -> "Arm":
        """Return the arm of a file."""
        return cls(*map(int, path.stem.split("_")[::2]))


def base(root: Path, num_updates: int, extra: Sequence[str]) -> None:
    """Pretrain the base through the command line."""
    sources = {"source": "train", "val_source": "held_out", "test_source": "held_out"}
    arguments: dict[str, Any] = {
        key: {"class_path": "domains.image.sources.Arrays", "init_args": {"path": str(path)}}
        for key, path in ((key, root / f"{name}.npy") for key, name in sources.items())
    }
    arguments |= {"num_val": 40, "num_test": 40, "batch_size": 16, "eval_batch_size": 40}
    config = root / "patches.yaml"
    data = {"class_path": "domains.image.data.ImageData", "init_args": arguments}
    average = {"class_path": "lit_rlft.callbacks.ema.EMA", "init_args": {"decay": 0.99}}
    config.write_text(json.dumps({"data": data, "trainer": {"callbacks": [average]}}))
    options = ["--config", CONFIG, "--config", str(config)]
    options += ["--pipeline.architecture.block_out_channels", "[16, 32, 64]"]
    options += ["--pipeline.architecture.attention_head_dim", "16", "--model.minibatch_size", "16"]
    for key in ("trainer.max_steps", "trainer.val_check_interval"):
        options += [f"--{key}", str(num_updates)]
    options += ["--model.lr_scheduler.total_steps", str(num_updates)]
    fit(root / "base", [*options, *extra])


def pipeline_of(root: Path) -> ImagePipeline:
    """Return the trained base."""
    return ImagePipeline(str(root / "base" / "tuned")).eval().requires_grad_(False)


def tuner_of(root: Path, arm: Arm, options: argparse.Namespace) -> InverseNoiseCorrection:
    """Return the base with a new corrector."""
    return InverseNoiseCorrection(
        pipeline_of(root),
        Brightness(),
        corrector_steps=CORRECTOR_STEPS,
        width=arm.width or 16,
        depth=DEPTH,
        solver=FixedPoint(options.tolerance, options.max_iterations),
        data_noise=options.data_noise,
        noise_folder=str(root / f"noise_{arm.base_steps}"),
        sampler=Sampler(arm.base_steps),
        seed=arm.seed,
        num_epochs=options.passes,
        minibatch_size=64,
        sampling_batch_size=64,
    )


def fitted(root: Path, arm: Arm, options: argparse.Namespace) -> InverseNoiseCorrection:
    """Return the base with the arm's corrector, trained where there is one."""
    tuner = tuner_of(root, arm, options)
    trainer = quiet_trainer(
        max_epochs=options.epochs, limit_val_batches=0, default_root_dir=root / "runs"
    )
    if not arm.width:
        tuner.trainer = trainer
        tuner.setup("test")
        return tuner
    trainer.fit(tuner, data_of(root, options.rows))
    return tuner


def data_of(root: Path, num_train: int) -> ImageData:
    """Return the patches, the first so many of the training ones."""
    return ImageData(
        Arrays(str(root / "train.npy")),
        val_source=Arrays(str(root / "held_out.npy")),
        test_source=Arrays(str(root / "held_out.npy")),
        num_train=num_train,
        batch_size=num_train,
    )


def nearest_by_set(pictures: Tensor, root: Path, num: int) -> list[float]:
    """Return the mean distance of pictures [n, 3, 32, 32] to the nearest patch, by set of patches.

    The first set is the inverted ones, the others are as many random training patches each.
    """
    data = data_of(root, num)
    data.setup("fit")
    packed, inverted = data.chosen("train")
    others = np.setdiff1d(np.arange(len(packed)), inverted)
    random = np.random.default_rng(0)
    sets = [inverted, *(random.choice(others, num, replace=False) for _ in range(OTHER_SETS))]
    flat = pictures.flatten(1)
    patches = (torch.from_numpy(packed.pixels[rows]).flatten(1) / 255 for rows in sets)
    return [float(torch.cdist(flat, own).amin(dim=1).mean()) for own in patches]


def rank_of_first(distances: Sequence[float]) -> int:
    """Return the place of the first among all in ascending order, from 1 on."""
    return 1 + sum(other < distances[0] for other in distances[1:])


@torch.no_grad()
def draw(tuner: InverseNoiseCorrection, arm: Arm, num: int) -> Tensor:
    """Return pictures [num, 3, 32, 32]; the noise they start from does not depend on the arm."""
    tuner.eval()
    condition = tuner.pipeline.example().repeat(num)
    seeds = [seed_from(0, 1, i) for i in range(num)]
    route = tuner.route() if arm.width else tuner.reference_route()
    (x_0,) = tuner.rollouts.draw(route, condition, seeds, keep=[arm.base_steps])
    return tuner.pipeline.decode(x_0, condition)


@torch.no_grad()
def flops(tuner: InverseNoiseCorrection, arm: Arm) -> float:
    """Return the operations of one picture."""
    condition = tuner.pipeline.example()
    x, t = tuner.pipeline.blank(condition).zero_(), torch.full((1,), 0.5)
    with FlopCounterMode(display=False) as counter:
        tuner.pipeline.predict(x, t, condition)
    total = arm.base_steps * counter.get_total_flops()
    if arm.width:
        with FlopCounterMode(display=False) as counter:
            tuner.corrector.predict(x, t, condition)
        total += CORRECTOR_STEPS * counter.get_total_flops()
    return float(total)


class FID(SetDistances):
    """FID alone, with its errors."""

    def compare(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Return {"fid"}."""
        return {"fid": self.real.known.frechet_distance(features["features"])}

    def left_out(self, features: Mapping[str, Tensor], pairs: Tensor) -> dict[str, LeftOut]:
        """Return it when some samples are left out."""
        real = self.real.known.gaussian
        return {"fid": frechet_left_out(features["features"], real, pairs)}


def metrics(root: Path) -> list[FID]:
    """Return the distances from held-out patches by all three networks."""
    source = Arrays(str(root / "held_out.npy"))
    own, structure, shapes = (FID(source, SHAPES, max_images=2048) for _ in range(3))
    own.network = RandomConvolutions()  # type: ignore[assignment]
    structure.network = RandomConvolutions(standardised=True)  # type: ignore[assignment]
    return [own, structure, shapes]


def run(root: Path, arm: Arm, options: argparse.Namespace) -> dict[str, Any]:
    """Train and draw one arm; return its pictures and what they cost."""
    start = time.process_time()
    tuner = fitted(root, arm, options)
    trained = time.process_time() - start
    pictures = draw(tuner, arm, options.num)
    notes = list(tuner._noise.all_notes()) if tuner._noise is not None else []
    return {
        "pictures": (pictures * 255).round().byte(),
        "nearest": nearest_by_set(pictures, root, options.rows),
        "flops": flops(tuner, arm),
        "notes": notes,
        "seconds": (trained, time.process_time() - start - trained),
    }


def sweep(root: Path, options: argparse.Namespace) -> None:
    """Run what has no file yet."""
    arms = [Arm(n) for n in options.base_only]
    for seed in options.seeds:
        arms += [Arm(n, w, seed) for n in options.base_steps for w in options.widths]
    (root / "arms").mkdir(exist_ok=True)
    for arm in arms:
        path = root / "arms" / f"{arm.name}.pt"
        if path.exists():
            continue
        result = run(root, arm, options)
        torch.save(result, path)
        print(arm, "{:.0f} s to train, {:.0f} s to draw".format(*result["seconds"]), flush=True)


def held(root: Path, judged: Sequence[FID]) -> dict[Arm, dict[str, Any]]:
    """Return what every arm left, with the features of its pictures."""
    found = {}
    for path in sorted((root / "arms").glob("*.pt")):
        arm = Arm.of(path)
        result = torch.load(path, weights_only=True)
        result["features"] = {m.name: features_of(m.network, result["pictures"]) for m in judged}
        found[arm] = result
    return dict(sorted(found.items(), key=lambda item: (item[0].width, item[0].base_steps)))


def dearer(arm: Arm, results: Mapping[Arm, Mapping[str, Any]]) -> Arm | None:
    """Return the cheapest base that costs at least as many operations as an arm."""
    alone = [a for a in results if not a.width and results[a]["flops"] >= results[arm]["flops"]]
    return min(alone, key=lambda a: results[a]["flops"], default=None)


def distances(
    metric: FID, arm: Arm, results: Mapping[Arm, Mapping[str, Any]]
) -> tuple[Moment, Moment | None]:
    """Return an arm's FID, and its difference to the base that costs at least as much."""
    features = {"tuned": {"features": results[arm]["features"][metric.name]}}
    other = dearer(arm, results) if arm.width else None
    if other is not None:
        features["reference"] = {"features": results[other]["features"][metric.name]}
    found = compared(metric, features, metric.num_draws)
    moments = [found[name]["fid"] for name in ("tuned", "gain") if name in found]
    pairs = [(moment["mean"], moment["sem"]) for moment in moments]
    return pairs[0], pairs[1] if len(pairs) > 1 else None


def grouped(arms: Iterable[Arm]) -> dict[tuple[int, int], list[Arm]]:
    """Return the arms of all seeds by width and base steps."""
    groups: dict[tuple[int, int], list[Arm]] = defaultdict(list)
    for arm in arms:
        groups[arm.width, arm.base_steps].append(arm)
    return groups


def over_seeds(moments: Sequence[Moment]) -> Moment:
    """Return the mean over correctors, and an error that counts the pictures and the seeds.

    All seeds draw from the same noise, so that more of them do not make the pictures' part smaller.
    """
    values, errors = zip(*moments, strict=True)
    of_pictures = statistics.fmean(error**2 for error in errors) ** 0.5
    return statistics.fmean(values), math.hypot(of_pictures, standard_error(values, single=0.0))


def table(root: Path) -> None:
    """Print a row per width and number of base steps, the means over seeds."""
    judged = metrics(root)
    results = held(root, judged)
    columns = ["corrector", "base steps", "MFLOP", "base beside", "copies"]
    columns += [f"FID, {m.name}" for m in judged] + [f"minus it, {m.name}" for m in judged]
    rows = []
    num = len(next(iter(results.values()))["pictures"])
    real = torch.from_numpy(Arrays(str(root / "train.npy")).load().pixels[:num].copy())
    for metric in judged:
        alone = {"data": {"features": features_of(metric.network, real)}}
        found = compared(metric, alone, metric.num_draws)["data"]["fid"]
        print(f"{num} training patches, {metric.name}: {found['mean']:.4g} ± {found['sem']:.2g}")
    for (width, steps), arms in grouped(results).items():
        both = [[distances(metric, arm, results) for arm in arms] for metric in judged]
        other = dearer(arms[0], results) if width else None
        seeds = f", {len(arms)} seeds" if len(arms) > 1 else ""
        cells = [f"width {width}{seeds}" if width else "none", str(steps)]
        cells += [f"{results[arms[0]]['flops'] / 1e6:.4g}", str(other.base_steps) if other else ""]
        places = sorted(rank_of_first(results[arm]["nearest"]) for arm in arms)
        cells += [" ".join(map(str, places))]
        cells += ["{:.4g} ± {:.2g}".format(*over_seeds([value for value, _ in b])) for b in both]
        gains = [[gain for _, gain in b if gain] for b in both]
        cells += ["{:+.3g} ± {:.2g}".format(*over_seeds(g)) if g else "" for g in gains]
        rows.append(cells)
    print_table(columns, rows)


def draw_figure(root: Path, path: Path) -> None:
    """Plot FID over operations, a panel per network, with twice the standard errors."""
    import matplotlib.pyplot as plt

    judged = metrics(root)
    results = held(root, judged)
    figure, panels = plt.subplots(1, len(judged), figsize=(13, 4), layout="constrained")
    for metric, axes in zip(judged, panels, strict=True):
        groups = grouped(results)
        for width in sorted({width for width, _ in groups}):
            own = {steps: arms for (w, steps), arms in groups.items() if w == width}
            flops = [results[arms[0]]["flops"] for arms in own.values()]
            means = [
                over_seeds([distances(metric, arm, results)[0] for arm in arms])
                for arms in own.values()
            ]
            axes.errorbar(
                flops,
                [value for value, _ in means],
                [2 * error for _, error in means],
                fmt="o-" if not width else "s",
                capsize=3,
                label=f"corrector of width {width}" if width else "base alone",
            )
            for steps, x, (y, _) in zip(own, flops, means, strict=True):
                axes.annotate(str(steps), (x, y), (4, 4), textcoords="offset points")
        axes.set(xscale="log", yscale="log", xlabel="FLOPs per picture", ylabel=metric.name)
    panels[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def shown(root: Path) -> list[Arm]:
    """Return the arms whose pictures are shown: the base alone, then the middle width."""
    arms = sorted(map(Arm.of, (root / "arms").glob("*.pt")), key=lambda a: (a.width, a.base_steps))
    widths = sorted({arm.width for arm in arms if arm.width})
    middle = widths[len(widths) // 2] if widths else 0
    return [arm for arm in arms if arm.width in (0, middle) and not arm.seed]


def draw_pictures(root: Path, path: Path) -> None:
    """Show the first pictures of the base, of one corrector and of the data, a row per arm.

    All rows start from the same noise but the data. The corrector is the first of the middle width.
    """
    import matplotlib.pyplot as plt

    rows = {}
    for arm in shown(root):
        result = torch.load(root / "arms" / f"{arm.name}.pt", weights_only=True)
        rows[arm.title] = result["pictures"]
    held_out = Arrays(str(root / "held_out.npy")).load().pixels[:12]
    rows["held-out patches"] = torch.from_numpy(held_out.copy())
    figure, panels = plt.subplots(
        len(rows), 1, figsize=(10, 0.88 * len(rows)), layout="constrained"
    )
    for (name, pictures), axes in zip(rows.items(), panels, strict=True):
        axes.imshow(torch.cat([*pictures[:12]], dim=2).permute(1, 2, 0).numpy())
        axes.set_ylabel(name, rotation="horizontal", ha="right", va="center")
        axes.set(xticks=[], yticks=[])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=60)


def main() -> None:
    """Train the base, run the arms, print the table, draw the figure or the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["base", "run", "table", "figure", "pictures"])
    parser.add_argument("--root", type=Path, default=Path("runs/patches"))
    parser.add_argument("--updates", type=int, default=6000, help="of the base")
    parser.add_argument("--base-steps", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--base-only", type=int, nargs="+", default=[1, 2, 3, 4, 8, 16])
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the correctors")
    parser.add_argument("--num", type=int, default=1024, help="pictures of each arm")
    parser.add_argument("--rows", type=int, default=512, help="patches that are inverted")
    parser.add_argument("--epochs", type=int, default=10, help="rounds over them")
    parser.add_argument("--passes", type=int, default=8, help="over them in a round")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="of the inversion")
    parser.add_argument("--max-iterations", type=int, default=8, help="of the inversion's steps")
    parser.add_argument("--data-noise", type=float, default=0.0)
    parser.add_argument("--figure", type=Path, default=Path("docs/patches_cost.png"))
    options, extra = parser.parse_known_args()
    if extra and options.what != "base":
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if options.what == "base":
        base(options.root, options.updates, extra)
    elif options.what == "run":
        sweep(options.root, options)
    elif options.what == "table":
        table(options.root)
    elif options.what == "figure":
        draw_figure(options.root, options.figure)
    else:
        draw_pictures(options.root, options.figure)


if __name__ == "__main__":
    main()
