"""Pictures of our sampler beside those of each family's own pipeline in diffusers.

Measure all and write the table of `docs/domains/families/index.md` anew with
`python -m tests.domains.text_to_image.families.agreement`.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FluxPipeline
from torch import Tensor

from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Sampler
from tests.domains.text_to_image.families.tiny import tiny

__all__ = ["CASES", "RUNS", "Case", "Run", "folder_of", "largest_difference"]

PAGE = Path(__file__).parents[4] / "docs/domains/families/index.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
PROMPTS = ["a red ring", "a blue square below"]
SEEDS = [3, 1]

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_LEADING = {**_BETAS, "steps_offset": 1, "timestep_spacing": "leading"}
_TRAILING = {**_BETAS, "steps_offset": 1, "timestep_spacing": "trailing"}
_DYNAMIC = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}


def _ddim(config: Mapping[str, Any], num_steps: int) -> Any:
    return diffusers.DDIMScheduler.from_config(config, clip_sample=False)


def _euler(config: Mapping[str, Any], num_steps: int) -> Any:
    return diffusers.EulerDiscreteScheduler.from_config(config)


def _first_order(name: str) -> Callable[[Mapping[str, Any], int], Any]:
    """Return a maker of a class's own solver at order 1, which is DDIM by another name."""

    def make(config: Mapping[str, Any], num_steps: int) -> Any:
        uncorrected = {"disable_corrector": list(range(num_steps))} if "UniPC" in name else {}
        return getattr(diffusers, name).from_config(config, solver_order=1, **uncorrected)

    return make


@dataclass(frozen=True)
class Case:
    """A family's model with a scheduler that folders of it come with.

    Attributes:
        model: A maker of `tiny`.
        scheduler: The scheduler's class.
        config: Its config.
        note: The config in words, for the table.
        eta: Of our sampler; at 1 both draw the same noise.
        stand_in: Makes the scheduler that ours is compared with, where the class is a solver that
            our sampler stands in for; None compares with the class itself.
        compared: What `stand_in` makes, in words.
        guidance: Of the runs with guidance.
        unit: Pixels; sizes are multiples of it.
    """

    model: str
    scheduler: str
    config: Mapping[str, Any] = field(hash=False)
    note: str
    eta: float = 0.0
    stand_in: Callable[[Mapping[str, Any], int], Any] | None = None
    compared: str = "itself"
    guidance: float = 3.5
    unit: int = 16

    def __str__(self) -> str:
        return f"{self.model}-{self.scheduler}-{self.note}-{self.eta:g}".replace(" ", "_")

    @property
    def runs(self) -> tuple["Run", ...]:
        """The runs that can be done: linspace has no grid of one step, klein no negative prompt."""
        without = self.config.get("timestep_spacing") == "linspace"
        runs = RUNS[:-1] if without else RUNS
        return tuple(r for r in runs if r.negative is None) if "klein" in self.model else runs


def _solvers(model: str, prediction: str = "epsilon") -> Iterator[Case]:
    """Iterate over the solvers whose place our steps take."""
    given = {**_LEADING, "prediction_type": prediction}
    tail = {"skip_prk_steps": True, "set_alpha_to_one": False}
    yield Case(
        model, "PNDMScheduler", given | tail, "leading", stand_in=_ddim, compared="DDIMScheduler"
    )
    for name in ("LMSDiscreteScheduler", "HeunDiscreteScheduler"):
        yield Case(
            model, name, given, "leading", stand_in=_euler, compared="EulerDiscreteScheduler"
        )
    for name, more, note in (
        ("DPMSolverMultistepScheduler", {}, "leading"),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "leading, karras"),
        ("UniPCMultistepScheduler", {}, "leading"),
        ("DEISMultistepScheduler", {}, "leading"),
    ):
        make = _first_order(name)
        yield Case(model, name, given | more, note, stand_in=make, compared="itself at order 1")


