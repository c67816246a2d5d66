"""What a scheduler of diffusers means here is what diffusers does with it."""

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.trajectory import Trajectories, law_of, walk_with_log_probs
from lit_rlft.kit.flow_schedulers import flow_process
from lit_rlft.kit.saved_grids import SavedFlow, plain_flow
from lit_rlft.kit.schedulers import FAMILIES, REFUSED, RULES, saved_process
from lit_rlft.loop.base_settings import check_sampler
from lit_rlft.loop.route import Leg, Route
from tests.kit.scheduler_loops import make, network, noise, ours, theirs, timesteps
from tests.kit.scheduler_table import HONOURED, PAGE, SOLVER, UNUSED, decided, written

EVERY = (*range(1, 8), 20, 50, 999, 1000)
SPACINGS = ("leading", "trailing", "linspace")
EXACT = [name for name, family in FAMILIES.items() if family.exact and family.grid != "flow"]
SOLVERS = [name for name, family in FAMILIES.items() if not family.exact]
FLOW = "FlowMatchEulerDiscreteScheduler"
REPEATS = ("Parallel", "KDPM2")
"""In names of classes that do what others do, DDIM, DDPM and Heun; KDPM2's grids take long."""
ETAS = {"0 and 1": (0.0, 1.0), "0": (0.0,), "1": (1.0,)}


def parameters(name: str) -> dict[str, Any]:
    own = inspect.signature(getattr(diffusers, name).__init__).parameters
    return {key: p.default for key, p in own.items() if key not in ("self", "args", "kwargs")}


def slow_repeats(names: list[str], options: Any = None) -> list[Any]:
    """Return parameters of tests, those of classes that repeat others as slow ones."""
    return [
        pytest.param(
            *((name,) if options is None else (name, own)),
            marks=[pytest.mark.slow] if any(word in name for word in REPEATS) else [],
        )
        for name in names
        for own in ([None] if options is None else options(name))
    ]


def visited(scheduler: Any, num_steps: int) -> Tensor:
    """Return the timesteps of a scheduler's own grid, each once, by its own set_timesteps."""
    scheduler.set_timesteps(num_steps)
    if type(scheduler).__name__ == "PNDMScheduler":  # its second timestep comes twice
        return torch.unique_consecutive(scheduler.timesteps)
    return scheduler.timesteps[:: scheduler.order]


def assert_sampled_alike(scheduler: Any, num_steps: int) -> None:
    name = type(scheduler).__name__
    check_sampler(Sampler(num_steps), saved_process(scheduler))
    scheduler.set_timesteps(num_steps)
    for eta in ETAS[FAMILIES[name].exact]:
        step = {"eta": eta} if FAMILIES[name].grid == "strides" else {}
        expected = theirs(scheduler, num_steps, **step)
        mine = ours(scheduler, num_steps, eta)
        if expected.isnan().any():  # diffusers' root of a variance that rounding made negative
            assert eta == 1 and mine.isfinite().all()
            continue
        difference = (mine - expected).abs().max()
        # Euler's steps are single precision's, on states of the size of its largest sigma.
        largest = float(scheduler.sigmas.max()) if FAMILIES[name].scaled else 0
        scale = max(1, float(expected.abs().max()), largest / 50)
        assert difference < 1e-5 * scale, (num_steps, eta)


def test_every_class_is_decided() -> None:
    """Sampled or refused by name, and every option of those that are sampled has its decision."""
    names = {n for n in dir(diffusers) if n.endswith("Scheduler")}
    assert names - FAMILIES.keys() - REFUSED.keys() == set()
    assert not FAMILIES.keys() & REFUSED.keys()
    decided = {*HONOURED, *SOLVER, *UNUSED, *RULES}
    for name in FAMILIES:
        assert parameters(name).keys() - decided == set(), name


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", slow_repeats([*EXACT, *SOLVERS]))
def test_timesteps_are_those_of_set_timesteps(name: str, spacing: str) -> None:
    has_spacing = "timestep_spacing" in parameters(name)
    scheduler = make(name, **({"timestep_spacing": spacing} if has_spacing else {}))
    process = saved_process(scheduler)
    for num_steps in EVERY[:8] if "KDPM2" in name else EVERY:  # it takes a second for 1,000
        try:
            told = timesteps(process, process.times(num_steps)[:-1])
        except UsageError:
            assert spacing == "linspace" and num_steps == 1  # one step that starts at timestep 0
            continue
        expected = visited(scheduler, num_steps)
        assert torch.equal(told, expected.to(told.dtype).clamp(max=999)), num_steps


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", slow_repeats(EXACT))
def test_whole_sampling_is_diffusers(name: str, spacing: str) -> None:
    scheduler = make(name, timestep_spacing=spacing, steps_offset=int(spacing == "leading"))
    first = 2 if spacing == "linspace" and FAMILIES[name].scaled else 1
    for num_steps in (first, 3, 7, 20, 30):
        assert_sampled_alike(scheduler, num_steps)


