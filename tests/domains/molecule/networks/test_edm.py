"""Checkpoints in EDM's published format against the published formulas, one pair at a time."""

import argparse
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from domains.molecule.networks import Architecture
from domains.molecule.pipeline import MoleculePipeline
from lit_rlft.core.checks import UsageError
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.schedule import PolynomialVP
from tests.support import assert_close_in_rounding

Write = Callable[..., Path]
SETTINGS: dict[str, Any] = {
    "nf": 8,
    "n_layers": 2,
    "inv_sublayers": 1,
    "attention": True,
    "tanh": True,
    "norm_constant": 1,
    "sin_embedding": False,
    "normalization_factor": 1,
    "aggregation_method": "sum",
    "include_charges": True,
    "normalize_factors": [1, 4, 10],
    "condition_time": True,
    "context_node_nf": 0,
    "model": "egnn_dynamics",
    "probabilistic_model": "diffusion",
    "diffusion_noise_schedule": "polynomial_2",
    "diffusion_noise_precision": 1e-5,
    "diffusion_steps": 1000,
    "ema_decay": 0.9999,
    "remove_h": False,
    "dataset": "qm9",
    "device": torch.device("cpu"),
}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"inv_sublayers": 2, "tanh": False, "attention": False, "normalization_factor": 3},
    {"sin_embedding": True, "norm_constant": 0, "n_layers": 1},
    {"remove_h": True, "include_charges": False},
]


def edm_state_dict(args: dict[str, Any]) -> "OrderedDict[str, Tensor]":
    """Draw weights under the names and in the shapes that EDM saves."""
    torch.manual_seed(0)
    width = args["nf"]
    nodes = (4 if args["remove_h"] else 5) + args["include_charges"] + 1
    edges = 2 * width + (24 if args["sin_embedding"] else 2)
    state: OrderedDict[str, Tensor] = OrderedDict(buffer=torch.zeros(1))
    t = torch.arange(1001, dtype=torch.float64) / 1000
    alpha2 = (1 - 2e-5) * ((1 - t**2) ** 2) + 1e-5
    state["gamma.gamma"] = -(alpha2.log() - (1 - alpha2).log()).float()

    def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        state[f"dynamics.egnn.{name}.weight"] = torch.randn(outputs, inputs) / inputs**0.5
        if bias:
            state[f"dynamics.egnn.{name}.bias"] = 0.3 * torch.randn(outputs)

    linear("embedding", nodes, width)
    linear("embedding_out", width, nodes)
    for i in range(args["n_layers"]):
        for j in range(args["inv_sublayers"]):
            block = f"e_block_{i}.gcl_{j}"
            linear(f"{block}.edge_mlp.0", edges, width)
            linear(f"{block}.edge_mlp.2", width, width)
            linear(f"{block}.node_mlp.0", 2 * width, width)
            linear(f"{block}.node_mlp.2", width, width)
            if args["attention"]:
                linear(f"{block}.att_mlp.0", width, 1)
        block = f"e_block_{i}.gcl_equiv.coord_mlp"
        linear(f"{block}.0", edges, width)
        linear(f"{block}.2", width, width)
        linear(f"{block}.4", width, 1, bias=False)
    return state


@pytest.fixture
def write_edm(tmp_path: Path) -> Write:
    """Return a function that writes a checkpoint as EDM's training does; settings override."""

    def write(**changes: Any) -> Path:
        args = {**SETTINGS, **changes}
        with (tmp_path / "args.pickle").open("wb") as file:
            pickle.dump(argparse.Namespace(**args), file)
        torch.save(edm_state_dict(args), tmp_path / "generative_model_ema.npy")
        return tmp_path

    return write


