"""Denoisers alone: SDXL, Stable Diffusion 3.5 medium and FLUX.1-dev at 1,024 pixels, in bf16."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.models import denoiser
from lit_rlft.cost.counters import flop_counter

__all__ = ["inputs_of", "measure"]


def measure(bench: Bench) -> None:
    """Call each on 1 and on 4 rows, without gradients."""
    for family in ("sdxl", "sd3", "flux"):
        for batch in bench.pick((1, 4), (1,)):
            bench.case(
                {"family": family, "batch": batch},
                partial(_calls, bench, family, batch),
            )


@torch.no_grad()
def _calls(bench: Bench, family: str, batch: int) -> Row:
    network = denoiser(bench, family).eval()
    inputs = inputs_of(bench, network, family, batch)
    with flop_counter() as counter:
        network(**inputs)
    found = bench.turns({"": lambda: network(**inputs)})[""]
    numbers = sum(p.numel() for p in network.parameters())
    flops = int(counter.get_total_flops())
    return {**found, "flops": flops, "parameters": numbers, "peak_gib": bench.peak()}


def inputs_of(bench: Bench, network: nn.Module, family: str, batch: int) -> dict[str, Any]:
    """Return arguments of a denoiser for pictures of 1,024 pixels, or tiny ones."""
    config: Any = network.config

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=bench.device, dtype=bench.half)

    t = torch.full((batch,), 500.0, device=bench.device)
    if family == "sdxl":
        side = bench.pick(128, 8)
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": random(batch, pooled), "time_ids": random(batch, 6)}
        embedding = random(batch, 77, config.cross_attention_dim)
        x = random(batch, config.in_channels, side, side)
        named = {"sample": x, "encoder_hidden_states": embedding, "added_cond_kwargs": added}
        return {**named, "timestep": t}
    pooled_text = random(batch, config.pooled_projection_dim)
    tokens = bench.pick({"sd3": 77 + 256, "flux": 512}[family], 8)
    text = random(batch, tokens, config.joint_attention_dim)
    named = {"encoder_hidden_states": text, "pooled_projections": pooled_text}
    if family == "sd3":
        side = bench.pick(128, 8)
        return {**named, "hidden_states": random(batch, 16, side, side), "timestep": t}
    side = bench.pick(64, 4)
    return {
        **named,
        "hidden_states": random(batch, side * side, config.in_channels),
        "timestep": (t / 1000).to(bench.half),
        "guidance": torch.full((batch,), 3.5, device=bench.device, dtype=bench.half),
        "img_ids": torch.zeros(side * side, 3, device=bench.device),
        "txt_ids": torch.zeros(tokens, 3, device=bench.device),
    }
