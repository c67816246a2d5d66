r"""A denoiser call with the LoRA merged into the weights beside one with the LoRA apart.

Method: one pipeline with a LoRA whose update is random, of a few percent of the weights. For each
batch size the same call is made with the adapter apart and merged, in turn; a turn's ratio is the
seconds apart over those merged, of this process alone (`time.process_time`, on a GPU wall time
after waiting for it). The table has the median ratio with quartiles. Printed before it are the
operations of a call, what merging and writing back takes, the copy that it keeps, and how far
predictions are from each other and from those without an adapter.

    python benchmarks/merged_lora.py --domain shapes --batch-sizes 1 4 16 64 --turns 9
    python benchmarks/merged_lora.py --pretrained stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --dtype bfloat16 --device cuda --batch-sizes 1 8 32
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from domains.layout.pipeline import LayoutPipeline
from domains.molecule.pipeline import MoleculePipeline
from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.core.pipeline import Pipeline
from lit_rlft.core.state import State, leaves
from lit_rlft.loop.reference import LoRA, Reference, adapt

SPREAD = 0.02


class Operations(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += 1
        return func(*args, **(kwargs or {}))


class Call:
    """A call of a denoiser, on noise.

    Args:
        pipeline: Its pipeline.
        size: Rows.
    """

    def __init__(self, pipeline: Pipeline, size: int) -> None:
        self.pipeline, self.condition = pipeline, pipeline.example().repeat(size)
        self.x = pipeline.process.prior(pipeline.blank(self.condition)).sample()
        self.t = torch.full((size,), 0.7, dtype=torch.float64, device=pipeline.device)

    def __call__(self) -> State:
        return self.pipeline(self.x, self.t, self.condition)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--domain", choices=("shapes", "layout", "molecule"), default="shapes")
    parser.add_argument("--pretrained", help="a text-to-image model in place of the domain's")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--turns", type=int, default=9)
    args = parser.parse_args()
    torch.manual_seed(0)
    pipeline = pipeline_of(args).to(args.device).eval()
    reference = adapt(pipeline, LoRA(rank=args.rank, merge_for_sampling=True), 0)
    for name, parameter in pipeline.denoiser.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=SPREAD)
    with torch.no_grad():
        describe(reference, Call(pipeline, 4))
        print("batch size   ms merged   apart / merged (quartiles)")
        for size in args.batch_sizes:
            compare(reference, Call(pipeline, size), args.turns)


def pipeline_of(args: argparse.Namespace) -> Pipeline:
    """Return the pipeline that the arguments name."""
    if args.pretrained or args.domain == "shapes":
        return TextToImagePipeline(args.pretrained or "shapes", dtype=args.dtype)
    return LayoutPipeline() if args.domain == "layout" else MoleculePipeline()


def describe(reference: Reference, call: Call) -> None:
    """Print operations, the time and memory of merging, and how predictions differ."""
    merged = reference.adapter.merged
    own = {n: p.nbytes for n, p in call.pipeline.denoiser.named_parameters() if "lora_" not in n}
    held = [size for name, size in own.items() if name.endswith("base_layer.weight")]
    sizes = f"{sum(held) / 2**20:.1f} of {sum(own.values()) / 2**20:.1f} MiB"
    print(f"{len(held)} layers, {sizes} of weights kept")
    apart = call()
    with reference.active():
        base = call()
    with merged(call):
        together = call()
        with Operations() as few:
            call()
    with Operations() as many:
        call()
    print(f"operations: {many.num} apart, {few.num} merged")
    print(f"difference {distance(together, apart):.1e}, of the LoRA {distance(apart, base):.1e}")
    start, turns = time.perf_counter(), 10
    for _ in range(turns):
        with merged(call):
            pass
    print(f"merging and writing back: {(time.perf_counter() - start) / turns * 1e3:.1f} ms")


def compare(reference: Reference, call: Call, turns: int) -> None:
    """Print one row of the table."""
    ratios, seconds = [], []
    call()
    for _ in range(turns):
        apart = timed(call)
        with reference.adapter.merged(call):
            seconds.append(timed(call))
        ratios.append(apart / seconds[-1])
    low, median, high = quartiles(ratios)
    size, ms = len(call.condition), statistics.median(seconds) * 1e3
    print(f"{size:10} {ms:11.1f}   {median:.2f} ({low:.2f} to {high:.2f})")


def timed(call: Call) -> float:
    """Return the seconds of a call."""
    if call.pipeline.device.type != "cuda":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the first quartile, the median and the third quartile."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def distance(found: State, expected: State) -> float:
    """Return the difference of two predictions in units of the second one's size."""
    pairs = list(zip(leaves(found), leaves(expected), strict=True))
    off = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return (off / sum(float(_squares(b)) for _, b in pairs)) ** 0.5


def _squares(value: Tensor) -> Tensor:
    return value.double().square().sum()


if __name__ == "__main__":
    main()
