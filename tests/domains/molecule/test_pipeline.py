"""The pipeline: states, symmetry of probabilities, centres of mass through every algorithm."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from domains.molecule.networks import Architecture
from domains.molecule.pipeline import MoleculePipeline
from domains.molecule.samples import EMPTY, Molecules, check_molecules
from lit_rlft.algorithms.adjoint_matching import AdjointMatching
from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.algorithms.ddpo import DDPO
from lit_rlft.algorithms.dpo import DiffusionDPO
from lit_rlft.algorithms.graft import GRAFT, PGRAFT
from lit_rlft.algorithms.inverse_noise_correction import InverseNoiseCorrection
from lit_rlft.algorithms.nft import DiffusionNFT
from lit_rlft.algorithms.noise_ppo import NoisePPO
from lit_rlft.algorithms.pretrain import Pretrain
from lit_rlft.algorithms.reward_gradient import RewardGradient
from lit_rlft.core.advantage import GroupAdvantage
from lit_rlft.core.checks import UsageError
from lit_rlft.core.gradient_plan import DRTune
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.randomness import generators
from lit_rlft.core.reward import Reward
from lit_rlft.core.sampling import Sampler, walk
from lit_rlft.core.state import State, fields_of, leaves
from lit_rlft.core.trajectory import walk_with_log_probs
from lit_rlft.kit.data import collate
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.reference import LoRA, attach_lora
from tests.support import trainer_of

STATES = ("continuous", "mixed", "gibbs")
SIZES = torch.tensor([5, 2, 1, 5, 3])
MAX_ATOMS = 6
SETTINGS = {
    "flow": {"noise": "flow"},
    "polynomial": {"noise": "polynomial"},
}


def tiny(state: str = "continuous", seed: int = 0, **sizes: Any) -> MoleculePipeline:
    """A small pipeline whose predictions are not what they are at the start of training."""
    settings = {"width": 16, "depth": 1, "num_heads": 2, "max_atoms": MAX_ATOMS, **sizes}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        architecture = Architecture(state=state, **settings)  # type: ignore[arg-type]
        pipeline = MoleculePipeline(None, architecture=architecture)
        for parameter in pipeline.denoiser.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return pipeline


def batch_of(sizes: Tensor = SIZES, seed: int = 0) -> dict[str, Any]:
    """Molecules of random geometry, off centre, as many slots as the largest has atoms."""
    generator = torch.Generator().manual_seed(seed)
    slots = int(sizes.max())
    full = torch.arange(slots) < sizes.unsqueeze(1)
    types = torch.randint(0, 5, full.shape, generator=generator).where(full, EMPTY)
    positions = 1.3 * torch.randn(*full.shape, 3, generator=generator) + 2
    return {
        "index": torch.arange(len(sizes)),
        "num_atoms": sizes,
        "types": types,
        "positions": positions * full.unsqueeze(-1),
        "elements": [("H", "C", "N", "O", "F")] * len(sizes),
    }


@pytest.mark.parametrize("state", ["continuous", "mixed"])
def test_a_model_keeps_the_knots_of_its_grid(state: str, tmp_path: Path) -> None:
    pipeline = tiny(state, knots=[(0.25, 0.4), (0.5, 0.2)])
    wanted = torch.tensor([1, 0.4, 0.2, 0.1, 0], dtype=torch.float64)
    torch.testing.assert_close(pipeline.process.times(4), wanted)
    pipeline.save(tmp_path)
    again = MoleculePipeline(str(tmp_path))
    torch.testing.assert_close(again.process.times(4), wanted)


def full_of(condition: Condition) -> Tensor:
    return torch.arange(MAX_ATOMS) < condition.table("num_atoms").unsqueeze(1)


def positions_of(state: State) -> Tensor:
    return state[..., :3] if isinstance(state, Tensor) else state["position"]


def assert_lies_in_the_subspace(state: State, condition: Condition, tolerance: float) -> None:
    """Check centres of mass and empty slots of a state."""
    full, positions = full_of(condition), positions_of(state)
    assert positions.isfinite().all()
    assert positions.sum(dim=1).abs().max() < tolerance
    assert not positions[~full].any()
    if isinstance(state, Tensor):
        assert not state[~full].any() and (state[full] != 0).any(dim=-1).all()
    else:
        assert (state["type"][~full] == 6).all() and (state["type"][full] <= 5).all()


def start(pipeline: MoleculePipeline, condition: Condition) -> State:
    torch.manual_seed(0)
    return pipeline.process.prior(pipeline.blank(condition)).sample()


@pytest.mark.parametrize("state", ["continuous", "mixed"])
@pytest.mark.parametrize("sizes", [{}, {"position_scale": 1.7, "type_scale": 0.25}])
def test_states_and_molecules_are_the_same_thing(state: str, sizes: dict[str, Any]) -> None:
    pipeline, batch = tiny(state, **sizes), batch_of()
    condition, x_0 = pipeline.encode(batch), pipeline.states(batch)
    assert_lies_in_the_subspace(x_0, condition, 1e-5)
    molecules = pipeline.decode(x_0, condition)
    assert check_molecules(molecules, condition) is molecules
    assert torch.equal(molecules.num_atoms, batch["num_atoms"])
    assert torch.equal(molecules.types[:, :5], batch["types"])
    for row, size in enumerate(SIZES.tolist()):
        wanted = torch.cdist(batch["positions"][row, :size], batch["positions"][row, :size])
        found = torch.cdist(molecules.positions[row, :size], molecules.positions[row, :size])
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    one_hot = Molecules.of(molecules.positions, molecules.types, molecules.elements)
    torch.testing.assert_close(molecules.probabilities, one_hot.probabilities, atol=1e-4, rtol=0)


def test_atoms_of_gibbs_states_are_shuffled() -> None:
    """The same molecule with its atoms in another order, every order as likely, in full slots."""
    pipeline, num = tiny("gibbs"), 600
    positions = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    batch = {"positions": positions.expand(num, 3, 3), "types": torch.tensor([[0, 1, 2]] * num)}
    x_0 = fields_of(pipeline.states(pipeline.augmented(batch, generators(range(num)))))
    types = x_0["type"][:, :3]
    assert (x_0["type"][:, 3:] == len(pipeline.elements) + 1).all()
    assert not x_0["position"][:, 3:].any()
    for own in range(3):
        place = (types == own).nonzero()[:, 1]
        shares = torch.bincount(place, minlength=3) / num
        assert (shares - 1 / 3).abs().max() < 4 * (2 / 9 / num) ** 0.5
    back = x_0["position"][:, :3].gather(1, types.argsort(1).unsqueeze(-1).expand(-1, -1, 3))
    centred = positions - positions.mean(dim=0)
    torch.testing.assert_close(back, centred.expand_as(back))


@pytest.mark.parametrize("state", STATES)
def test_an_atom_in_the_centre_is_no_empty_slot(state: str) -> None:
    pipeline = tiny(state)
    batch = batch_of(torch.tensor([3]))
    batch["positions"] = torch.tensor([[[-1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]])
    x_0 = pipeline.states(batch)
    zero = torch.zeros(1)
    law = pipeline.process.noised(x_0, zero, zero + 0.5)
    assert (positions_of(law)[0, :3] != 0).any(dim=-1).all()
    assert positions_of(x_0).sum(dim=1).abs().max() < 1e-6


def test_probabilities_carry_gradients_and_agree_with_types() -> None:
    pipeline, condition = tiny(), tiny().encode(batch_of())
    x_0 = start(pipeline, condition)
    assert isinstance(x_0, Tensor)
    x_0.requires_grad_()
    molecules = pipeline.decode(x_0, condition)
    weights = molecules.probabilities
    torch.testing.assert_close(weights.sum(dim=-1), full_of(condition).float())
    assert torch.equal(weights.argmax(dim=-1)[molecules.valid], molecules.types[molecules.valid])
    (weights[..., 1].sum() + molecules.positions.square().sum()).backward()
    assert x_0.grad is not None and x_0.grad[full_of(condition)].any()


@pytest.mark.parametrize("kind", ["egnn", "transformer"])
@pytest.mark.parametrize("state", STATES)
def test_sizes_may_be_mixed_as_if_each_were_alone(kind: str, state: str) -> None:
    pipeline = tiny(state, network=kind).double()
    condition = pipeline.encode(batch_of())
    x_t, t = start(pipeline, condition), torch.linspace(0.1, 1, 5, dtype=torch.float64)
    whole = leaves(pipeline.predict(x_t, t, condition))
    for row in range(5):
        rows = torch.tensor([row])
        alone = {n: v[rows] for n, v in x_t.items()} if isinstance(x_t, dict) else x_t[rows]
        parts = leaves(pipeline.predict(alone, t[rows], condition.index(rows)))
        for part, together in zip(parts, whole, strict=True):
            # Times are embedded in float32.
            torch.testing.assert_close(part[0], together[row], rtol=1e-5, atol=1e-5)
    # One call with empty slots, as on an accelerator, gives the same.
    padded = pipeline._predict(x_t, t, MAX_ATOMS, condition.table("num_atoms"))
    full = full_of(condition)
    for part, together in zip(leaves(padded), whole, strict=True):
        torch.testing.assert_close(part[full], together[full], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("noise", SETTINGS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_state_of_a_walk_lies_in_the_subspace(state: str, noise: str, eta: float) -> None:
    pipeline = tiny(state, **SETTINGS[noise])
    condition = pipeline.encode(batch_of())
    times = pipeline.process.times(6)
    x_1 = start(pipeline, condition)
    with torch.no_grad():
        for _, x in walk(pipeline, pipeline.process, x_1, condition, times, eta):
            scale = max(1.0, float(positions_of(x).abs().max()))
            assert_lies_in_the_subspace(x, condition, 1e-5 * scale)
    x_0 = pipeline.states(batch_of())
    zero = torch.zeros(5)
    x_s = pipeline.process.noised(x_0, zero, zero + 0.3)
    for x in (x_s, pipeline.process.noised(x_s, zero + 0.3, zero + 0.9)):
        assert_lies_in_the_subspace(x, condition, 1e-5)


@pytest.mark.parametrize("state", STATES)
def test_log_probabilities_of_samples_do_not_depend_on_rotations(state: str) -> None:
    pipeline = tiny(state).double()
    condition = pipeline.encode(batch_of())
    torch.manual_seed(3)
    matrix = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]

    def turned(x: State) -> State:
        if isinstance(x, Tensor):
            return torch.cat([x[..., :3] @ matrix, x[..., 3:]], dim=-1)
        return {**x, "position": x["position"] @ matrix}

    def log_prob(x_t: State, x_s: State, t: Tensor, s: Tensor) -> Tensor:
        prediction = pipeline.predict(x_t, t, condition)
        return pipeline.process.transition(prediction, x_t, t, s, 1.0).log_prob(x_s)

    x_1 = start(pipeline, condition)
    prior = pipeline.process.prior(pipeline.blank(condition))
    torch.testing.assert_close(prior.log_prob(turned(x_1)), prior.log_prob(x_1))
    times = pipeline.process.times(5)
    with torch.no_grad():
        steps = list(walk_with_log_probs(pipeline, pipeline.process, x_1, condition, times, 1.0))
        for i, ((x_t, _), (x_s, known)) in enumerate(pairwise(steps)):
            t, s = times[i].expand(5), times[i + 1].expand(5)
            straight = log_prob(x_t, x_s, t, s)
            torch.testing.assert_close(
                log_prob(turned(x_t), turned(x_s), t, s), straight, rtol=1e-9, atol=1e-9
            )
            assert known is not None
        # Another state is not as probable: the test could fail.
        t, s = times[2].expand(5), times[3].expand(5)
        (x_t, _), (x_s, _), (other, _) = steps[2], steps[3], steps[0]
        assert not torch.isclose(log_prob(x_t, other, t, s), log_prob(x_t, x_s, t, s)).all()


class Spread(Reward):
    """Mean squared distance of atoms from the centre plus the share of carbon; no chemistry."""

    differentiable = True

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        molecules = check_molecules(samples, condition)
        squares = molecules.positions.square().sum(dim=(1, 2))
        return squares / molecules.num_atoms + molecules.probabilities[..., 1].sum(dim=1)


class Boxes(LightningDataModule):
    """A few molecules of several sizes in each batch."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(_Batches(), batch_size=None)  # type: ignore[arg-type]

    def predict_dataloader(self) -> DataLoader[Any]:
        return DataLoader(_Batches(), batch_size=None)  # type: ignore[arg-type]


