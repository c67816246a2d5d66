"""Networks: symmetries in double precision, empty slots, sizes, files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from domains.molecule.networks import (
    EGNN,
    Architecture,
    MoleculeNetwork,
    Transformer,
    load_network,
)
from domains.molecule.networks.edm import EDM
from domains.molecule.pipeline import MoleculePipeline
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.network_folder import save_network

NETWORKS: dict[str, type[MoleculeNetwork]] = {"egnn": EGNN, "edm": EDM, "transformer": Transformer}
CASES = [("egnn", "continuous"), ("egnn", "mixed"), ("edm", "continuous")]
SIZES = torch.tensor([7, 1, 4])
FULL = torch.arange(7) < SIZES.unsqueeze(1)


def network_of(kind: str, state: str = "continuous", **sizes: Any) -> MoleculeNetwork:
    """A network with weights that leave no part of it without effect."""
    torch.manual_seed(0)
    settings = {"width": 16, "depth": 2, "num_heads": 2, **sizes}
    network = NETWORKS[kind](Architecture(network=kind, state=state, **settings))  # type: ignore[arg-type]
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network.double()


def inputs(state: str = "continuous") -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    positions = 1.5 * torch.randn(3, 7, 3, dtype=torch.float64)
    features = torch.randn(3, 7, 5, dtype=torch.float64)
    if state == "mixed":
        features = torch.randint(0, 6, (3, 7))
    return positions, features, torch.tensor([0.1, 0.6, 1.0], dtype=torch.float64)


def rotation(mirrored: bool = False) -> Tensor:
    torch.manual_seed(2)
    matrix = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    sign = torch.sign(torch.linalg.det(matrix)) * (-1 if mirrored else 1)
    return matrix * sign


def assert_same(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one[FULL], other[FULL], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kind", "state"), CASES)
@pytest.mark.parametrize("mirrored", [False, True])
def test_rotating_and_moving_the_input_rotates_the_output(
    kind: str, state: str, mirrored: bool
) -> None:
    network, (positions, features, t) = network_of(kind, state), inputs(state)
    matrix = rotation(mirrored)
    shift = torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64)
    moves, scores = network(positions, features, t, FULL)
    assert moves[FULL].abs().mean() > 1e-3 and scores[FULL].std() > 1e-3
    turned = network(positions @ matrix + shift, features, t, FULL)
    assert_same(turned, (moves @ matrix, scores))


@pytest.mark.parametrize(("kind", "state"), [*CASES, ("transformer", "continuous")])
def test_permuting_atoms_permutes_the_output(kind: str, state: str) -> None:
    network, (positions, features, t) = network_of(kind, state), inputs(state)
    order = torch.randperm(7)
    moves, scores = network(positions, features, t)
    shuffled = network(positions[:, order], features[:, order], t)
    for found, wanted in zip(shuffled, (moves[:, order], scores[:, order]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kind", "state"), [*CASES, ("transformer", "mixed")])
def test_empty_slots_have_no_influence(kind: str, state: str) -> None:
    network, (positions, features, t) = network_of(kind, state), inputs(state)
    found = network(positions, features, t, FULL)
    junk = (~FULL).unsqueeze(-1)
    other = features.where(FULL, 6) if state == "mixed" else features + 5 * junk
    assert_same(network(positions + 9 * junk, other, t, FULL), found)
    for row, size in enumerate(SIZES.tolist()):
        rows, atoms = slice(row, row + 1), slice(size)
        alone = network(positions[rows, atoms], features[rows, atoms], t[rows])
        for part, whole in zip(alone, found, strict=True):
            # Times are embedded in float32.
            torch.testing.assert_close(part, whole[rows, atoms], rtol=1e-5, atol=1e-5)
    moves = found[0].where(FULL.unsqueeze(-1), 0)
    assert moves.sum(dim=1).abs().max() < 1e-12


def test_positions_have_gradients_where_atoms_meet() -> None:
    network, (positions, features, t) = network_of("egnn"), inputs()
    positions[:, 1] = positions[:, 0]
    positions.requires_grad_()
    moves, scores = network(positions, features, t)
    (moves.square().sum() + scores.square().sum()).backward()
    assert positions.grad is not None and positions.grad.isfinite().all()


@pytest.mark.parametrize("state", ["continuous", "mixed"])
def test_new_networks_predict_nothing(state: str) -> None:
    for kind in ("egnn", "transformer"):
        network = NETWORKS[kind](Architecture(state=state))  # type: ignore[arg-type]
        positions, features, t = inputs(state)
        moves, scores = network(positions, features, t)
        assert not moves.any() and not scores.any()


def test_the_default_has_the_documented_size() -> None:
    assert sum(p.numel() for p in EGNN(Architecture()).parameters()) == pytest.approx(
        0.15e6, rel=0.05
    )


@pytest.mark.parametrize("kind", NETWORKS)
def test_weights_are_loaded_as_they_were_saved(kind: str, tmp_path: Path) -> None:
    network = network_of(kind, num_sublayers=2, charge_scale=0.1).float()
    save_network(network, tmp_path, torch.float32)
    loaded = load_network(tmp_path, NETWORKS)
    assert loaded.architecture == network.architecture and type(loaded) is type(network)
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_architectures_that_cannot_be() -> None:
    for settings, message in [
        ({"network": "transformer", "width": 30, "num_heads": 4}, "multiple of num_heads"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"type_scale": 0.0}, "type_scale must be positive"),
        ({"state": "discrete"}, "use 'continuous', 'mixed' or 'gibbs'"),
        ({"noise": "linear"}, "use 'flow' or 'polynomial'"),
        ({"noise": "polynomial", "knots": [(0.1, 0.4)]}, "knots are the times of a flow's sampler"),
        ({"state": "gibbs", "knots": [(0.1, 0.4)]}, "knots are the times of a flow's sampler"),
        ({"network": "edm", "state": "mixed"}, "edm has continuous states"),
        ({"elements": ("H", "Xx")}, "elements must be some of"),
        ({"elements": ("C", "N")}, r"elements is \['C', 'N'\], but implicit_hydrogens false"),
        ({"elements": ("H", "C"), "implicit_hydrogens": True}, "implicit_hydrogens true"),
    ]:
        with pytest.raises(UsageError, match=message):
            Architecture(**settings)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="exclude each other"):
        MoleculePipeline("small", architecture=Architecture())


def test_models_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"colour": 3}')
    for pretrained in ("missing", str(tmp_path)):
        with pytest.raises(UsageError, match="could not be loaded as a molecule model"):
            MoleculePipeline(pretrained)