def slow_dynamics(
    state: dict[str, Tensor], args: dict[str, Any], x: Tensor, h: Tensor, t: float
) -> tuple[Tensor, Tensor]:
    """The noise that EDM's dynamics predict for one molecule, x [n, 3] and h [n, C]."""

    def linear(name: str, value: Tensor) -> Tensor:
        weight = state[f"dynamics.egnn.{name}.weight"].double()
        bias = state.get(f"dynamics.egnn.{name}.bias")
        return weight @ value + (0 if bias is None else bias.double())

    def mlp(name: str, value: Tensor, *layers: int) -> Tensor:
        for layer in layers:
            value = silu(linear(f"{name}.{layer}", value))
        return value

    def shown(square: Tensor) -> Tensor:
        if not args["sin_embedding"]:
            return square.reshape(1)
        distance = (square + 1e-8).sqrt()
        angles = [distance * 2 * math.pi * 4.0**k / 15 for k in range(6)]
        return torch.stack([torch.sin(a) for a in angles] + [torch.cos(a) for a in angles])

    def pair(i: int, j: int, at: Tensor) -> Tensor:
        now, before = ((p[i] - p[j]).square().sum() for p in (at, start))
        return torch.cat([hidden[i], hidden[j], shown(now), shown(before)])

    start, atoms = x.clone(), range(len(x))
    hidden = [linear("embedding", torch.cat([row, row.new_tensor([t])])) for row in h]
    for i_block in range(args["n_layers"]):
        block = f"e_block_{i_block}"
        for j_layer in range(args["inv_sublayers"]):
            name, updated = f"{block}.gcl_{j_layer}", []
            for i in atoms:
                total = torch.zeros(args["nf"], dtype=torch.float64)
                for j in atoms:
                    if i == j:
                        continue
                    message = mlp(f"{name}.edge_mlp", pair(i, j, x), 0, 2)
                    if args["attention"]:
                        message = message * torch.sigmoid(linear(f"{name}.att_mlp.0", message))
                    total = total + message / args["normalization_factor"]
                inner = mlp(f"{name}.node_mlp", torch.cat([hidden[i], total]), 0)
                updated.append(hidden[i] + linear(f"{name}.node_mlp.2", inner))
            hidden = updated
        moved = []
        for i in atoms:
            total = torch.zeros(3, dtype=torch.float64)
            for j in atoms:
                if i == j:
                    continue
                name = f"{block}.gcl_equiv.coord_mlp"
                move = linear(f"{name}.4", mlp(name, pair(i, j, x), 0, 2))
                move = 15 * move.tanh() if args["tanh"] else move
                length = ((x[i] - x[j]).square().sum() + 1e-8).sqrt() + args["norm_constant"]
                total = total + (x[i] - x[j]) / length * move / args["normalization_factor"]
            moved.append(x[i] + total)
        x = torch.stack(moved)
    velocity = x - start
    out = torch.stack([linear("embedding_out", row) for row in hidden])
    return velocity - velocity.mean(dim=0), out[:, :-1]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda c: "-".join(c) or "published")
