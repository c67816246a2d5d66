"""What ships with the domain does what its README says."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from domains.image.metrics import SetDistances
from domains.image.networks.features import EMBEDDED, load_features
from domains.image.pipeline import ImagePipeline
from domains.image.sources import Digits, Generated, Source
from domains.text_to_image.shapes.pictures import labels_of, paint, scene
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Sampler


def test_the_readme_names_every_asset() -> None:
    text = (EMBEDDED / "README.md").read_text()
    folders = {path.name for path in EMBEDDED.iterdir() if path.is_dir()}
    rows = re.findall(r"^\| `(\w+)` \| (?:`(?:FeatureNetwork|UNet2DModel)`|the same)", text, re.M)
    assert folders == set(rows)
    assert sum(p.stat().st_size for p in EMBEDDED.rglob("*") if p.is_file()) < 4e6


@pytest.mark.parametrize(("name", "share"), [("shapes_features", 0.9), ("shapes_classifier", 0.88)])
@torch.no_grad()
def test_networks_recognise_new_shapes(name: str, share: float) -> None:
    network = load_features(name)
    pixels = np.stack([paint(5, i, 32) for i in range(200)])
    known = torch.from_numpy(np.stack([labels_of(scene(5, i)) for i in range(200)]))
    pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    assert ((network.logits(network(pictures)) > 0) == known).double().mean() > share


@pytest.mark.parametrize(
    ("model", "source"), [("digits", Digits()), ("shapes", Generated(paint, 500, 32, seed=3))]
)
@torch.no_grad()
def test_models_come_nearer_to_the_data_with_more_steps(model: str, source: Source) -> None:
    pipeline, metric = ImagePipeline(model).eval(), SetDistances(source, f"{model}_features")
    condition = pipeline.encode({"index": range(48)})
    x_1 = pipeline.process.prior(pipeline.blank(condition)).sample(generators(range(48)))

    def fid(num_steps: int) -> float:
        x_0 = Sampler(num_steps).sample(pipeline, pipeline.process, x_1, condition)
        pictures: Tensor = pipeline.decode(x_0, condition)
        return metric.compare(metric.features(pictures, condition))[f"fid_{model}_features"]

    assert fid(10) < 0.6 * fid(2)
