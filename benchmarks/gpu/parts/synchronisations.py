"""Which lines of a round make the processor wait for the device."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_stack
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.models import pipeline_of
from benchmarks.gpu.tuning import fit
from domains.text_to_image.rewards import Brightness
from lit_rlft.algorithms.ddpo import DDPO
from lit_rlft.core.sampling import Sampler
from lit_rlft.loop.reference import LoRA

__all__ = ["measure"]

ROOT = Path(__file__).parents[3]
_OURS = ("lit_rlft", "domains")
_WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


def measure(bench: Bench) -> None:
    """Run two rounds of DDPO on Stable Diffusion 1.5 and count them in the second.

    On a GPU by `torch.cuda.set_sync_debug_mode`, on a processor by the operations that would wait:
    a number read from a tensor, places of what is not zero. The optimiser's counters of steps are
    left out there: they stay on the processor.
    """
    bench.case({"what": "DDPO"}, lambda: _round(bench))
    (whole,) = bench.rows
    lines = whole.pop("lines", {})
    bench.rows += [{"what": "line", "line": line, "number": n} for line, n in lines.items()]


def _round(bench: Bench) -> Row:
    prompts, steps = bench.pick((4, 5), (1, 2))
    tuner = DDPO(
        pipeline_of(bench, "sd", guidance_scale=5.0, decode_batch_size=4),
        Brightness(),
        num_candidates=2,
        sampler=Sampler(steps, 1.0),
        lora=LoRA(8, 8),
        microbatch_size=4,
        sampling_batch_size=8,
    )
    lines: Counter[str] = Counter()
    step = tuner.training_step

    def counted(*given: Any) -> None:
        lines.clear()
        with (_by_warnings if bench.cuda else _by_operations)(lines):
            step(*given)

    tuner.training_step = counted  # type: ignore[assignment, method-assign]
    fit(bench, tuner, [], 2, prompts)
    microbatches = -(-prompts * 2 * steps // 4)
    work = {"steps": steps, "microbatches": microbatches, "updates": 1}
    return {"number": lines.total(), **work, "lines": dict(lines.most_common(20))}


@contextmanager
def _by_warnings(lines: Counter[str]) -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "synchronizing" in str(warning.message):
            lines[_shown(warning.filename, warning.lineno)] += 1


@contextmanager
def _by_operations(lines: Counter[str]) -> Iterator[None]:
    class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func in _WAITING:
                stack = extract_stack()
                own = [f for f in stack if _own(f.filename)]
                if own and not any("torch/optim/" in f.filename for f in stack):
                    lines[_shown(own[-1].filename, own[-1].lineno)] += 1
            return func(*args, **(kwargs or {}))

    with Reads():  # type: ignore[no-untyped-call]
        yield


def _own(path: str) -> bool:
    inside = Path(path).is_relative_to(ROOT)
    return inside and Path(path).relative_to(ROOT).parts[0] in _OURS


def _shown(path: str, number: int | None) -> str:
    """Return a line's place, in the project or below where packages are."""
    file = Path(path)
    if file.is_relative_to(ROOT) and "site-packages" not in file.parts:
        return f"{file.relative_to(ROOT)}:{number}"
    parts = file.parts
    start = parts.index("site-packages") + 1 if "site-packages" in parts else -2
    return f"{'/'.join(parts[start:])}:{number}"
