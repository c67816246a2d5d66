import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_rlft.evaluation.measurements import Measurements, kept_share, moments, paired_moments
from lit_rlft.report.compare import paired_test
from lit_rlft.runs.before_after import before_after, comparison

NAN = float("nan")


def pictures(num: int, size: tuple[int, int] = (8, 8), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 255, (num, 3, *size), dtype=torch.uint8, generator=generator)


def added(evaluation: Measurements, arm: str, batch: int, **values: list[float]) -> None:
    columns = {name: torch.tensor(column) for name, column in values.items()}
    num = len(next(iter(columns.values())))
    shown = torch.full((num, 3, 2, 2), batch / 10)
    evaluation.add(arm, batch, columns, shown, [f"label {batch}"] * num)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "mean", "sem"),
    [
        ([1.0, 2.0, 3.0, 6.0], 3.0, math.sqrt(14 / 3 / 4)),
        ([1.0, NAN, 3.0, NAN], 2.0, 1.0),
        ([NAN, 5.0], 5.0, NAN),
        ([NAN, NAN], NAN, NAN),
        ([], NAN, NAN),
        ([0.0, math.inf], math.inf, NAN),
    ],
)
def test_moments_leave_out_what_does_not_apply(
    values: list[float], mean: float, sem: float
) -> None:
    found = moments(torch.tensor(values, dtype=torch.float64))
    assert found == pytest.approx({"mean": mean, "sem": sem}, nan_ok=True)


def test_gain_is_the_paired_difference() -> None:
    """The same large spread in both arms cancels: the error is that of the differences."""
    evaluation = Measurements()
    added(evaluation, "reference", 0, r=[0.0, 100.0], only=[1.0, 2.0])
    added(evaluation, "reference", 1, r=[50.0], only=[3.0])
    added(evaluation, "tuned", 1, r=[51.0])  # batches in any order
    added(evaluation, "tuned", 0, r=[2.0, 103.0])
    summary = evaluation.summary(world_size=1)
    assert set(summary["gain"]) == set(summary["tuned"]) == {"r"}
    assert set(summary["reference"]) == {"r", "only"}
    assert summary["gain"]["r"] == pytest.approx({"mean": 2.0, "sem": 1 / math.sqrt(3)})
    assert summary["tuned"]["r"]["mean"] == pytest.approx(52.0)
    assert summary["reference"]["r"]["sem"] == pytest.approx(50 / math.sqrt(3))


def test_gain_is_tuned_minus_reference_where_they_know_other_samples() -> None:
    evaluation = Measurements()
    added(evaluation, "reference", 0, r=[1.0, NAN, 3.0, NAN])
    added(evaluation, "tuned", 0, r=[2.0, 5.0, NAN, NAN])
    summary = evaluation.summary(1)
    assert summary["gain"]["r"]["mean"] == 1.5
    means = [summary[arm]["r"]["mean"] for arm in ("tuned", "reference")]
    assert means == [3.5, 2.0]
    other = Measurements()
    added(other, "reference", 0, r=[1.0])
    added(other, "tuned", 0, r=[2.0, 5.0])
    assert "r" not in other.summary(1)["gain"]


def test_error_of_a_gain_where_some_do_not_count() -> None:
    """The deviation over fresh sets; each arm knows 70 % of its samples, most of them the same."""
    generator = torch.Generator().manual_seed(0)

    def drawn() -> dict[str, float]:
        common = torch.randn(200, generator=generator, dtype=torch.float64)
        arms = [common + 0.3 * torch.randn(200, generator=generator) + i for i in range(2)]
        # The larger a value, the likelier it counts: the mean depends on which do.
        known = [(x - i + torch.rand(200, generator=generator)) > 0 for i, x in enumerate(arms)]
        reference, tuned = (x.where(k, NAN) for x, k in zip(arms, known, strict=True))
        return paired_moments(tuned, reference)

    found = [drawn() for _ in range(500)]
    true = torch.tensor([gain["mean"] for gain in found]).std().item()
    error = torch.tensor([gain["sem"] for gain in found]).square().mean().sqrt().item()
    assert error == pytest.approx(true, rel=0.1)
    assert math.isnan(paired_moments(torch.tensor([NAN]), torch.tensor([1.0]))["mean"])


@pytest.mark.parametrize("known", [1.0, 0.7])
def test_the_share_kept_of_best_of_n_and_its_error(known: float) -> None:
    """The deviation over fresh sets: normal rewards, best of 4, and a model that keeps 0.4."""
    generator = torch.Generator().manual_seed(0)
    num, sets, shift = 400, 400, 0.4 * 1.0293754  # the mean of the largest of four normals

    def drawn() -> dict[str, float]:
        candidates = torch.randn(num, 4, generator=generator, dtype=torch.float64)
        noise = torch.randn(num, generator=generator, dtype=torch.float64)
        arms = 0.6 * candidates[:, 0] + 0.8 * noise + shift, candidates[:, 0], candidates.amax(1)
        lost = [torch.rand(num, generator=generator) > known for _ in arms]
        tuned, reference, best = (x.where(~y, NAN) for x, y in zip(arms, lost, strict=True))
        return kept_share(tuned, reference, best)

    found = [drawn() for _ in range(sets)]
    shares = torch.tensor([one["mean"] for one in found])
    error = torch.tensor([one["sem"] for one in found]).square().mean().sqrt().item()
    assert error == pytest.approx(shares.std().item(), rel=0.15)
    assert shares.mean().item() == pytest.approx(0.4, abs=4 * error / sets**0.5)


