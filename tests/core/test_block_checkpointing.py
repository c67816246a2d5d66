"""Blocks that are computed again: the same gradients, with fewer numbers kept for them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Quadratic
from domains.layout.networks.transformer import Architecture as PageSizes
from domains.layout.networks.transformer import LayoutTransformer
from domains.layout.pipeline import LayoutPipeline
from domains.molecule.networks.architecture import Architecture as MoleculeSizes
from domains.molecule.networks.edm import EDM
from domains.molecule.networks.egnn import EGNN
from domains.molecule.networks.transformer import Transformer
from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.algorithms.ddpo import DDPO
from lit_rlft.algorithms.graft import GRAFT, PGRAFT
from lit_rlft.algorithms.inverse_noise_correction import InverseNoiseCorrection
from lit_rlft.algorithms.noise_ppo import NoisePPO
from lit_rlft.algorithms.pretrain import Pretrain
from lit_rlft.algorithms.reward_gradient import RewardGradient
from lit_rlft.core.block_checkpointing import checkpoint_blocks
from lit_rlft.core.checks import UsageError
from lit_rlft.core.corrector import _MLP
from lit_rlft.core.gradient_plan import DRTune
from lit_rlft.core.prior import LowResolution, NoisePolicy
from lit_rlft.core.sampling import Sampler
from lit_rlft.kit.compiled import compile_network
from lit_rlft.loop.reference import LoRA, adapt
from tests.support import trainer_of

Case = tuple[nn.Module, tuple[Any, ...]]
NUM = 3


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


TIMES = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
PAGE = {"width": 16, "depth": 3, "num_heads": 2, "num_slots": 5}


def page(state: str) -> Case:
    network = LayoutTransformer(PageSizes(state=state, **PAGE))  # type: ignore[arg-type]
    num_classes = len(network.architecture.class_names) + 1
    classes = torch.arange(NUM * 5).view(NUM, 5) % num_classes
    x = {"box": normal(NUM, 5, 4), "category": classes}
    whole = normal(NUM, 5, 4 + num_classes)
    return network, (whole if state == "continuous" else x, TIMES, normal(NUM, 5, 3))


def molecule(kind: Callable[[MoleculeSizes], nn.Module], name: str) -> Case:
    sizes: dict[str, Any] = {"width": 16, "depth": 3, "network": name}
    if name == "edm":
        sizes |= {"charge_scale": 0.1, "attention": True, "sin_embedding": True}
    network = kind(MoleculeSizes(**sizes))
    full = torch.arange(4).expand(NUM, 4) < torch.tensor([[4], [3], [2]])
    channels = network.architecture.num_channels  # type: ignore[union-attr]
    return network, (normal(NUM, 4, 3), normal(NUM, 4, channels), TIMES, full)  # type: ignore[arg-type]


def picture() -> Case:
    """Return diffusers' network, with dropout, which has to draw the same again."""
    kinds = {"down_block_types": ["AttnDownBlock2D"] * 2, "up_block_types": ["AttnUpBlock2D"] * 2}
    network = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=4,
        layers_per_block=1, dropout=0.3, **kinds,
    )  # fmt: skip
    return network, (normal(NUM, 3, 8, 8), TIMES)


def mixture() -> Case:
    return GaussianMixturePipeline().denoiser, (normal(NUM, 2), TIMES)


NETWORKS: dict[str, Callable[[], Case]] = {
    "layout": lambda: page("continuous"),
    "mixed layout": lambda: page("mixed"),
    "egnn": lambda: molecule(EGNN, "egnn"),
    "molecule transformer": lambda: molecule(Transformer, "transformer"),
    "edm": lambda: molecule(EDM, "edm"),
    "image": picture,
    "mixture": mixture,
    "corrector": lambda: (_MLP(4, 3, 16, 4), (normal(NUM, 4), TIMES, normal(NUM, 3))),
    "noise policy": lambda: (
        NoisePolicy(3, (2, 8, 8), LowResolution(4), width=16),
        (normal(NUM, 3),),
    ),
    "noise policy with attention": lambda: (
        NoisePolicy(3, (2, 8, 8), LowResolution(4), width=16, heads=2),
        (normal(NUM, 5, 3),),
    ),
}


def made(name: str) -> Case:
    """Return a network in double precision none of whose weights is 0, and inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, inputs = NETWORKS[name]()
        for parameter in network.double().parameters():
            nn.init.normal_(parameter, std=0.2)
    return network.train(), inputs


def values(output: Any) -> list[Tensor]:
    """Return all tensors of an output, a Gaussian's mean and deviation among them."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        return list(output.values())
    if isinstance(output, tuple):
        return list(output)
    return [output.sample] if hasattr(output, "sample_size") else [output.loc, output.std]


