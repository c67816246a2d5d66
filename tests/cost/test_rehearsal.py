"""The rehearsal's figures against those of torch's own profiler and counter, on real tensors."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.cost.rehearsal import backward, rehearsal, remembered
from lit_rlft.kit.weightless import without_weights
from tests.cost.measured import peak_of


def test_decoding_takes_what_the_allocator_measures() -> None:
    latents = torch.zeros(6, 4, 16, 16)
    real = TextToImagePipeline("shapes", decode_batch_size=3)
    condition = real.example().repeat(6)
    with (
        torch.no_grad(),
        profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profiler,
    ):
        real.decode(latents, condition)
    with without_weights():
        bare = TextToImagePipeline("shapes", decode_batch_size=3)
    assert all(parameter.is_meta for parameter in bare.parameters())
    with rehearsal() as ledger, torch.no_grad():
        ledger.hold(bare.parameters())
        weights = ledger.live
        x_0 = latents.to("meta")
        with ledger.phase("decode"):
            bare.decode(x_0, condition)
    expected = peak_of(profiler)
    assert expected > 1e6
    assert ledger.peaks["decode"] - weights == pytest.approx(expected, rel=0.15)


def test_a_gradient_through_the_decoder_takes_what_the_allocator_measures() -> None:
    """Its blocks are computed again in turn: together they would take more."""
    latents, taken = torch.zeros(1, 4, 16, 16), {}
    for blocks in (True, False):
        real = TextToImagePipeline("shapes")
        with without_weights():
            bare = TextToImagePipeline("shapes")
        for pipeline in (real, bare):
            assert pipeline.vae.decoder.gradient_checkpointing
            pipeline.vae.decoder.gradient_checkpointing = blocks
        x_0 = latents.clone().requires_grad_()
        with profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profiler:
            real.decode(x_0, real.example()).mean().backward()
        assert x_0.grad is not None and x_0.grad.abs().max() > 0
        with rehearsal() as ledger:
            ledger.hold(bare.parameters())
            weights = ledger.live
            with ledger.phase("update", whole=True):
                backward(bare.decode(latents.to("meta").requires_grad_(), real.example()).mean())
        taken[blocks] = ledger.peaks["update"] - weights
        assert taken[blocks] == pytest.approx(peak_of(profiler), rel=0.2)
    assert taken[True] < 0.8 * taken[False], taken


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
def test_half_precision_of_the_trainer_decodes_too(low: torch.dtype) -> None:
    with without_weights():
        pipeline = TextToImagePipeline("shapes")
    with rehearsal(low), torch.no_grad():
        assert torch.is_autocast_enabled("meta") and torch.get_autocast_dtype("meta") == low
        pictures = pipeline.decode(torch.zeros(1, 4, 8, 8, device="meta"), pipeline.example())
    assert pictures.shape == (1, 3, 64, 64)


@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_a_block_computed_again_keeps_its_inputs_alone(low: torch.dtype | None) -> None:
    with torch.device("meta"):
        blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU()) for _ in range(4)
        )
    kept = {}
    for again in (False, True):
        with rehearsal(low) as ledger:
            ledger.hold(blocks.parameters())
            weights = ledger.live
            x = torch.empty(1000, 64, device="meta")
            for block in blocks:
                x = checkpoint(block, x, use_reentrant=False) if again else block(x)
            kept[again] = ledger.live - weights
            backward(x.sum())
        assert all(p.grad is not None and p.grad.shape == p.shape for p in blocks.parameters())
    state = 1000 * 64 * 4
    # In single precision: the outputs of the four blocks and the input.
    assert kept[True] == 5 * state if low is None else kept[True] <= 5 * state
    assert kept[False] > 2 * kept[True]


def test_operations_are_those_of_torchs_counter_and_repeated_calls_cost_the_same() -> None:
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.zeros(5, 8)
    with FlopCounterMode(display=False) as counter:
        network(x).sum().backward()
    bare = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to("meta")
    with rehearsal() as ledger:
        backward(bare(x.to("meta")).sum())
        assert ledger.flops == counter.get_total_flops()
        runs: list[int] = []
        bare.register_forward_pre_hook(lambda *_: runs.append(1))
        inner = bare[0]
        inner.register_forward_pre_hook(lambda *_: runs.append(10))
        remembered(bare, ledger, lambda: bare.training)
        costs = []
        for _ in range(3):
            before = ledger.flops
            with torch.no_grad(), ledger.phase("call"):
                assert bare(x.to("meta")).shape == (5, 4)
            costs.append(ledger.flops - before)
        assert sum(runs) == 3 + 10  # the inner layer ran once
    assert costs == [costs[0]] * 3 == [2 * 5 * (8 * 16 + 16 * 4)] * 3


def test_attention_is_counted_and_keeps_no_scores() -> None:
    q = torch.zeros(2, 4, 300, 8, requires_grad=True)
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    with rehearsal() as ledger:
        bare = q.detach().to("meta").requires_grad_()
        out = nn.functional.scaled_dot_product_attention(bare, bare, bare)
        kept = ledger.live
        backward(out.sum())
    assert kept == 4 * (2 * q.numel() + 2 * 4 * 300)
    # Fused kernels compute the scores again in the backward pass: 7 products instead of 6.
    assert ledger.flops == counter.get_total_flops() * 7 / 6


def test_code_that_decides_by_values_gets_some() -> None:
    with rehearsal() as ledger:
        x = torch.arange(4, dtype=torch.int64).to("meta")
        assert x.tolist() == [0, 1, 2, 3]  # known: it came from the CPU
        rewards = x.float() * 2
        assert len(set(rewards.cpu().tolist())) == 4
        assert bool(rewards.isfinite().all())
        assert rewards[rewards > 0].shape == (4,)
        assert (rewards + torch.ones(4)).is_meta
        assert len(torch.unique(rewards, dim=0)) == 4
        before = ledger.live
        del rewards
        assert ledger.live == before - 16
    assert not torch.is_autocast_enabled("cpu")
