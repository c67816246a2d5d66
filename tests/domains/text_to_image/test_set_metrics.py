"""CMMD, duplicates and copies against formulas written out, on real files."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from domains.text_to_image.networks.clip import CLIPEncoder
from domains.text_to_image.pipeline import TextToImagePipeline
from domains.text_to_image.set_metrics import CMMD, Copies, Duplicates
from lit_rlft.core.checks import BadArgument, UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.kit.images import save_pictures
from tests.domains.text_to_image.test_metrics import condition


@pytest.fixture(scope="module")
def encoder() -> CLIPEncoder:
    return CLIPEncoder("shapes_clip")


@pytest.fixture(scope="module")
def known() -> Tensor:
    """Pictures of blocks of colour, in bytes."""
    blocks = torch.rand(12, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return (blocks.repeat_interleave(16, 2).repeat_interleave(16, 3) * 255).round() / 255


@pytest.fixture(scope="module")
def folder(known: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("known")
    save_pictures(known, made, [f"{i:02}" for i in range(len(known))])
    (made / "broken.png").write_bytes(b"no picture")
    return made


def prompts(*texts: str) -> Condition:
    rows = torch.arange(len(texts))
    return Condition(entries=[{"prompt": text} for text in texts], tables={}, rows=rows)


def biased(x: Tensor, y: Tensor) -> float:
    """The estimate of the paper's program: pairs of a picture with itself are among the means."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-(a[:, None] - b[None]).square().sum(dim=2) / (2 * 10**2)).mean()

    x, y = x.double(), y.double()
    return float(1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)))


def test_cmmd_is_the_papers_but_for_its_bias(
    encoder: CLIPEncoder, known: Tensor, folder: Path
) -> None:
    pictures = torch.rand(9, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    metric = CMMD(str(folder), "shapes_clip")
    features = metric.features(pictures, prompts(*"abcdefghi"))
    found = metric.compare(features)["cmmd"]
    x, y = encoder.embed_pictures(known), encoder.embed_pictures(pictures)
    # A picture's kernel with itself is 1; each mean over n^2 pairs has n of these.
    bias = 0.0
    for points in (x.double(), y.double()):
        kernel = torch.exp(-torch.cdist(points, points).square() / 200)
        num = len(points)
        others = (kernel.sum() - num) / (num * (num - 1))
        bias += float(1000 * (1 - others) / num)
    assert found == pytest.approx(biased(x, y) - bias, rel=1e-4, abs=1e-4)
    assert found > 0.1


def test_cmmd_left_out_is_cmmd_of_the_rest(folder: Path) -> None:
    pictures = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    metric = CMMD(str(folder), "shapes_clip")
    features = metric.features(pictures, prompts(*"abcdef"))
    left = metric.left_out(features, torch.tensor([[0, 3]]))["cmmd"]
    rest = {"embeddings": features["embeddings"][1:]}
    assert float(left.each[0]) == pytest.approx(metric.compare(rest)["cmmd"], abs=1e-6)
    rest = {"embeddings": features["embeddings"][[1, 2, 4, 5]]}
    assert float(left.both[0]) == pytest.approx(metric.compare(rest)["cmmd"], abs=1e-6)


def test_copies_are_found(known: Tensor, folder: Path) -> None:
    others = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    pictures = torch.cat([known[:2], others])
    values = Copies(str(folder), "shapes_clip", threshold=0.999).evaluate(
        pictures, prompts(*"abcd")
    )
    assert values["copied"].tolist() == [1, 1, 0, 0]
    assert values["nearest"][:2].allclose(torch.ones(2), atol=1e-4)
    assert (values["nearest"][2:] < 0.999).all()


def test_duplicates_are_those_of_other_prompts(known: Tensor) -> None:
    metric = Duplicates("shapes_clip", threshold=0.999)
    pictures = known[[0, 0, 1, 0, 2, 3]]
    features = metric.features(pictures, condition([0, 0, 0, 1, 1, 2]))
    # The first two and the fourth are one picture; the fourth has another prompt.
    assert metric.compare(features) == {"duplicates": 0.5}
    apart = {name: value[[0, 1, 2]] for name, value in features.items()}
    assert metric.compare(apart)["duplicates"] != metric.compare(apart)["duplicates"]  # NaN


@pytest.mark.parametrize("kind", [CMMD, Copies])
def test_a_folder_without_pictures_is_refused_before_the_run(
    kind: type[CMMD | Copies], tmp_path: Path
) -> None:
    pipeline = TextToImagePipeline()
    with pytest.raises(UsageError, match="has no picture files"):
        kind(str(tmp_path), "shapes_clip").check(pipeline)
    with pytest.raises(UsageError, match="no folder"):
        kind(str(tmp_path / "absent"), "shapes_clip").check(pipeline)


def test_a_threshold_is_a_cosine(tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="threshold"):
        Duplicates("shapes_clip", threshold=1.5)
