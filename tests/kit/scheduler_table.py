"""The documentation's table of schedulers and options.

Write it anew with `python -m tests.kit.scheduler_table`.
"""

import inspect
from pathlib import Path

import diffusers

from lit_rlft.kit.schedulers import FAMILIES, HONOURED, REFUSED, RULES, SOLVER, UNUSED

PAGE = Path(__file__).parents[2] / "docs/domains/schedulers.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
TABLE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


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
