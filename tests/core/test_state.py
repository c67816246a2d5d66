import pytest
import torch

from lit_rlft.core import state
from lit_rlft.core.state import State


def fields() -> dict[str, torch.Tensor]:
    return {"b": torch.arange(12.0).reshape(4, 3), "a": torch.arange(4)}


@pytest.mark.parametrize("x", [torch.arange(8.0).reshape(4, 2), fields()], ids=["tensor", "dict"])
def test_rows_are_selected_and_joined(x: State) -> None:
    assert state.batch_size(x) == 4
    rows = torch.tensor([2, 0])
    for leaf, picked in zip(state.leaves(x), state.leaves(state.index(x, rows)), strict=True):
        assert torch.equal(picked, leaf[[2, 0]])
    chunks = list(state.split(x, 3))
    assert [state.batch_size(chunk) for chunk in chunks] == [3, 1]
    for leaf, joined in zip(state.leaves(x), state.leaves(state.cat(chunks)), strict=True):
        assert torch.equal(joined, leaf)
    for leaf, copies in zip(state.leaves(x), state.leaves(state.repeat(x, 2)), strict=True):
        assert torch.equal(copies, leaf[[0, 0, 1, 1, 2, 2, 3, 3]])
    for leaf, moved in zip(state.leaves(x), state.leaves(state.to(x, "cpu")), strict=True):
        assert torch.equal(moved, leaf)


def test_fields_are_visited_in_sorted_order() -> None:
    assert list(state.tree_map(torch.clone, fields())) == ["a", "b"]
    assert state.leaves(fields())[0].dtype == torch.int64
    total = state.tree_map(torch.add, fields(), fields())
    assert isinstance(total, dict) and torch.equal(total["a"], 2 * torch.arange(4))


def test_detach_cuts_the_graph() -> None:
    x = {"a": torch.ones(2, requires_grad=True) * 2}
    cut = state.detach(x)
    assert x["a"].requires_grad and not state.leaves(cut)[0].requires_grad


def test_values_take_shape_and_dtype_of_a_floating_state() -> None:
    values = torch.tensor([0.5, 0.25], dtype=torch.float64)
    half = state.expand_as(values, torch.zeros(2, 3, 4, dtype=torch.float16))
    assert half.shape == (2, 1, 1) and half.dtype == torch.float16
    kept = state.expand_as(values, torch.zeros(2, 3, dtype=torch.int64))
    assert kept.shape == (2, 1) and kept.dtype == torch.float64


def test_the_wrong_kind_of_state_is_named() -> None:
    with pytest.raises(TypeError, match="'a', 'b'"):
        state.tensor_of(fields())
    with pytest.raises(TypeError, match="tensor state"):
        state.fields_of(torch.zeros(1))
