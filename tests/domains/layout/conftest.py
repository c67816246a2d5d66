"""Small layout models with random weights, and batches of each task."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from domains.layout.data import LayoutData
from domains.layout.networks.transformer import Architecture
from domains.layout.pipeline import LayoutPipeline
from domains.layout.sources import Grammar
from lit_rlft.kit.data import collate

Batches = Callable[..., dict[str, Any]]


@pytest.fixture
def tiny_pipeline() -> Callable[..., LayoutPipeline]:
    """Return a function that makes a small pipeline whose predictions are not 0."""

    def make(state: str = "continuous", seed: int = 0, **sizes: Any) -> LayoutPipeline:
        sizes = {"width": 16, "depth": 1, "num_heads": 2, **sizes}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            architecture = Architecture(state=state, **sizes)  # type: ignore[arg-type]
            pipeline = LayoutPipeline(None, architecture=architecture)
            for parameter in pipeline.denoiser.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
        return pipeline

    return make


@pytest.fixture
def batch_of() -> Batches:
    """Return a function that makes a batch of grammar pages under one task."""

    def make(task: str = "unconditional", num: int = 6, **settings: Any) -> dict[str, Any]:
        data = LayoutData(Grammar(num + 4), tasks={task: 1.0}, **settings)
        data.setup("fit")
        rows = data.rows("train")
        return collate([rows[i] for i in range(num)])

    return make