def test_trailing_has_no_timestep_too_many() -> None:
    """Where rounding gives numpy's arange one number more, diffusers wraps round its table."""
    scheduler = make("DDIMScheduler", timestep_spacing="trailing")
    schedule, refused = saved_process(scheduler).schedule, set()
    for num_steps in (*range(1, 250), 999, 1000):
        scheduler.set_timesteps(num_steps)
        if len(scheduler.timesteps) != num_steps:
            assert scheduler.timesteps[-1] == -1
            refused.add(num_steps)
            with pytest.raises(UsageError, match=f"num_steps {num_steps} does not work"):
                schedule.times(num_steps)
        else:
            told = schedule.timestep(schedule.times(num_steps)[:-1])
            assert torch.equal(told, scheduler.timesteps), num_steps
    assert refused == {61, 103, 121, 122, 201, 206, 217, 223, 227, 233, 242, 244}


def test_a_grid_beyond_the_table_is_refused() -> None:
    scheduler = make("DDIMScheduler", steps_offset=1)
    with pytest.raises(UsageError, match="steps_offset 1 leads beyond"):
        saved_process(scheduler).times(1000)


SIGMAS = [{f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta")]
COMMON: list[dict[str, Any]] = [
    {"prediction_type": "v_prediction"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    {"trained_betas": np.linspace(1e-4, 0.02, 1000).tolist()},
    {"num_train_timesteps": 100},
    {"steps_offset": 1, "timestep_spacing": "leading"},
]
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
BOUNDS: list[dict[str, Any]] = [
    {"clip_sample": True},
    {"clip_sample": True, "clip_sample_range": 0.3},
    {"clip_sample": True, "prediction_type": "sample"},
    {"clip_sample": True, "prediction_type": "v_prediction"},
    {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
    {"thresholding": True, "clip_sample": True},
    {"prediction_type": "sample"},
    ZERO_SNR | {"timestep_spacing": "trailing"},
    {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True},
]
DDIM_OPTIONS = [
    *BOUNDS,
    {"set_alpha_to_one": False},
    {"set_alpha_to_one": False, "timestep_spacing": "trailing"},
    {"set_alpha_to_one": False, "timestep_spacing": "linspace"},
]
DDPM_OPTIONS = [
    *BOUNDS,
    *[{"variance_type": kind} for kind in ("fixed_small", "fixed_small_log", "fixed_large")],
    {"variance_type": "fixed_large", "timestep_spacing": "trailing"},
    {"variance_type": "fixed_large", "clip_sample": True},
    {"beta_schedule": "sigmoid", "beta_start": 1e-4, "beta_end": 0.02},
]
EULER_OPTIONS: list[dict[str, Any]] = [
    *[kind | {"timestep_spacing": spacing} for kind in SIGMAS for spacing in SPACINGS],
    {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 10.0},
    {"timestep_type": "continuous"},
    {"prediction_type": "sample"},
    ZERO_SNR | {"timestep_spacing": "trailing"},
    {"rescale_betas_zero_snr": True, "timestep_spacing": "leading"},
]
EXACT_OPTIONS = {
    "DDIMScheduler": DDIM_OPTIONS,
    "DDIMParallelScheduler": DDIM_OPTIONS,
    "DDPMScheduler": DDPM_OPTIONS,
    "DDPMParallelScheduler": DDPM_OPTIONS,
    "EulerDiscreteScheduler": EULER_OPTIONS,
    "EulerAncestralDiscreteScheduler": [ZERO_SNR | {"timestep_spacing": "trailing"}],
}


@pytest.mark.parametrize(
    ("name", "options"),
    slow_repeats(EXACT, lambda name: (*COMMON, *EXACT_OPTIONS[name])),
    ids=str,
)
def test_options_are_honoured(name: str, options: dict[str, Any]) -> None:
    scheduler = make(name, **options)
    for num_steps in (4, 7):
        assert_sampled_alike(scheduler, num_steps)


def test_all_walks_lead_where_the_steps_lead() -> None:
    """A sampler, a route in two legs and recorded trajectories visit DDIM's own states."""
    scheduler = make("DDIMScheduler", timestep_spacing="linspace")
    process, expected = saved_process(scheduler), theirs(scheduler, 7)
    condition = Condition([{}], {}, torch.zeros(2, dtype=torch.int64))

    def denoiser(x: Any, t: Tensor, condition: Condition) -> Tensor:
        return network(x, timesteps(process, t))

    legs = [Leg(denoiser, 3, tuned=False), Leg(denoiser, 4, tuned=True)]
    route = Route(process, lambda c: process.prior(noise()), legs, 0.0)
    *_, (_, x) = route.walk(condition, None, noise())
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)
    times, ends = process.times(7), process.ends(7)
    assert (ends[:-1] != times[1:-1]).any() and ends[-1] == times[-1]
    steps = process.steps(times, ends, 1.0, noise())
    kept = Trajectories(2, times, range(7), steps.coefficients)
    torch.manual_seed(1)
    walk = walk_with_log_probs(denoiser, process, noise(), condition, times, 1.0, ends=ends)
    x = kept.record(0, walk)
    torch.testing.assert_close(x, theirs(scheduler, 7, eta=1.0), rtol=0, atol=1e-6)
    pairs: Any = kept.pairs(torch.arange(7).repeat(2), torch.arange(2).repeat_interleave(7))
    given = pairs["x_t"], pairs["t"], pairs["coefficients"]
    again = law_of(denoiser, process, *given, condition.repeat(7))
    torch.testing.assert_close(again.log_prob(pairs["x_s"], "mean"), pairs["log_prob"])


SOLVER_OPTIONS: list[dict[str, Any]] = [
    *SIGMAS,
    *COMMON,
    ZERO_SNR,
    {"final_sigmas_type": "sigma_min"},
    {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True},
    {"use_lu_lambdas": True},
    {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"},
    {"set_alpha_to_one": True},
    {"sigma_min": 0.05, "sigma_max": 10.0, "use_exponential_sigmas": True},
]


@pytest.mark.parametrize("options", SOLVER_OPTIONS, ids=str)
@pytest.mark.parametrize("name", slow_repeats(SOLVERS))
def test_other_solvers_give_the_grid(name: str, options: dict[str, Any]) -> None:
    """Levels of the table at the class's own timesteps, whatever lays them."""
    if options.keys() - parameters(name).keys():
        pytest.skip("the class has no such option")
    scheduler = make(name, **options)
    process = saved_process(scheduler)
    for num_steps in (2, 6):
        check_sampler(Sampler(num_steps), process)
        times = process.times(num_steps)
        expected = visited(scheduler, num_steps)
        told = timesteps(process, times[:-1])
        assert torch.equal(told, expected.to(told.dtype))
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is not None:
            ends_clean = float(sigmas[-1]) == 0
            assert (float(times[-1]) == 0) == ends_clean
        if FAMILIES[name].scaled:
            levels = (1 / process.schedule.alpha(times[:-1]) ** 2 - 1).sqrt()
            own = torch.unique_consecutive(sigmas)[:-1]
            # KDPM2 rounds karras' timesteps, and we take the table's levels there.
            rounded = "KDPM2" in name and "use_karras_sigmas" in options
            torch.testing.assert_close(levels, own.double(), rtol=5e-3 if rounded else 2e-6, atol=0)


@pytest.mark.parametrize(
    "scheduler",
    [
        make("DPMSolverMultistepScheduler", solver_order=1),
        make("DPMSolverMultistepScheduler", solver_order=1, timestep_spacing="trailing"),
        make("DPMSolverMultistepScheduler", solver_order=1, thresholding=True),
        make("DPMSolverMultistepScheduler", solver_order=1, **ZERO_SNR),
        make("DPMSolverSinglestepScheduler", solver_order=1, lower_order_final=True),
        make("UniPCMultistepScheduler", solver_order=1, disable_corrector=list(range(9))),
        make("DEISMultistepScheduler", solver_order=1),
    ],
    ids=lambda s: type(s).__name__,
)
def test_other_solvers_of_first_order_are_ours(scheduler: Any) -> None:
    for num_steps in (4, 7):
        expected = theirs(scheduler, num_steps)
        assert (ours(scheduler, num_steps) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("option", ["clip_sample", "thresholding"])
@pytest.mark.parametrize("name", SOLVERS)
def test_other_solvers_bound_their_samples(name: str, option: str) -> None:
    if option not in parameters(name):
        pytest.skip("the class has no such option")
    plain, bounded = (ours(make(name, **{option: value}), 6) for value in (False, True))
    clean = float(saved_process(make(name)).times(6)[-1]) == 0
    assert plain.abs().max() > 1.1 and bounded.abs().max() <= (1 if clean else 1.1)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_one_step_of_pndm_is_ours(spacing: str) -> None:
    scheduler = make("PNDMScheduler", timestep_spacing=spacing)
    assert (ours(scheduler, 1) - theirs(scheduler, 1)).abs().max() < 1e-5


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "interpolation_type"),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, "final_sigmas_type"),
    (
        "EulerDiscreteScheduler",
        {"timestep_type": "continuous", "prediction_type": "v_prediction"},
        "timestep_type",
    ),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "sigma_max": 80.0}, "sigma_max"),
    ("EulerDiscreteScheduler", {"use_beta_sigmas": True, "sigma_min": 1e-3}, "sigma_min"),
    ("UniPCMultistepScheduler", {"use_beta_sigmas": True, "sigma_max": 80.0}, "sigma_max"),
    ("EulerAncestralDiscreteScheduler", {"prediction_type": "sample"}, "prediction_type"),
    ("PNDMScheduler", {"prediction_type": "sample"}, "prediction_type"),
    ("DDIMScheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
    ("DDPMScheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
    *[
        ("DDPMScheduler", {"variance_type": kind}, "variance_type")
        for kind in ("learned", "learned_range", "fixed_large_log")
    ],
    ("DPMSolverMultistepScheduler", {"variance_type": "learned_range"}, "variance_type"),
    *[
        (name, {"use_flow_sigmas": True}, "use_flow_sigmas")
        for name in SOLVERS
        if "use_flow_sigmas" in parameters(name)
    ],
    *[
        (name, {"use_dynamic_shifting": True}, "use_dynamic_shifting")
        for name in [*SOLVERS, FLOW]
        if "use_dynamic_shifting" in parameters(name)
    ],
    (FLOW, {"invert_sigmas": True}, "invert_sigmas"),
    (FLOW, {"stochastic_sampling": True}, "stochastic_sampling"),
]


@pytest.mark.parametrize(("name", "options", "named"), REFUSALS, ids=str)
def test_options_are_refused_by_name(name: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=f"^pipeline.*{name} with .*{named}.*; set ") as caught:
        saved_process(make(name, **options), flows=True)
    assert "scheduler_config.json" in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"clip_sample": True, "clip_sample_range": -1.0}, "clip_sample_range .* be positive"),
        ({"thresholding": True, "sample_max_value": np.nan}, "sample_max_value .* be positive"),
        (
            {"thresholding": True, "dynamic_thresholding_ratio": 1.5},
            r"dynamic_thresholding_ratio .* must be in \[0, 1\], got 1.5",
        ),
    ],
    ids=str,
)
def test_bounds_that_mean_nothing_are_refused_by_name(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(UsageError, match=f"^pipeline.init_args.pretrained: {rule}"):
        saved_process(make("DDIMScheduler", **options))


@pytest.mark.parametrize("name", REFUSED)
def test_classes_are_refused_by_name(name: str) -> None:
    scheduler = type(name, (), {"config": {}})()
    for flows in (False, True):
        with pytest.raises(UsageError, match=f"^pipeline.*{name} .*; save the folder") as caught:
            saved_process(scheduler, flows=flows)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", [name for name in EXACT if "Parallel" not in name])
def test_left_over_keys_of_other_classes_have_no_effect(name: str) -> None:
    """diffusers keeps unknown keys in `config`; what the class does not use changes nothing."""
    foreign = {
        "set_alpha_to_one": False,
        "use_karras_sigmas": True,
        "use_flow_sigmas": True,
        "clip_sample": True,
        "thresholding": True,
        "final_sigmas_type": "sigma_min",
        "variance_type": "learned",
        "interpolation_type": "log_linear",
        "stochastic_sampling": True,
        "use_dynamic_shifting": True,
        "rescale_betas_zero_snr": False,
    }
    plain = make(name, timestep_spacing="linspace")
    leftovers = {k: v for k, v in foreign.items() if k not in parameters(name)}
    scheduler = type(plain).from_config({**plain.config, **leftovers})
    assert scheduler.config["use_flow_sigmas"] is True
    assert_sampled_alike(scheduler, 5)
    eta = ETAS[FAMILIES[name].exact][0]
    assert torch.equal(ours(scheduler, 5, eta), ours(plain, 5, eta))


def test_the_cosine_table_is_sampled_with_epsilon() -> None:
    """Its last level has 4.9e-5 of signal, which single precision survives."""
    scheduler = make("DDPMScheduler", beta_schedule="squaredcos_cap_v2", clip_sample=True)
    x = ours(scheduler, 50, 1.0)
    assert x.isfinite().all() and (x - theirs(scheduler, 50)).abs().max() < 1e-5


def test_clipped_steps_have_no_inverse() -> None:
    scheduler = make("DDIMScheduler", clip_sample=True)
    process = saved_process(scheduler)
    assert not process.invertible and "clip_sample" in process.one_way


FLOW_OPTIONS = [*SIGMAS, {"shift_terminal": 0.1}, {"shift_terminal": 0.02, "shift": 3.0}]


@pytest.mark.parametrize("options", FLOW_OPTIONS, ids=str)
def test_options_of_flows_are_honoured(options: dict[str, Any]) -> None:
    scheduler = make(FLOW, **options)
    for num_steps in (2, 7):
        check_sampler(Sampler(num_steps), saved_process(scheduler, flows=True))
        assert (ours(scheduler, num_steps) - theirs(scheduler, num_steps)).abs().max() < 1e-5


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 6.0])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 20, 50])
def test_an_exported_flow_has_the_grid_that_was_sampled(shift: float, num_steps: int) -> None:
    scheduler = make(FLOW, shift=shift)
    schedule = saved_process(scheduler, flows=True).schedule
    assert isinstance(schedule, SavedFlow)
    assert plain_flow(scheduler, schedule) is scheduler  # nothing is known yet
    times = schedule.times(num_steps)
    exported = plain_flow(scheduler, schedule)
    exported.set_timesteps(num_steps)
    torch.testing.assert_close(exported.sigmas.double(), times, rtol=0, atol=2e-7)
    again = saved_process(exported, flows=True).schedule
    torch.testing.assert_close(again.times(num_steps), times, rtol=0, atol=2e-7)
    for other in (3, 8):  # read again, other numbers of steps are diffusers' as well
        exported.set_timesteps(other)
        if num_steps > 1:
            assert torch.equal(again.times(other).float(), exported.sigmas)


