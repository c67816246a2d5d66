import pytest
import torch
from torch import Tensor

from lit_rlft.core.checks import UsageError
from lit_rlft.core.fixed_point import FixedPoint
from lit_rlft.core.state import State, tensor_of

MATRIX = torch.tensor([[1.6, 0.4, 0.0], [-0.3, -1.2, 0.5], [0.2, 0.1, 2.5]], dtype=torch.float64)
OFFSET = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def cosine(u: State, rows: Tensor) -> Tensor:
    return tensor_of(u).cos()


def expanding(u: State, rows: Tensor) -> Tensor:
    return tensor_of(u) @ MATRIX.T + OFFSET * (1 + rows.unsqueeze(1))


def test_iterates_are_those_by_hand() -> None:
    u = start = torch.tensor([[0.1], [0.9]], dtype=torch.float64)
    for k in range(1, 6):
        solution = FixedPoint(0.0, k, memory=0).solve(cosine, start)
        previous, u = u, u.cos()
        assert torch.equal(tensor_of(solution.state), u)
        assert torch.equal(solution.residuals, (u - previous).abs()[:, 0])
        assert solution.iterations.tolist() == [k, k]


def test_each_sample_stops_by_itself() -> None:
    """The fixed point of the cosine is Dottie's number."""
    start = torch.tensor([[0.739085], [0.0]], dtype=torch.float64)
    seen: list[list[int]] = []

    def recorded(u: State, rows: Tensor) -> Tensor:
        seen.append(rows.tolist())
        return cosine(u, rows)

    solution = FixedPoint(1e-5, 200, memory=0).solve(recorded, start)
    assert seen[:2] == [[0, 1], [1]] and all(rows == [1] for rows in seen[1:])
    # |u_k - u*| shrinks by sin(u*) = 0.674 a time: 1e-5 takes about log(1e-5) / log(0.674) = 29.
    assert solution.iterations[0] == 1 and 25 < solution.iterations[1] < 35
    assert (solution.residuals <= 1e-5).all()
    torch.testing.assert_close(
        solution.state, torch.full((2, 1), 0.7390851332151607).double(), rtol=0, atol=2.1e-5
    )


def test_acceleration_solves_linear_equations_that_do_not_contract() -> None:
    """With a memory of d it is GMRES, which ends after d + 1 evaluations."""
    rows = torch.arange(2, dtype=torch.float64).unsqueeze(1)
    exact = torch.linalg.solve(torch.eye(3).double() - MATRIX, (OFFSET * (1 + rows)).T).T
    start = torch.zeros(2, 3, dtype=torch.float64)
    solution = FixedPoint(1e-6, 8, memory=3).solve(expanding, start)
    torch.testing.assert_close(solution.state, exact, rtol=0, atol=1e-5)
    assert solution.iterations.max() <= 5
    plain = FixedPoint(1e-6, 8, memory=0).solve(expanding, start)
    assert (plain.residuals > 1).all() and plain.iterations.tolist() == [8, 8]


def test_the_best_iterate_is_kept() -> None:
    start = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    residuals = []
    u = start
    for _ in range(6):
        g = expanding(u, torch.zeros(1))
        residuals.append(float((g - u).abs().max()))
        u = g
    solution = FixedPoint(0.0, 6, memory=0).solve(expanding, start)
    assert float(solution.residuals) == min(residuals) == residuals[0]
    assert torch.equal(tensor_of(solution.state), expanding(start, torch.zeros(1)))


@pytest.mark.parametrize("max_iterations", [1, 2, 3, 4, 8])
def test_with_a_memory_the_residual_is_that_of_the_state(max_iterations: int) -> None:
    """Also where g expands, and g(u) is farther from a fixed point than u."""
    start = torch.zeros(2, 3, dtype=torch.float64)
    solution = FixedPoint(1e-6, max_iterations, memory=3).solve(expanding, start)
    state = tensor_of(solution.state)
    missed = (expanding(state, torch.arange(2)) - state).abs().amax(dim=1)
    torch.testing.assert_close(missed, solution.residuals, rtol=0, atol=1e-14)


def test_overflow_of_one_sample_leaves_the_others_alone() -> None:
    def broken(u: State, rows: Tensor) -> Tensor:
        return cosine(u, rows).where(rows.unsqueeze(1) != 1, torch.nan)

    start = torch.rand(3, 2, dtype=torch.float64)
    solution = FixedPoint().solve(broken, start)
    assert solution.residuals[1] == torch.inf and solution.iterations[1] == 1
    alone = FixedPoint().solve(cosine, start[[0, 2]])
    torch.testing.assert_close(tensor_of(solution.state)[[0, 2]], tensor_of(alone.state))


def test_fields_of_a_state_are_solved_together() -> None:
    def swapped(u: State, rows: Tensor) -> State:
        assert isinstance(u, dict)
        return {"a": u["b"].flatten(1).cos(), "b": u["a"].sin().reshape(-1, 2, 1)}

    start = {"a": torch.rand(3, 2).double(), "b": torch.rand(3, 2, 1).double()}
    state = FixedPoint(1e-10).solve(swapped, start).state
    assert isinstance(state, dict) and state["b"].shape == (3, 2, 1)
    # a = cos(sin(a)) = 0.768169...
    torch.testing.assert_close(state["a"], torch.full((3, 2), 0.7681691567).double())


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"tolerance": -1.0}, "tolerance"),
        ({"max_iterations": 0}, "max_iter"),
        ({"memory": -1}, "m"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, name: str) -> None:
    with pytest.raises(UsageError, match=rf"FixedPoint: {name}"):
        FixedPoint(**settings)
