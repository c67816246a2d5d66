"""The documentation's table of schedulers and options.

Write it anew with `python -m tests.kit.scheduler_table`.
"""

import inspect
from pathlib import Path

import diffusers

from lit_rlft.kit.schedulers import FAMILIES, REFUSED, RULES

PAGE = Path(__file__).parents[2] / "docs/domains/schedulers.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
TABLE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")

SOLVER = (
    "algorithm_type",
    "corrector_order",
    "disable_corrector",
    "euler_at_final",
    "lower_order_final",
    "predict_x0",
    "predictor_order",
    "skip_prk_steps",
    "solver_order",
    "solver_p",
    "solver_type",
    "tau_func",
)
"""Options of a class's own solver, which our steps take the place of."""

HONOURED = (
    "beta_end",
    "beta_schedule",
    "beta_start",
    "clip_sample",
    "clip_sample_range",
    "dynamic_thresholding_ratio",
    "final_sigmas_type",
    "lambda_min_clipped",
    "num_train_timesteps",
    "prediction_type",
    "rescale_betas_zero_snr",
    "sample_max_value",
    "set_alpha_to_one",
    "shift",
    "shift_terminal",
    "sigma_max",
    "sigma_min",
    "steps_offset",
    "thresholding",
    "timestep_spacing",
    "trained_betas",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_karras_sigmas",
    "use_lu_lambdas",
)
"""Options whose values are followed, in the classes that use them."""

UNUSED = (
    "base_image_seq_len",
    "base_shift",
    "flow_shift",
    "max_image_seq_len",
    "max_shift",
    "time_shift_type",
)
"""Options that matter only beside one that is refused."""


def options(name: str) -> list[str]:
    """Return the options of a class of diffusers."""
    own = inspect.signature(getattr(diffusers, name).__init__).parameters
    return [key for key in own if key not in ("self", "args", "kwargs")]


def decided(name: str, option: str) -> str:
    """Return "refused", "honoured", "own solver" or "unused" for an option of a class."""
    if any(name in rule.only for rule in RULES.get(option, ())):
        return "refused"
    if option in SOLVER:
        return "own solver"
    # Only flow sigmas are shifted and stretched, and those are refused beside a table.
    if option in UNUSED or (option == "shift_terminal" and FAMILIES[name].grid != "flow"):
        return "unused"
    if option in HONOURED:
        return "honoured"
    return "unused" if option in RULES else "undecided"


def markdown() -> str:
    """Return the tables."""
    lines = ["| class | our steps are its own at eta | starts at | ends at |", "|---|---|---|---|"]
    for name, family in FAMILIES.items():
        exact = family.exact or "none: DDIM on its grid"
        lines.append(f"| `{name}` | {exact} | {family.start} | {family.end} |")
    lines += ["", "| class | honoured | refused | without effect here |", "|---|---|---|---|"]
    for name in FAMILIES:
        parts: dict[str, list[str]] = {}
        for option in options(name):
            if option not in TABLE:
                parts.setdefault(decided(name, option), []).append(option)
        refused = [
            f"`{option}`: {rule.values}"
            for option in parts.get("refused", ())
            for rule in RULES[option]
            if name in rule.only
        ]
        unused = sorted([*parts.get("own solver", ()), *parts.get("unused", ())])
        cells = (
            ", ".join(f"`{option}`" for option in sorted(parts.get("honoured", ()))),
            "; ".join(refused),
            ", ".join(f"`{option}`" for option in unused),
        )
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += ["", "| refused class | because it |", "|---|---|"]
    lines += [f"| `{name}` | {reason} |" for name, reason in sorted(REFUSED.items())]
    return "\n".join(lines)


def written(page: str) -> str:
    """Return a page with its tables replaced."""
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    return f"{head}{BEGIN}\n\n{markdown()}\n\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