@pytest.mark.parametrize(("pixels", "shift"), [(512, 1.878), (768, 2.332), (1024, 3.158)])
def test_the_shift_of_flux_at_usual_sizes(pixels: int, shift: float) -> None:
    """exp(mu) with mu = .5 + .65 (L - 256) / 3840 of L tokens of 16 x 16 pixels."""
    scheduler = make(FLOW, shift=3.0, use_dynamic_shifting=True)
    process = flow_process(scheduler, "FLUX.1", (pixels // 16) ** 2, own_grid=False)
    flow: Any = process.schedule
    assert flow.shift == pytest.approx(shift, abs=5e-4)
    t = torch.tensor([0.75], dtype=torch.float64)
    expected = shift * 0.75 / (1 + (shift - 1) * 0.75)
    assert float(flow.times(4)[1]) == pytest.approx(expected, abs=1e-4)
    assert float(flow.draw_times(1 - t)) == pytest.approx(expected, abs=1e-4)


def test_the_last_levels_of_stable_diffusion_3() -> None:
    """Its scheduler shifts the lowest level twice: 28 steps end at 0.1109, 0.0089, 0."""
    flow = flow_process(make(FLOW, shift=3.0), "Stable Diffusion 3", 1024, own_grid=True).schedule
    assert flow.times(28)[-3:].tolist() == pytest.approx([0.1109, 0.0089, 0], abs=5e-5)


def test_networks_of_flows_are_told_the_levels_of_their_scheduler() -> None:
    scheduler = make(FLOW, num_train_timesteps=500, shift_terminal=0.1)
    schedule = saved_process(scheduler, flows=True).schedule
    scheduler.set_timesteps(5)
    told: Any = schedule
    assert torch.equal(told.timestep(schedule.times(5)[:-1]), scheduler.timesteps)


def test_the_documentation_has_the_table() -> None:
    page = PAGE.read_text()
    for name in FAMILIES:
        assert all(decided(name, option) != "undecided" for option in parameters(name))
    assert page == written(page), "run python -m tests.kit.scheduler_table"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_sampler_that_stands_in_is_named_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_rlft.kit.schedulers.rank_zero_info", said.append)
    saved_process(make(name), flows=True)
    exact = FAMILIES[name].exact
    assert len(said) == (exact in ("", "1"))
    assert all(f"the model's {name}" in line and "DDIM" in line for line in said)
    assert all(("sampler.eta 1" in line) == (exact == "1") for line in said)