def test_loaded_models_predict_what_the_published_formulas_say(
    changes: dict[str, Any], write_edm: Write
) -> None:
    folder = write_edm(**changes)
    args = {**SETTINGS, **changes}
    state = edm_state_dict(args)
    pipeline = MoleculePipeline(str(folder)).double()
    sizes = [1, 3, 5]
    condition = pipeline.encode({"num_atoms": torch.tensor(sizes)})
    torch.manual_seed(1)
    x_t = pipeline.process.prior(pipeline.blank(condition)).sample()
    assert isinstance(x_t, Tensor) and x_t.dtype == torch.float64
    times = [0.05, 0.4, 1.0]
    with torch.no_grad():
        prediction = pipeline.predict(x_t, torch.tensor(times, dtype=torch.float64), condition)
    assert isinstance(prediction, Tensor)
    for row, (size, t) in enumerate(zip(sizes, times, strict=True)):
        atoms = x_t[row, :size]
        noise, features = slow_dynamics(state, args, atoms[:, :3], atoms[:, 3:], t)
        torch.testing.assert_close(prediction[row, :size, :3], noise, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(prediction[row, :size, 3:], features, rtol=1e-9, atol=1e-9)
        assert not prediction[row, size:].any()
    # The same with empty slots in the network's own input.
    slots = max(sizes)
    full = torch.arange(slots) < torch.tensor(sizes).unsqueeze(1)
    moves, scores = pipeline.denoiser(
        x_t[:, :slots, :3], x_t[:, :slots, 3:], torch.tensor(times), full
    )
    torch.testing.assert_close(
        torch.cat([moves, scores], dim=-1), prediction[:, :slots], atol=1e-6, rtol=1e-6
    )


def test_states_are_scaled_as_published(write_edm: Write) -> None:
    pipeline = MoleculePipeline(str(write_edm()))
    assert isinstance(pipeline.process.schedule, PolynomialVP)
    assert pipeline.process.prediction_type == "epsilon" and pipeline.architecture.max_atoms == 29
    batch = {
        "num_atoms": torch.tensor([3]),
        "types": torch.tensor([[3, 0, 0]]),
        "positions": torch.tensor([[[0.0, 0.0, 0.3], [0.9, 0.0, 0.0], [-0.9, 0.0, 0.0]]]),
    }
    x_0 = pipeline.states(batch)
    assert isinstance(x_0, Tensor) and x_0.shape == (1, 29, 9)
    oxygen = [0.0, 0.0, 0.2, 0.0, 0.0, 0.0, 0.25, 0.0, 0.8]
    assert x_0[0, 0].tolist() == pytest.approx(oxygen)
    hydrogen = [0.9, 0.0, -0.1, 0.25, 0.0, 0.0, 0.0, 0.0, 0.1]
    assert x_0[0, 1].tolist() == pytest.approx(hydrogen)
    assert not x_0[0, 3:].any()
    molecule = pipeline.decode(x_0, pipeline.encode(batch))
    assert molecule.types[0].tolist() == [3, 0, 0] + 26 * [-1]


def test_loaded_models_sample_and_are_saved_in_the_own_format(
    write_edm: Write, tmp_path: Path
) -> None:
    pipeline = MoleculePipeline(str(write_edm()))
    pipeline.save(tmp_path / "own")
    loaded = MoleculePipeline(str(tmp_path / "own"))
    assert loaded.architecture == pipeline.architecture
    condition = pipeline.encode({"num_atoms": torch.tensor([4, 2])})
    samples = []
    for each in (pipeline, loaded):
        torch.manual_seed(0)
        x_1 = each.process.prior(each.blank(condition)).sample()
        with torch.no_grad():
            x_0 = Sampler(5, 1.0).sample(each, each.process, x_1, condition)
        samples.append(each.decode(x_0, condition))
    assert_close_in_rounding(samples[0].positions, samples[1].positions)
    assert samples[0].num_atoms.tolist() == [4, 2]


def test_the_published_size() -> None:
    from domains.molecule.networks.edm import EDM

    with torch.device("meta"):
        network = EDM(Architecture(network="edm", width=256, depth=9, charge_scale=0.1))
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(5.34e6, abs=0.01e6)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("touched"),))


def test_bad_checkpoints_are_refused(
    write_edm: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for changes, message in [
        ({"context_node_nf": 1}, r"trained with context_node_nf 1; only models with 0"),
        ({"diffusion_noise_schedule": "cosine"}, "diffusion_noise_schedule 'cosine'"),
        ({"aggregation_method": "mean"}, "aggregation_method 'mean'"),
    ]:
        with pytest.raises(UsageError, match=message):
            MoleculePipeline(str(write_edm(**changes)))
    weights = write_edm() / "generative_model_ema.npy"
    state = edm_state_dict(SETTINGS)
    state["gamma.gamma"] = state["gamma.gamma"] + 1
    torch.save(state, weights)
    with pytest.raises(UsageError, match="other noise levels"):
        MoleculePipeline(str(tmp_path))
    del state["dynamics.egnn.embedding.bias"]
    torch.save(state, weights)
    with pytest.raises(UsageError, match=r"do not fit.*embedding\.bias"):
        MoleculePipeline(str(tmp_path))
    weights.unlink()
    with pytest.raises(UsageError, match=r"neither generative_model_ema\.npy"):
        MoleculePipeline(str(tmp_path))
    for content in (pickle.dumps(Harmful()), b"", b"text", pickle.dumps(3)):
        (tmp_path / "args.pickle").write_bytes(content)
        with pytest.raises(UsageError, match=r"args\.pickle could not be read"):
            MoleculePipeline(str(tmp_path))
    assert not Path("touched").exists()