def test_a_second_copy_of_each_sample_says_nothing_new() -> None:
    """Copies belong to one row: means and errors are those of single samples, failures or not."""
    generator = torch.Generator().manual_seed(0)
    tuned, reference, best = torch.randn(3, 40, dtype=torch.float64, generator=generator).add(
        torch.tensor([[1.0], [0.0], [2.0]])
    )
    tuned[3], reference[5] = torch.nan, torch.nan
    rows = torch.arange(40).repeat_interleave(2)
    a, b, c = (values.repeat_interleave(2) for values in (tuned, reference, best))
    for found, wanted in (
        (paired_moments(a, b, rows), paired_moments(tuned, reference)),
        (kept_share(a, b, c, rows), kept_share(tuned, reference, best)),
        (moments(a, rows), moments(tuned)),
    ):
        assert found == pytest.approx(wanted, rel=1e-12)


def test_no_share_of_what_best_of_n_does_not_gain() -> None:
    evaluation = Measurements()
    added(evaluation, "reference", 0, r=[1.0, 2.0, 3.0], other=[1.0, 2.0, 3.0])
    added(evaluation, "tuned", 0, r=[2.0, 3.0, 4.0], other=[2.0, 3.0, 4.0])
    added(evaluation, "best", 0, r=[3.0, 4.0, 5.0], other=[1.0, 3.0, 2.5])
    kept = evaluation.summary(1, best="best")["kept"]
    assert kept["r"] == {"mean": 0.5, "sem": 0.0}
    assert math.isnan(kept["other"]["mean"]) and math.isnan(kept["other"]["sem"])
    assert "kept" not in evaluation.summary(1)


def test_best_of_n_has_to_move_a_mean_by_two_standard_errors() -> None:
    """Up or down: of what is better when smaller, such as a time, the best of n have less."""
    zero = torch.zeros(4, dtype=torch.float64)
    for gains, share in (([0.0, 3, 3, 3], 0.5), ([0.0, 0, 3, 3], NAN)):  # 3 and 1.7 errors
        best = torch.tensor(gains, dtype=torch.float64)
        for sign in (1, -1):
            found = kept_share(sign * best.mean() / 2 + zero, zero, sign * best)
            assert found["mean"] == pytest.approx(share, nan_ok=True)


def test_reference_is_kept_for_the_next_evaluation() -> None:
    first = Measurements()
    added(first, "reference", 3, r=[1.0])
    added(first, "tuned", 3, r=[2.0])
    second = Measurements(first.reference)
    assert second.reference.has(3) and not second.tuned.has(3)
    added(second, "tuned", 3, r=[4.0])
    assert second.summary(1)["gain"]["r"]["mean"] == 3.0
    assert first.summary(1)["gain"]["r"]["mean"] == 1.0


