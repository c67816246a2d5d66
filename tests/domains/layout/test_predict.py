"""The command line on layouts: what `predict` writes can be read again."""

import json
from pathlib import Path

import numpy as np
import pytest

import lit_rlft
from domains.layout.samples import EMPTY
from domains.layout.sources import Grammar, JSONLayouts
from lit_rlft.cli import main

CONFIGS = Path(lit_rlft.__file__).parents[1] / "configs"


@pytest.mark.parametrize("domain", ["layout", "layout_mixed"])
def test_predicted_layouts_are_data(
    domain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [f"--config={CONFIGS}/domains/{domain}.yaml"]
    flags += [f"--config={CONFIGS}/algorithms/p_graft.yaml", "--name=run"]
    flags += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    flags += ["--data.source.num_pages=100", "--data.num_test=3", "--data.tasks={category: 1.0}"]
    main(["predict", *flags, "--model.num_eval_samples=2", "--model.sampler.num_steps=3"])
    folder = Path("runs/run/samples")
    lines = [json.loads(line) for line in Path("runs/run/samples.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and {line["task"] for line in lines} == {"category"}
    for line in lines:
        file = folder / line["file"]
        assert all(file.with_suffix(s).is_file() for s in (".json", ".svg", ".png"))
        # The classes that were given are the classes that were drawn.
        elements = json.loads(file.read_text())["elements"]
        assert [e["label"] for e in elements] == [e["label"] for e in line["given"]]
        assert np.isfinite(line["rewards"]["WeightedSum"])
    source = JSONLayouts(str(folder), cache_dir=str(tmp_path / "cache"))
    packed = source.load()
    assert 0 < len(packed) <= 6 and (packed.labels != EMPTY).any()
    assert source.classes == Grammar().classes
