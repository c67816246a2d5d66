"""Rewards that are plain functions of pictures and prompts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from domains.text_to_image.rewards import FunctionReward
from lit_rlft.cli import main
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from tests.support import scalars

CONDITION = Condition([{"prompt": "red"}, {"prompt": "blue"}], {}, torch.tensor([1, 0]))
PICTURES = torch.stack([torch.full((3, 4, 6), 0.2), torch.full((3, 4, 6), 1.0)])


def test_a_function_gets_pictures_and_prompts_and_may_leave_one_out() -> None:
    seen: list[Any] = []

    def width(pictures: list[Image.Image], prompts: list[str]) -> list[float | None]:
        seen.extend([pictures[0].mode, pictures[0].getpixel((0, 0)), prompts])
        return [pictures[0].size[0], None]

    reward = FunctionReward(width)
    values = reward(PICTURES, CONDITION)
    assert values[0] == 6 and values[1].isnan() and reward.name == "width"
    assert seen == ["RGB", (51, 51, 51), ["blue", "red"]]


@pytest.mark.parametrize("function", [lambda pictures, prompts: [1.0], lambda p, q: []])
def test_one_number_is_needed_for_each_picture(function: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="numbers for 2 pictures; return one number, or None"):
        FunctionReward(function)(PICTURES, CONDITION)


def test_a_function_is_given_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("my_own_scores.py").write_text(
        "def redness(pictures, prompts):\n"
        "    return [picture.resize((1, 1)).getpixel((0, 0))[0] / 255 for picture in pictures]\n"
    )
    words = ["--config=shapes", "--config=p_graft", "--reward=FunctionReward", "--name=red"]
    tiny = ["--trainer.accelerator=cpu", "--trainer.limit_train_batches=1", "--data.batch_size=2"]
    tiny += ["--trainer.limit_val_batches=0", "--model.sampler.num_steps=2"]
    main(["fit", *words, *tiny, "--reward.function=my_own_scores.redness"])
    (reward,) = scalars("red")["train/reward"]
    assert 0 < reward < 1
    with pytest.raises(SystemExit, match=r"reward.init_args.function.*my_own_scores.nothing"):
        main(["fit", *words, *tiny, "--reward.function=my_own_scores.nothing"])