def _tables(model: str, prediction: str) -> Iterator[Case]:
    """Iterate over the schedulers with a table whose steps are ours."""
    leading, trailing = ({**c, "prediction_type": prediction} for c in (_LEADING, _TRAILING))
    last = {"set_alpha_to_one": False, "clip_sample": False}
    yield Case(model, "DDIMScheduler", leading | last, "leading, last level kept")
    yield Case(model, "DDIMScheduler", leading | last, "leading, last level kept", eta=1.0)
    yield Case(model, "DDIMScheduler", trailing | {"clip_sample": False}, "trailing")
    for spacing in ("leading", "trailing", "linspace"):
        config = {**leading, "timestep_spacing": spacing}
        yield Case(model, "EulerDiscreteScheduler", config, spacing)
    for config, note in ((leading, "leading"), (trailing, "trailing")):
        yield Case(model, "EulerAncestralDiscreteScheduler", config, note, eta=1.0)
    yield Case(model, "DDPMScheduler", leading | {"clip_sample": False}, "leading", eta=1.0)


def _zero_snr() -> Iterator[Case]:
    """Iterate over v-prediction with zero terminal signal-to-noise ratio."""
    config = {**_TRAILING, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    yield Case("sd", "DDIMScheduler", config | {"clip_sample": False}, "trailing, zero SNR, v")
    yield Case("sd", "EulerDiscreteScheduler", config, "trailing, zero SNR, v")


_FLOW = "FlowMatchEulerDiscreteScheduler"
_SOLVED = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


_MULTISTEP = "DPMSolverMultistepScheduler"


def _solved(model: str, name: str, unit: int = 16) -> Case:
    """Return the case of a flow that a solver was saved for."""
    given, make = {**_SOLVED, "flow_shift": 3.0}, _first_order(name)
    words = ("flow, shift 3", 0.0, make, "itself at order 1")
    return Case(model, name, given, *words, unit=unit)


def _sana() -> Iterator[Case]:
    """Iterate over Sana's own scheduler, and the solvers that its folders come with."""
    for shift in (3.0, 1.0):
        yield Case("sana", _FLOW, {"shift": shift}, f"shift {shift:g}", unit=32)
    yield Case("sana", _FLOW, {"shift": 3.0, "use_karras_sigmas": True}, "karras", unit=32)
    for name in (_MULTISTEP, "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"):
        yield _solved("sana", name, unit=32)


CASES: tuple[Case, ...] = (
    *_tables("sd", "epsilon"),
    *_solvers("sd"),
    *(Case(**vars(c) | {"note": f"{c.note}, v"}) for c in _tables("sd", "v_prediction")),
    *_zero_snr(),
    *_tables("sdxl", "epsilon"),
    *_solvers("sdxl"),
    Case("sdxl_turbo", "EulerAncestralDiscreteScheduler", _TRAILING, "trailing", eta=1.0),
    Case("sd3_first", _FLOW, {"shift": 3.0}, "shift 3"),
    Case("sd3", _FLOW, {"shift": 3.0}, "shift 3"),
    Case("sd3", _FLOW, {"shift": 1.0}, "shift 1"),
    Case("sd3", _FLOW, _DYNAMIC | {"shift": 1.0, "max_shift": 0.9}, "dynamic shift"),
    _solved("sd3", _MULTISTEP),
    Case("flux_dev", _FLOW, _DYNAMIC, "dynamic shift"),
    Case("flux_schnell", _FLOW, {"shift": 1.0}, "shift 1", guidance=0.0),
    Case("klein", _FLOW, _DYNAMIC, "FLUX.2's shift"),
    Case("klein_distilled", _FLOW, _DYNAMIC, "FLUX.2's shift", guidance=1.0),
    Case("zimage", _FLOW, {"shift": 3.0}, "shift 3"),
    Case("zimage", _FLOW, {"shift": 6.0}, "shift 6"),
    *_sana(),
)


@dataclass(frozen=True)
class Run:
    """One call of the sampler and of the pipeline.

    Attributes:
        size: Height and width in units of the case.
        num_steps: Steps.
        guided: Whether there is guidance.
        negative: The negative prompt of a guided run.
    """

    size: tuple[int, int]
    num_steps: int
    guided: bool
    negative: str | None = None


RUNS = (
    Run((2, 2), 4, False),
    Run((2, 3), 7, True),
    Run((4, 2), 4, True, "dull"),
    Run((3, 2), 1, False),
)
"""Guidance on and off, a negative prompt, pictures of four shapes, few steps and one."""


def folder_of(case: Case, models: Path) -> Path:
    """Write a folder as the hub has it: a tiny model with the case's scheduler; return it."""
    folder = models / case.model
    if not folder.exists():
        tiny(case.model).save_pretrained(folder)
    shutil.rmtree(folder / "scheduler")
    scheduler = getattr(diffusers, case.scheduler)(**case.config)
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", case.scheduler]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@torch.no_grad()
def largest_difference(case: Case, run: Run, models: Path) -> float:
    """Return the largest difference of two pictures' pixels, in [0, 1].

    Both samplers are given the same noise. The picture of diffusers has to be one: not of one
    colour.
    """
    own, given = _settings(case, run)
    height, width = (case.unit * sides for sides in run.size)
    folder = folder_of(case, models)
    pipeline = TextToImagePipeline(
        str(folder), height=height, width=width, negative_prompt=run.negative, **own
    )
    condition, noise = pipeline.encode({"prompt": PROMPTS}), generators(SEEDS)
    x_1 = pipeline.process.prior(pipeline.blank(condition)).sample(noise)
    sampler = Sampler(run.num_steps, case.eta)
    x_0 = sampler.sample(pipeline, pipeline.process, x_1, condition, noise)
    pictures = pipeline.decode(x_0, condition)

    plain: Any = diffusers.DiffusionPipeline.from_pretrained(folder)
    plain.set_progress_bar_config(disable=True)
    if case.stand_in is not None:
        plain.scheduler = case.stand_in(plain.scheduler.config, run.num_steps)
    expected = plain(
        prompt=list(PROMPTS),  # Z-Image writes into the list
        height=height,
        width=width,
        num_inference_steps=run.num_steps,
        output_type="pt",
        **_noise(plain, pipeline),
        **given,
    ).images
    assert float(expected.std()) > 0.02
    return float((pictures - expected).abs().max())


def _settings(case: Case, run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the guidance of our pipeline and the settings of diffusers' call."""
    guidance = case.guidance if run.guided or case.model.startswith("flux") else 1.0
    if case.model == "zimage" and not run.guided:
        guidance = 0.0
    own, given = {"guidance_scale": guidance}, {"guidance_scale": guidance}
    if case.model.startswith("flux") and run.negative is not None:
        own, given = ({**each, "true_cfg_scale": 2.5} for each in (own, given))
    if run.negative is not None:
        given["negative_prompt"] = [run.negative] * len(PROMPTS)
    if case.model == "flux_schnell":
        given["max_sequence_length"] = 256
    if case.model.startswith("sd") and not case.model.startswith("sd3"):
        given["eta"] = case.eta
    if case.model == "sana":
        given["use_resolution_binning"] = False
    return own, given


def _noise(plain: Any, pipeline: TextToImagePipeline) -> dict[str, Any]:
    """Return the initial latents, and the generators that go on with the noise of the steps."""
    noise = generators(SEEDS)
    shape = pipeline.blank(pipeline.encode({"prompt": PROMPTS})).shape[1:]
    z: Tensor = torch.stack([torch.randn(shape, generator=each) for each in noise])
    if isinstance(plain, FluxPipeline):
        z = FluxPipeline._pack_latents(z, *z.shape)
    return {"latents": z, "generator": noise}


def rows(models: Path) -> Iterator[str]:
    """Iterate over the rows of the documentation's table."""
    yield "| model | folder's scheduler | compared with | eta | largest difference |"
    yield "|---|---|---|---|---|"
    for case in CASES:
        worst = max(largest_difference(case, run, models) for run in case.runs)
        print(f"{case}: {worst:.1e}", file=sys.stderr)
        yield (
            f"| `{case.model}` | `{case.scheduler}`, {case.note} | {case.compared} | {case.eta:g} "
            f"| {worst:.0e} |"
        )


def main() -> None:
    """Measure and write."""
    with tempfile.TemporaryDirectory() as models:
        table = "\n".join(rows(Path(models)))
    page = PAGE.read_text()
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}")


if __name__ == "__main__":
    main()
