"""Every domain on a device other than the CPU, with each of its rewards and metrics."""

import json
import threading
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import move_data_to_device

from domains.gaussian_mixture import metrics as mixture_metrics
from domains.gaussian_mixture import rewards as mixture
from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.image import metrics as image_metrics
from domains.image import rewards as image
from domains.image.data import ImageData
from domains.image.pipeline import ImagePipeline
from domains.layout import metrics as layout_metrics
from domains.layout import rewards as layout
from domains.layout.data import LayoutData
from domains.layout.pipeline import LayoutPipeline
from domains.layout.sources import Grammar
from domains.molecule import metrics as molecule_metrics
from domains.molecule import rewards as molecule
from domains.molecule.data import MoleculeData
from domains.molecule.pipeline import MoleculePipeline
from domains.molecule.sources import Enumerated
from domains.molecule.top_molecules import TopMolecules
from domains.molecule.top_over_calls import TopOverCalls
from domains.text_to_image import metrics as picture_metrics
from domains.text_to_image import rewards as pictures
from domains.text_to_image import set_metrics
from domains.text_to_image.data import ShapesPictures
from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.core.answers import tensors
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.randomness import generators
from lit_rlft.core.reward import (
    Metric,
    Product,
    Reward,
    SetMetric,
    WeightedSum,
    check_parts,
    rewards_of,
    values_of,
)
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.training_metric import TrainingMetric
from lit_rlft.kit.data import SplitData, collate
from lit_rlft.kit.http_reward import HTTPReward

NUM = 4
MIXTURE: dict[str, Any] = {
    "weights": [0.5, 0.5],
    "means": [[0.0, 1.0], [1.0, 0.0]],
    "stds": [0.2] * 2,
}


def one_each(values: list[Any], *_: Any) -> list[float | None]:
    return [None, *(float(i) for i in range(1, len(values)))]


def molecules_source() -> Enumerated:
    return Enumerated(max_heavy=3, num_attempts=500)


def small_shapes(path: Path) -> Path:
    """Write pictures to compare with."""
    from PIL import Image

    for i in range(3):
        Image.new("RGB", (64, 64), (80 * i, 40, 10)).save(path / f"{i}.png")
    return path


def mixture_parts(path: Path) -> list[Metric]:
    return [
        mixture.Coordinate(),
        mixture.Quadratic(),
        mixture.ComponentIndicator((1,), MIXTURE["means"]),
        mixture_metrics.MMD(**MIXTURE),
    ]


def image_parts(path: Path) -> list[Metric]:
    return [
        image.Brightness(),
        image.Brightness(0.5),
        image.ClassProbability("3"),
        image.ClassProbability("3", output="probability"),
        image_metrics.SetDistances(max_images=32, num_draws=2),
        image_metrics.Diversity(),
    ]


def layout_parts(path: Path) -> list[Metric]:
    plain = [layout.Alignment(), layout.Coverage(), layout.InsidePage(), layout.MinimumSize()]
    relations = [("text", "above", "title"), ("text", "larger than", "title")]
    return [
        *plain,
        layout.Overlap(),
        layout.Overlap(["figure"]),
        layout.Count(),
        layout.GapRegularity(),
        layout.Relations(relations),
        layout.ClassCounts({"text": 2, "figure": 1}),
        layout.GrammarRules(),
        layout.FunctionReward(one_each),
        layout.Critic(),
        layout.Critic(output="probability"),
        layout_metrics.LayoutMeasures(),
        layout_metrics.LayoutMeasures(compat=True, ignored=["figure"]),
        layout_metrics.SetDistances(max_layouts=32, num_draws=2),
        layout_metrics.Diversity(),
    ]