def trained(network: nn.Module, inputs: tuple[Any, ...]) -> tuple[list[Tensor | None], int]:
    """Return gradients of all weights and of the first input, and the bytes kept for them."""
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    network.zero_grad()
    torch.manual_seed(1)  # of dropout
    first = inputs[0]
    start = first.clone().requires_grad_() if isinstance(first, Tensor) else first
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        options = {"return_dict": False} if isinstance(network, UNet2DModel) else {}
        parts = values(network(start, *inputs[1:], **options))
        loss = sum(((part.square() * 0.3).sin().sum() for part in parts), torch.zeros(()).double())
    held = sum(kept.values())
    loss.backward()
    own = [start.grad] if isinstance(first, Tensor) else []
    return [loss.detach(), *own, *(p.grad for p in network.parameters())], held


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_the_same_and_less_is_kept(name: str) -> None:
    network, inputs = made(name)
    cheap = copy.deepcopy(network)
    checkpoint_blocks(cheap, "blocks")
    expected, before = trained(network, inputs)
    found, after = trained(cheap, inputs)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert any(bool(g.any()) for g in expected[1:] if g is not None)
    # A policy's maps, which its output is made of, are as large as all the rest.
    assert 0 < after < (0.95 if name.startswith("noise policy") else 0.8) * before
    assert trained(copy.deepcopy(cheap), inputs)[1] == after  # copies compute again too


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_lora_under_autocast_and_a_compiler(compiled: bool) -> None:
    """The adapter's layers lie within the blocks; autocast is the same in the backward pass."""
    gradients = []
    for checkpointed in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pipeline = LayoutPipeline(None, architecture=PageSizes(**PAGE))  # type: ignore[arg-type]
            for parameter in pipeline.denoiser.parameters():
                nn.init.normal_(parameter, std=0.2)
            adapt(pipeline, LoRA(rank=2), seed=0)
            for weight in pipeline.denoiser.parameters():
                if weight.requires_grad:
                    nn.init.normal_(weight, std=0.2)
        checkpoint_blocks(pipeline.denoiser, "blocks" if checkpointed else None)
        if compiled and checkpointed:
            compile_network(pipeline.denoiser, "blocks", backend="eager")
        x = normal(NUM, 5, 4 + len(pipeline.architecture.class_names) + 1).float()
        with torch.autocast("cpu", torch.bfloat16):
            output = pipeline.denoiser(x, TIMES.float(), normal(NUM, 5, 3).float())
        output.float().square().sum().backward()
        weights = [p for p in pipeline.denoiser.parameters() if p.requires_grad]
        gradients.append([p.grad for p in weights])
    if compiled:
        torch._dynamo.reset()
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def tuner(kind: type[RewardFineTuner], how: str | None) -> RewardFineTuner:
    flow = kind is InverseNoiseCorrection
    grid = {"schedule": "rectified_flow", "prediction_type": "velocity"} if flow else {}
    pipeline = GaussianMixturePipeline(residual_width=8, **grid)  # type: ignore[arg-type]
    settings: dict[str, Any] = {"gradient_checkpointing": how, "minibatch_size": 4}
    if kind is Pretrain:
        settings["condition_dropout"] = 0.0
    if kind is RewardGradient:
        settings["method"] = DRTune(k=1, m=1)
    eta = 1.0 if kind is DDPO else 0.0
    return kind(pipeline, Quadratic(), sampler=Sampler(3, eta), optimizer=descent, **settings)


def descent(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


QUICK = (PGRAFT, DDPO, NoisePPO, RewardGradient)
ALGORITHMS = (
    *QUICK,
    *(pytest.param(k, marks=pytest.mark.slow) for k in (GRAFT, Pretrain, InverseNoiseCorrection)),
)


@pytest.mark.parametrize("kind", ALGORITHMS, ids=lambda kind: kind.__name__)
def test_every_algorithm_trains_the_same(kind: type[RewardFineTuner], tmp_path: Any) -> None:
    ends = []
    for how in (None, "blocks"):
        module = tuner(kind, how)
        data = MixtureData(num_train=8, num_val=2, num_test=2, batch_size=8)
        root = tmp_path / str(how)
        trainer_of(default_root_dir=root, precision="64-true").fit(module, data)
        assert module.num_updates > 0
        ends.append([p.detach().clone() for p in module.trainable().parameters()])
    for found, expected in zip(*ends, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(UsageError, match=r"network Linear does not offer; set it to null, or"):
        checkpoint_blocks(nn.Linear(2, 2), "blocks")
    checkpoint_blocks(nn.Linear(2, 2), None)