class _Batches(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for seed in range(2):
            yield batch_of(seed=seed)


ALGORITHMS: dict[str, tuple[type[RewardFineTuner], dict[str, Any]]] = {
    "graft": (GRAFT, {"num_candidates": 2, "sampler": Sampler(3, 1.0)}),
    "p_graft": (PGRAFT, {"num_candidates": 2, "cut": 0.5, "sampler": Sampler(4, 1.0)}),
    "ddpo": (
        DDPO,
        {"num_candidates": 2, "sampler": Sampler(3, 1.0), "advantage": GroupAdvantage()},
    ),
    "nft": (DiffusionNFT, {"num_candidates": 2, "sampler": Sampler(3, 0.0)}),
    "dpo": (DiffusionDPO, {"num_candidates": 2, "sampler": Sampler(3, 0.0)}),
    "adjoint_matching": (AdjointMatching, {"num_candidates": 2, "sampler": Sampler(3, 1.0)}),
    "drtune": (RewardGradient, {"method": DRTune(k=1, m=2), "sampler": Sampler(4, 0.0)}),
    "noise_ppo": (NoisePPO, {"num_candidates": 2, "lora": None, "sampler": Sampler(3, 0.0)}),
    "pretrain": (Pretrain, {"condition_dropout": 0.0, "lora": None, "sampler": Sampler(3, 0.5)}),
}


def later(state: str, algorithm: str) -> bool:
    """Tell what does not run by default: Gibbs states differ from mixed ones in the process."""
    return state == "gibbs" and algorithm not in ("ddpo", "p_graft", "drtune")


@pytest.mark.parametrize(
    ("state", "algorithm"),
    [
        pytest.param(state, algorithm, marks=[pytest.mark.slow] * later(state, algorithm))
        for algorithm in ALGORITHMS
        for state in STATES
    ],
)
def test_every_algorithm_trains_and_keeps_the_centre_of_mass(
    algorithm: str, state: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    cls, settings = ALGORITHMS[algorithm]
    pipeline = tiny(state)
    before = {n: p.detach().clone() for n, p in pipeline.denoiser.named_parameters()}
    model = cls(
        pipeline,
        Spread(),
        **{"lora": LoRA(rank=2), "num_eval_samples": 2, **settings},
        optimizer=lambda p: torch.optim.SGD(p, lr=0.01),
    )
    seen: list[State] = []
    decode = pipeline.decode

    def watched(x_0: State, condition: Condition) -> Molecules:
        seen.append(x_0)
        positions = positions_of(x_0).detach()
        scale = max(1.0, float(positions.abs().max()))
        assert_lies_in_the_subspace(x_0, condition, 1e-4 * scale)
        return decode(x_0, condition)

    monkeypatch.setattr(pipeline, "decode", watched)
    trainer = trainer_of()
    if state != "continuous" and algorithm in ("adjoint_matching", "drtune", "noise_ppo"):
        with pytest.raises(UsageError, match=r"(Product|Gibbs)Process.*use configs/algorithms"):
            trainer.fit(model, Boxes())
        return
    trainer.fit(model, Boxes())
    draws = trainer.predict(model, Boxes())
    assert draws and len(draws) == 2 and seen
    assert model.num_updates >= 2
    # Adapters' second factors and the noise policy's last layer were 0; all else was as `before`.
    moved = [
        parameter.any() if name not in before else not torch.equal(parameter, before[name])
        for name, parameter in model.trainable().named_parameters()
        if name in before or "lora_B" in name or name.startswith("head")
    ]
    assert any(moved)


def test_corrected_noise_has_the_atoms_and_the_centre_of_its_molecule(tmp_path: Path) -> None:
    """Rows of 3 and 5 atoms: what is inverted, trained on and sampled lies in the subspace."""
    pipeline, batch = tiny(), batch_of(torch.tensor([3, 5, 5, 3]))
    for parameter in pipeline.denoiser.parameters():
        parameter.data *= 0.4  # with larger weights the sampler has no inverse
    rows = [{name: values[i] for name, values in batch.items()} for i in range(4)]
    loader = DataLoader(rows, batch_size=4, collate_fn=collate)  # type: ignore[arg-type]
    tuner = InverseNoiseCorrection(
        pipeline,
        Spread(),
        sampler=Sampler(12),
        corrector_steps=3,
        width=16,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
    )
    seen: list[State] = []
    noised = tuner.loss

    def watched(experience: Experience, rows: Any) -> Any:
        seen.append(experience.states["x_1"])
        assert_lies_in_the_subspace(seen[-1], experience.condition, 1e-4)
        return noised(experience, rows)

    tuner.loss = watched  # type: ignore[method-assign]
    trainer_of(max_epochs=3, default_root_dir=tmp_path).fit(tuner, loader)
    assert len(seen) == 3
    condition = pipeline.encode(batch)
    seeds = list(range(4))
    keep = list(range(13))
    for x in tuner.rollouts.draw(tuner.route(), condition, seeds, keep=keep):
        scale = max(1.0, float(positions_of(x).abs().max()))
        assert_lies_in_the_subspace(x, condition, 1e-5 * scale)
    corrected, plain = (
        prior(condition).sample(generators(seeds)) for prior in (tuner.prior, tuner.reference_prior)
    )
    assert not torch.allclose(positions_of(corrected), positions_of(plain), atol=1e-3)


def test_the_noise_policys_prior_is_a_law_in_the_subspace() -> None:
    """Its log-probability and KL are those of the dense normal on an orthonormal basis."""
    pipeline = tiny()
    model = NoisePPO(pipeline, Spread(), num_candidates=2, lora=None, sampler=Sampler(2))
    model.check()
    model.build()
    for parameter in model.trainable().parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    condition = pipeline.encode(batch_of(torch.tensor([4])))
    law, base = model.prior(condition), model.reference_prior(condition)
    x = law.sample()
    assert_lies_in_the_subspace(x, condition, 1e-5)
    centre = torch.eye(4) - 0.25
    basis = torch.linalg.svd(centre)[0][:, :3]
    total, kl = torch.zeros(()), torch.zeros(())
    for channel in range(8):
        q = basis if channel < 3 else torch.eye(4)
        std = law.std.expand_as(law.loc)[0, :4, channel]
        dense = torch.distributions.MultivariateNormal(
            q.T @ law.loc[0, :4, channel], q.T @ torch.diag(std**2) @ q
        )
        size = q.shape[1]
        unit = torch.distributions.MultivariateNormal(torch.zeros(size), torch.eye(size))
        total = total + dense.log_prob(q.T @ x[0, :4, channel])
        kl = kl + torch.distributions.kl_divergence(dense, unit)
    torch.testing.assert_close(law.log_prob(x)[0], total, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(law.kl(base)[0], kl, rtol=1e-4, atol=1e-4)
    assert law.num_dimensions.tolist() == [3 * 3 + 4 * 5]


def test_rotation_augmentation_is_the_transformers_alone() -> None:
    batch = batch_of()
    plain = tiny()
    assert not plain.augments and plain.augmented(batch, generators(range(5))) is batch
    turned = tiny(network="transformer")
    moved = [turned.augmented(batch, generators(seeds)) for seeds in (range(5), range(5, 10))]
    first, second = (turned.states(own) for own in moved)
    assert isinstance(first, Tensor) and isinstance(second, Tensor)
    third = {name: column[2:3] for name, column in batch.items()}
    alone = turned.augmented(third, generators([2]))
    assert torch.equal(alone["positions"][0], moved[0]["positions"][2])  # in any batch the same
    assert_close = torch.testing.assert_close
    assert_close(turned.states(moved[0]), first, rtol=0, atol=0)  # encoding draws nothing
    assert not torch.allclose(first[..., :3], second[..., :3])
    assert torch.equal(first[..., 3:], second[..., 3:])
    for row, size in enumerate(SIZES.tolist()):
        one, other = first[row, :size, :3], second[row, :size, :3]
        torch.testing.assert_close(one @ one.T, other @ other.T, atol=1e-4, rtol=1e-4)
        if size > 3:
            # Rotations, not reflections: the triple product keeps its sign.
            torch.testing.assert_close(torch.linalg.det(one[:3]), torch.linalg.det(other[:3]))


def test_pretraining_draws_nothing_from_torchs_own_generator(tmp_path: Path) -> None:
    """Else a resumed run would see other rotations; the seed of the model decides."""

    def pretrained(seed: int, elsewhere: int) -> list[Tensor]:
        torch.manual_seed(elsewhere)
        pipeline = tiny("gibbs", network="transformer")
        how = {"condition_dropout": 0.0, "sampler": Sampler(2), "seed": seed}
        model = Pretrain(pipeline, Spread(), **how)
        trainer_of(default_root_dir=tmp_path).fit(model, Boxes())
        return [*pipeline.denoiser.parameters()]

    first = pretrained(0, elsewhere=0)
    torch.testing.assert_close(pretrained(0, elsewhere=1), first, rtol=0, atol=0)
    assert not all(map(torch.equal, pretrained(1, elsewhere=0), first))


def test_moved_data_are_not_kept() -> None:
    model = Pretrain(tiny(network="transformer"), Spread(), cache_states=True)
    with pytest.raises(UsageError, match=r"set model\.init_args\.cache_states to false"):
        model.check()


def test_conditions_are_numbers_of_atoms_each_once() -> None:
    pipeline = tiny()
    condition = pipeline.encode(batch_of())
    assert condition.entries == [{"num_atoms": n} for n in (1, 2, 3, 5)]
    assert condition.table("num_atoms").tolist() == SIZES.tolist()
    assert pipeline.describe(condition.entries[1]) == "2 atoms"
    features = pipeline.features(condition)
    assert features.shape == (5, MAX_ATOMS + 1) and features.argmax(dim=1).tolist() == [
        5,
        2,
        1,
        5,
        3,
    ]
    assert pipeline.features(pipeline.example()).shape == (1, MAX_ATOMS + 1)
    blank = pipeline.blank(condition)
    assert isinstance(blank, Tensor) and blank.shape == (5, MAX_ATOMS, 8)


def test_data_of_other_elements_or_too_many_atoms_are_refused() -> None:
    pipeline = tiny()
    batch = batch_of()
    with pytest.raises(UsageError, match=r"molecules of 7 atoms.*has 6 slots"):
        pipeline.encode({**batch, "num_atoms": torch.tensor([7])})
    # A histogram is refused as a whole, before a batch draws its rarest number.
    conditions = {"num_atoms": torch.tensor([3, 3]), "most_atoms": torch.tensor([9, 9])}
    with pytest.raises(UsageError, match=r"molecules of 9 atoms.*\(data.init_args.max_atoms 6\)"):
        pipeline.encode(conditions)
    with pytest.raises(UsageError, match=r"elements \['C', 'N'\].*implicit_hydrogens true"):
        pipeline.states({**batch, "elements": [("C", "N")] * 5})


def test_pretraining_on_numbers_of_atoms_alone_is_refused() -> None:
    with pytest.raises(UsageError, match=r"have no 'types', only \['num_atoms'\].*pretrain.yaml"):
        tiny().states({"num_atoms": SIZES})


@pytest.mark.parametrize("state", STATES)
def test_a_lora_is_merged_when_saved(state: str, tmp_path: Path) -> None:
    pipeline, plain = tiny(state), tiny(state)
    attach_lora(pipeline, LoRA(rank=3, alpha=7))
    with torch.no_grad():
        for name, parameter in pipeline.denoiser.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    pipeline.save(tmp_path)
    merged = MoleculePipeline(str(tmp_path))
    assert merged.name == tmp_path.name
    condition = pipeline.encode(batch_of())
    x_t, t = start(pipeline, condition), torch.full((5,), 0.3)
    for tuned, same, base in zip(
        *(leaves(each.predict(x_t, t, condition)) for each in (pipeline, merged, plain)),
        strict=True,
    ):
        torch.testing.assert_close(same, tuned, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(same, base, atol=1e-3)


def test_samples_are_keyed_drawn_and_written(tmp_path: Path) -> None:
    pipeline = tiny()
    methane = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    turned = 0.63 * methane @ torch.linalg.qr(torch.randn(3, 3))[0]
    batch = {
        "num_atoms": torch.tensor([5, 5, 3]),
        "types": torch.tensor([[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [3, 0, 0, EMPTY, EMPTY]]),
        "positions": torch.stack([0.63 * methane, turned, 0.56 * methane]),
    }
    condition = pipeline.encode(batch)
    molecules = pipeline.decode(pipeline.states(batch), condition)
    assert pipeline.keys(molecules, condition) == ["C", "C", "O"]
    pictures = pipeline.render(molecules, condition)
    assert pictures.shape[:2] == (3, 3) and pictures.min() >= 0 and pictures.max() <= 1
    assert torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])
    paths = pipeline.save_samples(molecules, condition, tmp_path, ["a", "b", "c"])
    assert [path.name for path in paths] == ["a.sdf", "b.sdf", "c.sdf"]
    assert (tmp_path / "c.smi").read_text().split()[0] == "O"
    two = pipeline.index_samples(molecules, torch.tensor([2, 0]))
    assert two.num_atoms.tolist() == [3, 5]