def molecule_parts(path: Path) -> list[Metric]:
    (path / "known.smi").write_text("C\nCC\n")
    source = molecules_source()
    return [
        molecule.Stability(),
        molecule.Stability(graded=True, power=4),
        molecule.ValidConnected(),
        molecule.QED(),
        molecule.LogP(1.0),
        molecule.SyntheticAccessibility(),
        molecule.TPSA(20.0),
        molecule.RingCount(1),
        molecule.AtomCount("O", 1),
        molecule.Substructures(["[OX2H]"], ["F"]),
        molecule.Strain(),
        molecule.Novelty(str(path / "known.smi")),
        molecule.FunctionReward(one_each),
        molecule.SoftValence(),
        molecule.SoftConnected(),
        molecule_metrics.MoleculeMeasures(),
        molecule_metrics.Drugs(),
        molecule_metrics.Novelty(source),
        molecule_metrics.SetDistances(source, max_molecules=32, num_draws=2),
        TopMolecules(molecule.QED()),
        TopOverCalls(),
    ]


def picture_parts(path: Path) -> list[Metric]:
    folder = str(small_shapes(path))
    return [
        pictures.Brightness(),
        pictures.Colourfulness(),
        pictures.Symmetry(),
        pictures.JPEGCompressibility(),
        pictures.JPEGIncompressibility(),
        pictures.SmoothJPEGCompressibility(),
        pictures.CLIPScore(),
        pictures.ShapesEval(),
        pictures.ShapesClassifier(),
        pictures.FunctionReward(one_each),
        picture_metrics.Diversity(),
        set_metrics.CMMD(folder, "shapes_clip"),
        set_metrics.Copies(folder, "shapes_clip"),
        set_metrics.Duplicates("shapes_clip"),
    ]


Parts = Callable[[Path], list[Metric]]
Domain = tuple[Callable[[], Pipeline], Callable[[], SplitData], Parts]
molecule_data = partial(MoleculeData, num_val=2, num_test=2)
layout_data = partial(LayoutData, num_val=2, num_test=2)
DOMAINS: dict[str, Domain] = {
    "gaussian_mixture": (
        lambda: GaussianMixturePipeline(**MIXTURE),
        lambda: MixtureData(**MIXTURE, num_train=8, num_val=2, num_test=2),
        mixture_parts,
    ),
    "digits": (lambda: ImagePipeline("digits"), lambda: ImageData(num_val=2), image_parts),
    "shapes": (
        lambda: TextToImagePipeline("shapes", guidance_scale=3.0),
        lambda: ShapesPictures(8),
        picture_parts,
    ),
}
DOMAINS |= {
    f"layout {name}": (
        partial(LayoutPipeline, name),
        lambda: layout_data(Grammar(32)),
        layout_parts,
    )
    for name in ("grammar", "grammar_mixed", "grammar_gibbs")
}
DOMAINS |= {
    f"molecule {name}": (
        partial(MoleculePipeline, name),
        lambda: molecule_data(molecules_source()),
        molecule_parts,
    )
    for name in ("small", "small_mixed")
}
CONTINUOUS = [name for name in DOMAINS if not name.endswith(("_mixed", "_gibbs"))]


def batch_of(data: SplitData) -> dict[str, Any]:
    data.prepare_data()
    data.setup("fit")
    rows = data.rows("train")
    return collate([rows[i] for i in range(NUM)])


def measured(part: Metric, samples: Any, condition: Condition) -> dict[str, Any]:
    """Return all that a reward or a metric says of samples."""
    found: dict[str, Any] = dict(values_of(part, samples, condition))
    if isinstance(part, Reward):
        found["reward"] = rewards_of(part, samples, condition, may_fail=True)
    if isinstance(part, SetMetric):
        features = part.features(samples, condition)
        found |= features | part.compare({name: one.cpu() for name, one in features.items()})
    if isinstance(part, TrainingMetric):
        part.add(part.features(samples, condition, torch.arange(float(NUM))))
        found |= part.values()
    return {
        name: one.cpu() if isinstance(one, torch.Tensor) else one for name, one in found.items()
    }


