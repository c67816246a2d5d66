"""Runs that started from a LoRA go on from their checkpoints without its file."""

import shutil
from pathlib import Path

import pytest

from domains.text_to_image.pipeline import TextToImagePipeline
from domains.text_to_image.rewards.pixels import Brightness
from lit_rlft.algorithms.reward_gradient import RewardGradient
from lit_rlft.cli import main
from tests.cli.test_families import words
from tests.domains.text_to_image.families.tiny import tiny
from tests.support import assert_equal, checkpoint, weights


def test_a_run_from_a_lora_outlives_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("sd").save_pretrained(tmp_path / "sd")
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("".join(f"a ring, {i}\n" for i in range(20)))
    common = words("sd15", "drtune", tmp_path)
    first = [*common, "--name=first", "--model.lora.rank=2", "--model.lora.alpha=6"]
    main(["fit", *first, "--model.lora.targets=[to_q,conv_in]", "--trainer.max_epochs=1"])
    start = [*common, "--model.lora.pretrained=runs/first/tuned"]
    main(["fit", *start, "--name=whole", "--trainer.max_epochs=2"])
    main(["fit", *start, "--name=parts", "--trainer.max_epochs=1"])
    shutil.move("runs/first", "elsewhere")
    last = "--ckpt_path=runs/parts/checkpoints/last.ckpt"
    for stage in ("predict", "test"):
        main([stage, *start, "--name=parts", last])
    main(["fit", *start, "--name=parts", "--trainer.max_epochs=2", last])
    assert_equal(weights("parts"), weights("whole"))
    recorded = checkpoint("parts")["lit_rlft"]["settings"]
    lora = [recorded[f"model.lora.{name}"] for name in ("rank", "alpha", "targets.length")]
    assert lora == [2, 6, 2]
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"lora\.pretrained: there is no file runs/first/tuned$"):
        main(["fit", *start, "--name=anew"])
    pipeline = TextToImagePipeline(str(tmp_path / "sd"), height=32, width=32)
    path = "runs/parts/checkpoints/last.ckpt"
    loaded = RewardGradient.load_from_checkpoint(path, pipeline=pipeline, reward=Brightness())
    held = {f"pipeline.denoiser.{n}": value.data for n, value in loaded._trained().items()}
    assert_equal(held, weights("whole"))