def test_processes_are_summarised_together(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = Measurements()
    added(evaluation, "reference", 0, r=[1.0])
    added(evaluation, "tuned", 0, r=[2.0, 4.0])
    other = {"tuned": {"r": torch.tensor([9.0])}, "reference": {}, "gain": {}}
    rows = {"tuned": torch.tensor([1]), "reference": torch.tensor([], dtype=torch.int64)}

    def gathered(mine: dict[str, Any], world_size: int) -> list[dict[str, Any]]:
        return [mine, rows if isinstance(mine["tuned"], Tensor) else other]

    monkeypatch.setattr("lit_rlft.evaluation.measurements.gather", gathered)
    summary = evaluation.summary(world_size=2)
    assert summary["tuned"]["r"]["mean"] == 5.0 and summary["reference"]["r"]["mean"] == 1.0
    # Two rows, 2 and 4 of the one and 9 of the other: sqrt(2 / 1 (4^2 + 4^2)) / 3.
    assert summary["tuned"]["r"]["sem"] == pytest.approx(8 / 3)


def test_a_sample_without_a_label_is_refused() -> None:
    features = [{"size": torch.ones(2)}]  # they were left out of the metric, without a word
    with pytest.raises(ValueError, match="0 labels are not those of all samples"):
        Measurements().add("tuned", 0, {"r": torch.ones(2)}, None, [], features)


def test_nothing_measured() -> None:
    assert Measurements().summary(1) == {"tuned": {}, "reference": {}, "gain": {}}


def test_pictures_are_kept_as_bytes_and_values_off_the_graph() -> None:
    evaluation = Measurements()
    value = torch.tensor([0.5, 1.0], requires_grad=True)
    shown = torch.tensor([-0.5, 0.5, 1.0, 2.0]).expand(2, 3, 1, 4).requires_grad_()
    evaluation.add("tuned", 0, {"r": value}, shown, ["a", "b"])
    kept = evaluation.tuned.pictures[0]
    assert kept.dtype == torch.uint8 and kept[0, 0, 0].tolist() == [0, 128, 255, 255]
    column = evaluation.tuned.columns()["r"]
    assert column.dtype == torch.float64 and not column.requires_grad
    assert evaluation.tuned.labels == {0: ["a", "b"]}


@pytest.mark.parametrize(("num", "num_columns"), [(6, 3), (7, 3), (2, 5), (1, 1)])
@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
def test_before_after_puts_twins_one_above_the_other(
    num: int, num_columns: int, size: tuple[int, int]
) -> None:
    reference, tuned = pictures(num, size), pictures(num, size, seed=1)
    panel = before_after(reference, tuned, num_columns)
    height, width = size[0] + 2, size[1] + 2
    num_rows = -(-num // num_columns)
    assert panel.dtype == torch.uint8
    assert panel.shape == (3, num_rows * (2 * height + 3), num_columns * width)
    for i in range(num_rows * num_columns):
        row, column = divmod(i, num_columns)
        top, left = row * (2 * height + 3) + 1, column * width + 1
        for arm, shown in enumerate((reference, tuned)):
            start = top + arm * height
            tile = panel[:, start : start + size[0], left : left + size[1]]
            expected = shown[i] if i < num else torch.full_like(tile, 255)
            assert torch.equal(tile, expected)


@pytest.mark.parametrize(("size", "num_rows"), [((96, 96), 96), ((32, 64), 48), ((64, 64), 96)])
def test_comparison_has_a_column_per_condition(size: tuple[int, int], num_rows: int) -> None:
    """Each column: the samples of the reference above those of the tuned model, unsqueezed."""
    reference, tuned = pictures(6, size), torch.zeros(6, 3, *size, dtype=torch.uint8)
    labels = [label for label in ("a circle", "a very long prompt " * 9, "") for _ in range(2)]
    image = comparison(reference.clamp(min=99), tuned, labels, [0, 2, 4, 2], "")
    one = comparison(reference[:2], tuned[:2], labels[:2], [0, 2], "")
    assert image.width - one.width >= 2 * 96 and image.height == one.height
    gray = torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8)
    dark = gray.view(image.height, image.width) < 30
    upper, lower = dark[: image.height // 2], dark[image.height // 2 :]
    # The two rows of three samples, 96 pixels wide each, that are dark; labels hardly count.
    full = lower.sum(dim=1) >= 3 * 96
    assert full.sum() == 2 * num_rows
    assert not (upper.sum(dim=1) >= 96).any()


def test_comparison_of_a_single_sample() -> None:
    image = comparison(pictures(1), pictures(1), ["a"], [0, 1], "one sample")
    assert image.width > 96 and image.height > 2 * 96


@pytest.mark.parametrize("between", [0.0, 1.0])
def test_samples_of_a_row_depend_on_each_other(between: float) -> None:
    """Errors are those over fresh rows, as the paired test of `compare` has them."""
    generator = torch.Generator().manual_seed(0)
    rows, each, sets = 24, 4, 600
    places = torch.arange(rows).repeat_interleave(each)

    def drawn() -> tuple[dict[str, float], float]:
        shift = between * torch.randn(rows, 1, generator=generator, dtype=torch.float64)
        gains = shift + 0.5 * torch.randn(rows, each, generator=generator, dtype=torch.float64)
        reference = torch.randn(rows * each, generator=generator, dtype=torch.float64)
        found = paired_moments(reference + gains.flatten(), reference, places)
        _, sem, count, _ = paired_test(gains.mean(dim=1).numpy())
        assert count == rows and found["sem"] == pytest.approx(sem)
        arms = reference + gains.flatten(), reference, reference + 1
        return found, kept_share(*arms, places)["sem"]

    found = [drawn() for _ in range(sets)]
    true = torch.tensor([gain["mean"] for gain, _ in found]).std().item()
    error = torch.tensor([gain["sem"] for gain, _ in found]).square().mean().sqrt().item()
    assert error == pytest.approx(true, rel=0.1)
    beyond = sum(abs(gain["mean"]) > 3 * gain["sem"] for gain, _ in found) / sets
    assert beyond < 0.02
    assert [kept for _, kept in found] == pytest.approx([gain["sem"] for gain, _ in found])


def test_one_row_alone_and_rows_of_which_some_do_not_count() -> None:
    values = torch.tensor([1.0, 3.0, NAN, 7.0], dtype=torch.float64)
    alone = moments(values, torch.zeros(4).long())
    assert alone == moments(values) and alone["sem"] == pytest.approx(28**0.5 / 3)
    apart = moments(values, torch.tensor([5, 5, 2, 2]))
    # 2 / (2 - 1) times the rows' squared sums of what lies off the mean, over 3 squared.
    off = 11 / 3
    assert apart["sem"] == pytest.approx((2 * ((4 - 2 * off) ** 2 + (7 - off) ** 2)) ** 0.5 / 3)
