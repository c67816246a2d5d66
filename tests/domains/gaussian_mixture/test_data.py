import torch

from domains.gaussian_mixture.closed_form.mixture import Mixture
from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline


def test_batches_hold_conditions_and_points() -> None:
    data = MixtureData(num_train=20, num_val=5, num_test=7, batch_size=8, eval_batch_size=4)
    train = list(data.train_dataloader())
    assert [len(batch["index"]) for batch in train] == [8, 8]
    for batch in train:
        assert batch["index"].dtype == torch.int64
        assert batch["name"] == ["mixture"] * 8
        assert batch["x_0"].shape == (8, 2) and batch["x_0"].dtype == torch.float32
    pipeline = GaussianMixturePipeline()
    assert len(pipeline.encode(train[0])) == 8
    assert torch.equal(pipeline.states(train[0]), train[0]["x_0"])
    for loader, size in ((data.val_dataloader(), 5), (data.test_dataloader(), 7)):
        rows = torch.cat([batch["index"] for batch in loader])
        assert torch.equal(rows, torch.arange(size))


def test_points_are_a_function_of_seed_split_and_row() -> None:
    def points(split: str, seed: int) -> torch.Tensor:
        rows = MixtureData(num_train=6, num_val=6, num_test=6, seed=seed).rows(split)
        return torch.stack([rows[i]["x_0"] for i in range(6)])

    assert torch.equal(points("train", 0), points("train", 0))
    drawn = [points(split, seed) for split in ("train", "val", "test") for seed in (0, 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_points_come_from_the_mixture() -> None:
    """Mean and std within 4 standard errors."""
    data = MixtureData([1.0], [[2.0, -1.0, 0.0]], [0.5], num_train=4000)
    rows = data.rows("train")
    points = torch.stack([rows[i]["x_0"] for i in range(4000)])
    assert isinstance(data.mixture, Mixture)
    assert ((points.mean(dim=0) - torch.tensor([2.0, -1.0, 0.0])).abs() < 4 * 0.5 / 63).all()
    assert ((points.std(dim=0) - 0.5).abs() < 4 * 0.5 / 89).all()