def drawn(pipeline: Pipeline, condition: Condition) -> Any:
    """Return samples of two steps."""
    noise = generators(range(len(condition)))
    with torch.no_grad():
        x_1 = pipeline.process.prior(pipeline.blank(condition)).sample(noise)
        x_0 = Sampler(2, 0.5).sample(pipeline, pipeline.process, x_1, condition, noise)
        return pipeline.decode(x_0, condition)


@pytest.mark.parametrize("domain", DOMAINS)
def test_samples_are_measured_where_they_are(
    domain: str, tmp_path: Path, second: torch.device
) -> None:
    make, data, parts_of = DOMAINS[domain]
    batch = batch_of(data())
    pipeline, parts = make(), parts_of(tmp_path)
    for part in parts:
        check_parts(part, pipeline)
    condition = pipeline.encode(batch)
    real = pipeline.decode(pipeline.states(batch), condition)
    wanted = [measured(part, real, condition) for part in parts]

    pipeline.to(second)
    batch = move_data_to_device(batch, second)
    condition = pipeline.encode(batch)
    assert pipeline.features(condition).device == pipeline.tokens(condition).device == second
    made = drawn(pipeline, condition.repeat(2).index(slice(1, 1 + NUM)))
    decoded = pipeline.decode(pipeline.states(batch), condition)
    assert {one.device for one in (*tensors(made), *tensors(decoded))} == {second}
    for samples in (made, decoded):
        pipeline.render(samples, condition)
        pipeline.keys(samples, condition)
        pipeline.save_samples(samples, condition, tmp_path, [str(i) for i in range(NUM)])
    for part, numbers in zip(parts, wanted, strict=True):
        measured(part.to(second), made, condition)
        found = measured(part, real.to(second), condition)
        # Attention has other programs there.
        torch.testing.assert_close(found, numbers, rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("domain", CONTINUOUS)
def test_rewards_are_followed_there(domain: str, tmp_path: Path, second: torch.device) -> None:
    make, data, parts_of = DOMAINS[domain]
    pipeline, batch = make().to(second), move_data_to_device(batch_of(data()), second)
    parts = [part for part in parts_of(tmp_path) if isinstance(part, Reward)]
    smooth = [part.to(second) for part in parts if part.differentiable]
    x_0, condition = pipeline.states(batch), pipeline.encode(batch)
    assert smooth and isinstance(x_0, torch.Tensor)
    for part in smooth:
        x = x_0.detach().clone().requires_grad_()
        rewards_of(part, pipeline.decode(x, condition), condition).sum().backward()
        assert x.grad is not None and x.grad.device == second


@pytest.mark.parametrize("kind", [WeightedSum, partial(WeightedSum, normalize=True), Product])
def test_rewards_of_both_devices_are_combined(
    kind: Callable[..., Reward], second: torch.device
) -> None:
    samples = torch.rand(NUM, 3, 16, 16, device=second)
    condition = Condition([{"prompt": "x"}], {}, torch.zeros(NUM, dtype=torch.int64, device=second))
    parts = {"one": pictures.Brightness(), "other": pictures.FunctionReward(one_each)}
    reward = kind(parts).to(second)
    assert rewards_of(reward, samples, condition, may_fail=True).device == second
    values_of(reward, samples, condition)


class _Answer(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["samples"]
        content = json.dumps({"rewards": [1.0 for _ in asked]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_server_is_sent_samples(domain: str, second: torch.device) -> None:
    make, data, _ = DOMAINS[domain]
    pipeline, batch = make().to(second), move_data_to_device(batch_of(data()), second)
    condition = pipeline.encode(batch)
    samples = pipeline.decode(pipeline.states(batch), condition)
    server = HTTPServer(("127.0.0.1", 0), _Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        reward = HTTPReward(f"http://127.0.0.1:{server.server_port}", batch_size=3)
        reward.check(pipeline)
        assert rewards_of(reward, samples, condition).tolist() == [1.0] * NUM
    finally:
        server.shutdown()
        server.server_close()
