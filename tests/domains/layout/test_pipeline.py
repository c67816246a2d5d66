"""The pipeline: states, conditions that are obeyed exactly, files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor

from domains.layout.data import LayoutData
from domains.layout.networks.transformer import Architecture, LayoutTransformer, load_network
from domains.layout.pipeline import LayoutPipeline
from domains.layout.rewards import Alignment
from domains.layout.samples import EMPTY, Layouts
from domains.layout.sources import Grammar, JSONLayouts
from domains.layout.sources.formats import read_json
from domains.layout.sources.packed import Page
from lit_rlft.algorithms.adjoint_matching import AdjointMatching
from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.algorithms.ddpo import DDPO
from lit_rlft.algorithms.dpo import DiffusionDPO
from lit_rlft.algorithms.graft import GRAFT, PGRAFT
from lit_rlft.algorithms.nft import DiffusionNFT, contrastive_loss
from lit_rlft.algorithms.noise_ppo import NoisePPO
from lit_rlft.algorithms.pretrain import Pretrain
from lit_rlft.algorithms.reward_gradient import RewardGradient
from lit_rlft.core.advantage import GroupAdvantage
from lit_rlft.core.checks import UsageError
from lit_rlft.core.gradient_plan import DRTune
from lit_rlft.core.implicit import implicit
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import State, fields_of, leaves
from lit_rlft.loop.experience import Draw
from lit_rlft.loop.reference import LoRA, attach_lora
from tests.support import assert_close_in_rounding

Make = Callable[..., Any]
STATES = ("continuous", "mixed", "gibbs")
TASKS = ("unconditional", "category", "category_size", "completion")


def sample(pipeline: LayoutPipeline, condition: Condition, sampler: Sampler) -> State:
    torch.manual_seed(0)
    with torch.no_grad():
        x_1 = pipeline.process.prior(pipeline.blank(condition)).sample()
        return sampler.sample(pipeline, pipeline.process, x_1, condition)


def assert_obeyed(layouts: Layouts, condition: Condition) -> None:
    """Check that what is given was returned to the last bit."""
    known = condition.table("known_labels")
    assert torch.equal(layouts.labels[known], condition.table("labels")[known])
    assert torch.equal(layouts.presence[known], (layouts.labels[known] != EMPTY).float())
    fixed = condition.table("known_boxes")
    assert torch.equal(layouts.boxes[fixed], condition.table("boxes")[fixed])


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("task", TASKS)
def test_states_and_layouts_are_the_same_thing(
    state: str, task: str, tiny_pipeline: Make, batch_of: Make
) -> None:
    pipeline, batch = tiny_pipeline(state), batch_of(task)
    layouts = pipeline.decode(pipeline.states(batch), pipeline.encode(batch))
    assert torch.equal(layouts.labels, batch["labels"])
    full = layouts.valid.unsqueeze(-1)
    torch.testing.assert_close(layouts.boxes * full, batch["boxes"] * full, atol=1e-6, rtol=0)
    assert torch.equal(layouts.presence > 0.5, layouts.valid)
    # Empty slots have boxes 0, the mean of the noise.
    x_0 = pipeline.states(batch)
    boxes = x_0[..., :4] if state == "continuous" else x_0["box"]
    assert not boxes[batch["labels"] == EMPTY].any()


@pytest.mark.parametrize("state", ["continuous", "mixed"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_conditions_are_obeyed_by_every_sampler(
    state: str, task: str, eta: float, tiny_pipeline: Make, batch_of: Make
) -> None:
    pipeline = tiny_pipeline(state)
    assert_arrived(pipeline, pipeline.encode(batch_of(task)), eta)


@pytest.mark.parametrize("class_noise", ["mask", "uniform"])
@pytest.mark.parametrize("task", ["category", "completion"])
def test_conditions_are_obeyed_one_element_after_the_other(
    class_noise: str, task: str, tiny_pipeline: Make, batch_of: Make
) -> None:
    pipeline = tiny_pipeline("gibbs", class_noise=class_noise, shift=0.5)
    batch = batch_of(task)
    condition, x_0 = pipeline.encode(batch), pipeline.states(batch)
    assert_arrived(pipeline, condition, 0.7)
    for low in (0.0, 0.3):
        s, t = torch.full((6,), low), torch.full((6,), 0.8)
        x_s = pipeline.process.noised(x_0, torch.zeros(6), s)
        x_t = pipeline.process.noised(x_s, s, t)
        loss = pipeline.process.loss(pipeline.predict(x_t, t, condition), x_s, x_t, s, t)
        pipeline.zero_grad()
        loss.sum().backward()
        grads = [p.grad for p in pipeline.denoiser.parameters() if p.grad is not None]
        assert loss.isfinite().all() and all(grad.isfinite().all() for grad in grads)
        assert any(grad.any() for grad in grads)


def assert_arrived(pipeline: LayoutPipeline, condition: Condition, eta: float) -> None:
    """Check that samplers of few and of more steps arrive at what is given."""
    for num_steps in (1, 2, 7):
        x_0 = sample(pipeline, condition, Sampler(num_steps, eta))
        assert_obeyed(pipeline.decode(x_0, condition), condition)
        # The state itself arrives there, up to rounding: decoding only removes the rounding.
        fixed, given = condition.table("known_boxes"), 2 * condition.table("boxes") - 1
        boxes = x_0[..., :4] if isinstance(x_0, Tensor) else x_0["box"]
        torch.testing.assert_close(boxes[fixed], given[fixed], atol=1e-5, rtol=0)
        if not isinstance(x_0, Tensor):
            known, labels = condition.table("known_labels"), condition.table("labels")
            wanted = labels.where(labels != EMPTY, 5)
            assert torch.equal(x_0["category"][known], wanted[known])


@pytest.mark.parametrize("state", STATES)
def test_given_entries_have_no_loss_no_gradient_and_no_divergence(
    state: str, tiny_pipeline: Make, batch_of: Make
) -> None:
    pipeline, other = tiny_pipeline(state), tiny_pipeline(state, seed=1)
    batch = batch_of("completion")
    # Everything given: nothing is left to predict.
    batch["known_boxes"], batch["known_labels"] = (
        torch.ones_like(batch[name]) for name in ("known_boxes", "known_labels")
    )
    batch["boxes"] = batch["boxes"].where((batch["labels"] != EMPTY).unsqueeze(-1), 0.5)
    condition, x_0 = pipeline.encode(batch), pipeline.states(batch)
    t, s = torch.full((6,), 0.6), torch.full((6,), 0.4)
    x_t = pipeline.process.noised(x_0, torch.zeros(6), t)
    prediction = pipeline.predict(x_t, t, condition)
    assert not any(leaf.requires_grad and leaf.grad_fn is None for leaf in leaves(prediction))
    loss = pipeline.process.loss(prediction, x_0, x_t, torch.zeros(6), t)
    assert loss.abs().max() < 1e-9
    loss.sum().backward()
    grads = [p.grad for p in pipeline.denoiser.parameters() if p.grad is not None]
    assert all(not grad.any() for grad in grads)
    ours, theirs = (
        pipeline.process.transition(p.predict(x_t, t, condition), x_t, t, s, 1.0)
        for p in (pipeline, other)
    )
    assert not ours.kl(theirs).any()


@pytest.mark.parametrize("state", ["mixed", "gibbs"])
def test_mirror_images_leave_what_is_given_alone(
    state: str, tiny_pipeline: Make, batch_of: Make
) -> None:
    """Given classes have infinite logits, and no part in the loss of the line through both."""
    pipeline, old = tiny_pipeline(state), tiny_pipeline(state, seed=1)
    batch = batch_of("category")
    condition, x_0 = pipeline.encode(batch), pipeline.states(batch)
    t, s, good = torch.full((6,), 0.6), torch.zeros(6), torch.linspace(0, 1, 6)
    x_t = pipeline.process.noised(x_0, s, t)
    with torch.no_grad():
        old_one, other = (p.predict(x_t, t, condition) for p in (old, pipeline))
    assert fields_of(old_one)["category"].isinf().any()
    losses = contrastive_loss(pipeline.process, other, old_one, x_0, x_t, t, good, beta=1.0)
    assert losses.isfinite().all()
    # Without free classes the category's loss is 0, as that of a prediction on the line is.
    native = [pipeline.process.loss(p, x_0, x_t, s, t) for p in (other, old_one)]
    plus = implicit(other, old_one, torch.ones(6))
    torch.testing.assert_close(pipeline.process.loss(plus, x_0, x_t, s, t), native[0])
    at_start = contrastive_loss(pipeline.process, old_one, old_one, x_0, x_t, t, good, beta=0.7)
    torch.testing.assert_close(at_start, native[1])


def test_the_network_sees_what_is_given_and_not_the_noise_there(
    tiny_pipeline: Make, batch_of: Make
) -> None:
    pipeline = tiny_pipeline()
    condition = pipeline.encode(batch_of("category"))
    x_t = torch.randn(6, 12, 10)
    t = torch.full((6,), 0.5)
    v = pipeline.predict(x_t, t, condition)
    changed = x_t.clone()
    changed[..., 4:] += torch.randn(6, 12, 6)
    assert torch.equal(pipeline.predict(changed, t, condition)[..., :4], v[..., :4])
    free = pipeline.encode(batch_of("unconditional"))
    assert not torch.equal(pipeline.predict(x_t, t, free)[..., :4], v[..., :4])


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


def run(model: RewardFineTuner, data: LayoutData, tmp_path: Path) -> list[Draw]:
    """Train two rounds at a high learning rate, then draw from the tuned model."""
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        limit_train_batches=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, data)
    assert trainer.callback_metrics["train/loss"].isfinite()
    draws = trainer.predict(model, data)
    assert draws
    return draws  # type: ignore[return-value]


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
def test_every_algorithms_samples_obey_their_conditions(
    algorithm: str,
    state: str,
    tiny_pipeline: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    cls, settings = ALGORITHMS[algorithm]
    tasks = dict.fromkeys(TASKS[1:], 1.0)
    data = LayoutData(Grammar(60), test_fraction=0.1, tasks=tasks, batch_size=4, eval_batch_size=4)
    pipeline = tiny_pipeline(state)
    model = cls(
        pipeline,
        Alignment(),
        **{"lora": LoRA(rank=2), "num_eval_samples": 2, **settings},
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )
    if state != "continuous" and algorithm in ("adjoint_matching", "drtune", "noise_ppo"):
        with pytest.raises(UsageError, match=r"(Product|Gibbs)Process.*use configs/algorithms"):
            run(model, data, tmp_path)
        return
    draws = run(model, data, tmp_path)
    assert sum(len(draw.condition) for draw in draws) == 12
    for draw in draws:
        assert_obeyed(draw.samples, draw.condition)
    # The model that drew is not the pretrained one: the reference finished for another.
    assert model.num_updates >= 2
    if model.lora is not None:
        assert any(p.any() for n, p in pipeline.denoiser.named_parameters() if "lora_B" in n)


def test_unique_conditions_are_encoded_once(tiny_pipeline: Make, batch_of: Make) -> None:
    pipeline = tiny_pipeline()
    condition = pipeline.encode(batch_of("unconditional"))
    assert len(condition.entries) == 1 and condition.rows.tolist() == [0] * 6
    assert condition.entries[0] == {"task": "unconditional", "given": []}
    batch = batch_of("category")
    twice = {
        name: torch.cat([c, c]) if isinstance(c, Tensor) else [*c, *c] for name, c in batch.items()
    }
    condition = pipeline.encode(twice)
    assert torch.equal(condition.rows[:6], condition.rows[6:])
    labels = batch["labels"].where(batch["labels"] != EMPTY, -1)
    assert torch.equal(condition.table("labels"), torch.cat([labels, labels]))
    # Each record tells its own condition.
    for row, entry in zip(labels.tolist() * 2, condition.each(), strict=True):
        names = [pipeline.classes[label] for label in row if label != EMPTY]
        assert [given["label"] for given in entry["given"]] == names
        json.dumps(entry)
    assert pipeline.describe(condition.entries[0]).startswith("category, ")


def test_features_tell_conditions_apart(tiny_pipeline: Make, batch_of: Make) -> None:
    pipeline = tiny_pipeline()
    features = [pipeline.features(pipeline.encode(batch_of(task, 8))) for task in TASKS]
    assert {f.shape for f in features} == {(8, 1 + 6 + 8)}
    assert_close_in_rounding(features[0], features[0][:1].expand(8, -1))
    assert features[0].any()
    assert len({tuple(row) for f in features for row in f.tolist()}) > 15
    assert pipeline.features(pipeline.example()).shape == (1, 15)


def test_other_slots_or_classes_are_refused(tiny_pipeline: Make, batch_of: Make) -> None:
    pipeline = tiny_pipeline()
    batch = batch_of()
    with pytest.raises(UsageError, match=r"data have 9 slots.*has 12; set max_elements"):
        tiny_pipeline().encode(
            {**batch, "labels": batch["labels"][:, :9], "boxes": batch["boxes"][:, :9]}
        )
    with pytest.raises(UsageError, match=r"data have the classes \['a', 'b'\].*'\[a, b\]'"):
        pipeline.states({**batch, "classes": [("a", "b")] * 6})


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_saved_models_are_loaded_again(
    state: str, dtype: str, tiny_pipeline: Make, batch_of: Make, tmp_path: Path
) -> None:
    pipeline = tiny_pipeline(state, classes=("text", "title", "list", "table", "figure"))
    pipeline.save_dtype = getattr(torch, dtype)
    assert all(path.is_file() for path in pipeline.save(tmp_path / "a"))
    loaded = LayoutPipeline(str(tmp_path / "a"))
    assert loaded.name == "a" and loaded.classes == pipeline.classes
    condition = pipeline.encode(batch_of("completion"))
    results = [
        pipe.decode(sample(pipe, condition, Sampler(4)), condition) for pipe in (pipeline, loaded)
    ]
    if dtype == "float32":
        assert_close_in_rounding(results[0].boxes, results[1].boxes)
        assert torch.equal(results[0].labels, results[1].labels)


@pytest.mark.parametrize("state", STATES)
def test_a_lora_is_merged_when_saved(
    state: str, tiny_pipeline: Make, batch_of: Make, tmp_path: Path
) -> None:
    pipeline = tiny_pipeline(state)
    attach_lora(pipeline, LoRA(rank=3, alpha=7))
    with torch.no_grad():
        for name, parameter in pipeline.denoiser.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    pipeline.save(tmp_path)
    condition = pipeline.encode(batch_of("unconditional"))
    torch.manual_seed(1)
    x_t = pipeline.process.prior(pipeline.blank(condition)).sample()
    t = torch.full((6,), 0.3)
    plain = LayoutPipeline(str(tmp_path))
    for tuned, merged, base in zip(
        leaves(pipeline.predict(x_t, t, condition)),
        leaves(plain.predict(x_t, t, condition)),
        leaves(tiny_pipeline(state).predict(x_t, t, condition)),
        strict=True,
    ):
        torch.testing.assert_close(merged, tuned, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(merged, base, atol=1e-3)


def test_models_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"colour": 3}')
    for pretrained in ("missing", str(tmp_path)):
        with pytest.raises(UsageError, match="could not be loaded as a layout model"):
            LayoutPipeline(pretrained)
    with pytest.raises(UsageError, match="exclude each other"):
        LayoutPipeline("grammar", architecture=Architecture())
    for settings, message in [
        ({"width": 30, "num_heads": 4}, "multiple of num_heads"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"state": "discrete"}, "use 'continuous', 'mixed' or 'gibbs'"),
        ({"class_noise": "noise"}, "class_noise is 'noise'; use 'mask' or 'uniform'"),
        ({"box_share": 1.0}, "box_share must be below 1"),
    ]:
        with pytest.raises(UsageError, match=message):
            Architecture(**settings)  # type: ignore[arg-type]


def test_new_networks_predict_0_and_have_the_documented_size() -> None:
    network = LayoutTransformer(Architecture())
    prediction = network(torch.randn(2, 12, 10), torch.tensor([0.1, 1.0]), torch.zeros(2, 12, 3))
    assert not prediction.any()
    assert 0.25e6 < sum(p.numel() for p in network.parameters()) < 0.35e6
    with torch.device("meta"):
        large = LayoutTransformer(Architecture(width=512, num_heads=8, num_slots=20))
    assert 14e6 < sum(p.numel() for p in large.parameters()) < 21e6


def test_samples_are_written_in_the_input_format(
    tiny_pipeline: Make, batch_of: Make, tmp_path: Path
) -> None:
    pipeline, batch = tiny_pipeline(), batch_of()
    condition = pipeline.encode(batch)
    layouts = pipeline.decode(pipeline.states(batch), condition)
    names = [f"{i:05d}" for i in range(6)]
    paths = pipeline.save_samples(layouts, condition, tmp_path / "..", names[:0])
    assert paths == []
    paths = pipeline.save_samples(layouts, condition, tmp_path, names)
    assert [path.name for path in paths] == [f"{name}.json" for name in names]
    assert all(path.with_suffix(s).stat().st_size > 500 for path in paths for s in (".svg", ".png"))
    pages = list(read_json(tmp_path))
    assert all(isinstance(page, Page) and page.width == 612 for page in pages)
    packed = JSONLayouts(str(tmp_path), cache_dir=str(tmp_path / "cache")).load()
    for i in range(6):
        found = sorted(map(tuple, packed.boxes[i].round(4).tolist()))
        wanted = sorted(map(tuple, (batch["boxes"][i].numpy().round(4)).tolist()))
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), atol=2e-4, rtol=0)
    assert load_network(pipeline.save(tmp_path / "w")[0].parent).architecture.canvas == (612, 792)
