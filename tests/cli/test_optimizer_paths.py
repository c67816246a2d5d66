"""Optimisers of other packages, by class path: their arguments, and a resumed run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_rlft.cli import main
from tests.support import TINY_MIXTURE, arguments, checkpoint, working_directory

EIGHT_BITS = '''
import torch


class AdamW8bit(torch.optim.AdamW):
    """Takes what bitsandbytes' class takes beside torch's own arguments, and keeps it."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2,
                 optim_bits=32, min_8bit_size=4096, percentile_clipping=100):
        super().__init__(params, lr, betas, eps, weight_decay)
        self.defaults["min_8bit_size"] = min_8bit_size
        for group in self.param_groups:
            group["min_8bit_size"] = min_8bit_size
'''
OPTIMIZER = {
    "model.optimizer": "bits_and_bytes.optim.AdamW8bit",
    "model.optimizer.lr": 0.003,
    "model.optimizer.min_8bit_size": 1024,
}


def fit(**settings: Any) -> None:
    domain = ("gaussian_mixture", "p_graft")
    main(arguments("fit", domain, TINY_MIXTURE, OPTIMIZER | settings))


@pytest.mark.slow
def test_an_optimiser_by_class_path_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "bits_and_bytes"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "optim.py").write_text(EIGHT_BITS)
    monkeypatch.syspath_prepend(tmp_path)
    with working_directory(tmp_path):
        fit(name="run", **{"trainer.max_epochs": 1})
        last = "runs/run/checkpoints/last.ckpt"
        fit(name="run", ckpt_path=last, **{"trainer.max_epochs": 2})
        fit(name="whole", **{"trainer.max_epochs": 2})
        resumed, whole = checkpoint("run"), checkpoint("whole")
    (group,) = whole["optimizer_states"][0]["param_groups"]
    assert group["lr"] == 0.003 and group["min_8bit_size"] == 1024
    assert resumed["state_dict"].keys() == whole["state_dict"].keys()
    for name, value in whole["state_dict"].items():
        torch.testing.assert_close(resumed["state_dict"][name], value, rtol=0, atol=0)
    states = (one["optimizer_states"][0]["state"] for one in (resumed, whole))
    for mine, theirs in zip(*(state.values() for state in states), strict=True):
        torch.testing.assert_close(mine["exp_avg_sq"], theirs["exp_avg_sq"], rtol=0, atol=0)
