"""Feature networks: the small ones, and InceptionV3's shape, file format and resizing."""

from pathlib import Path

import pytest
import torch
from torch import nn

from domains.image.networks.features import (
    FeatureArchitecture,
    FeatureNetwork,
    features_of,
    load_features,
    luminance,
)
from domains.image.networks.inception import InceptionV3, resize_like_tensorflow_1
from lit_rlft.core.checks import UsageError


@pytest.fixture
def network() -> FeatureNetwork:
    torch.manual_seed(0)
    return FeatureNetwork(FeatureArchitecture(8, 1, ["a", "b", "c"])).eval()


def test_networks_survive_saving(network: FeatureNetwork, tmp_path: Path) -> None:
    network.save(tmp_path / "net")
    pictures = torch.rand(3, 3, 8, 8)
    loaded = load_features(str(tmp_path / "net"))
    assert isinstance(loaded, FeatureNetwork) and loaded.architecture.classes == ["a", "b", "c"]
    halved = network.half().float()
    torch.testing.assert_close(loaded(pictures), halved(pictures), rtol=0, atol=0)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_no_two_networks_share_a_name(network: FeatureNetwork, tmp_path: Path) -> None:
    names = {load_features("digits_features").name, load_features("digits_classifier").name}
    assert names == {"digits_features", "digits_classifier"}
    for i in range(2):
        network.out.bias.data += i
        network.save(tmp_path / str(i) / "net")
        names.add(load_features(str(tmp_path / str(i) / "net")).name)
    assert len(names) == 4 and sum(name.startswith("net-") for name in names) == 2


def test_pictures_of_other_sizes_and_colours_are_brought_to_its_own(
    network: FeatureNetwork,
) -> None:
    pictures = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(network(pictures), network(luminance(pictures)))
    large = pictures.repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert network(large).shape == (2, 64)
    uniform = torch.full((1, 3, 20, 20), 0.3)
    torch.testing.assert_close(network(uniform), network(uniform[..., :8, :8]))


def test_probabilities(network: FeatureNetwork) -> None:
    features = network(torch.rand(4, 1, 8, 8))
    logits = network.logits(features)
    torch.testing.assert_close(network.log_probabilities(features).exp(), logits.softmax(1))
    several = FeatureNetwork(FeatureArchitecture(8, 1, ["a", "b"], exclusive=False))
    features = several(torch.rand(4, 1, 8, 8))
    own = several.log_probabilities(features).exp()
    torch.testing.assert_close(own, several.logits(features).sigmoid())


def test_features_do_not_depend_on_the_batches(network: FeatureNetwork) -> None:
    pixels = torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8)
    whole = features_of(network, pixels)
    torch.testing.assert_close(features_of(network, pixels, batch_size=3), whole)
    torch.testing.assert_close(features_of(network, pixels / 255), whole)


def test_resizing_by_hand() -> None:
    # 2 to 4: places 0, 0.5, 1 and 1.5, the last beyond the edge.
    image = torch.tensor([[[[0.0, 8.0], [16.0, 24.0]]]])
    row = torch.tensor([0.0, 4.0, 8.0, 8.0])
    down = torch.tensor([0.0, 8.0, 16.0, 16.0])
    expected = down[:, None] + row[None, :]
    torch.testing.assert_close(resize_like_tensorflow_1(image, 4)[0, 0], expected)
    # 4 to 2: every other pixel, nothing is smoothed.
    image = torch.rand(1, 3, 4, 4)
    torch.testing.assert_close(resize_like_tensorflow_1(image, 2), image[..., ::2, ::2])


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file in torch-fidelity's format with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = InceptionV3()
    state = network.state_dict()
    for name, value in state.items():
        if name.endswith("bn.running_var"):
            value.fill_(0.05)  # so that the signal does not fade
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return path


def test_inception_has_the_published_size_and_names(inception_file: Path) -> None:
    state = torch.load(inception_file, weights_only=True)
    trunk = {n: v for n, v in state.items() if not n.startswith("fc.")}
    weights = sum(v.numel() for n, v in trunk.items() if n.endswith("conv.weight"))
    scales = sum(v.numel() for n, v in trunk.items() if n.endswith("bn.weight"))
    # 21,802,784 in Keras' count without the classifier, which has three numbers per normalised
    # channel instead of four; of those 34,432 are running statistics.
    assert weights + 3 * scales == 21_802_784 and 2 * scales == 34_432
    assert sum(n.endswith("conv.weight") for n in trunk) == 94
    assert state["fc.weight"].shape == (1008, 2048)
    # Some names as torch-fidelity has them, with their sizes.
    for name, shape in {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6e.branch7x7dbl_4.conv.weight": (192, 192, 7, 1),
        "Mixed_7a.branch7x7x3_4.bn.running_mean": (192,),
        "Mixed_7b.branch3x3dbl_3a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch_pool.conv.weight": (192, 2048, 1, 1),
    }.items():
        assert tuple(state[name].shape) == shape


def test_inception_loads_from_a_file_and_looks(inception_file: Path) -> None:
    network = load_features(str(inception_file))
    assert isinstance(network, InceptionV3) and network.name.startswith("inception-")
    seen: dict[str, tuple[int, ...]] = {}
    for name in ("Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c"):
        network.get_submodule(name).register_forward_hook(
            lambda module, _, out, name=name: seen.update({name: tuple(out.shape[1:])})
        )
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    features = features_of(network, pixels)
    assert features.shape == (2, 2048) and features.isfinite().all()
    assert (features[0] - features[1]).abs().max() > 1e-4
    # Of the paper's table 1, at 299 x 299.
    assert seen == {
        "Conv2d_4a_3x3": (192, 71, 71),
        "Mixed_5d": (288, 35, 35),
        "Mixed_6e": (768, 17, 17),
        "Mixed_7c": (2048, 8, 8),
    }


def test_pooling_leaves_padding_out() -> None:
    # With identity branches a constant picture stays constant up to its border.
    network = InceptionV3()
    block = network.Mixed_7b
    nn.init.zeros_(block.branch_pool.conv.weight)
    block.branch_pool.conv.weight.data[0, 0] = 1
    out = block.eval()(torch.full((1, 1280, 8, 8), 2.0))[:, -192]
    torch.testing.assert_close(out, torch.full_like(out, 2 / (1 + 0.001) ** 0.5))


def test_files_that_are_no_networks(tmp_path: Path, network: FeatureNetwork) -> None:
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save([1], tmp_path / "list.pth")
    network.save(tmp_path / "net")
    (tmp_path / "net/config.json").write_text("{}")
    for path in ("text.pth", "other.pth", "list.pth", "net", "none"):
        with pytest.raises(UsageError, match="could not be loaded as a feature network"):
            load_features(str(tmp_path / path))
