"""Pictures per second of each published reward, beside its plain formula on transformers.

Method: models are tiny random ones of the real classes, as the tests have them, so that what is
compared is everything around the networks: preprocessing, texts, batches. Both sides score the
same pictures [N, 3, size, size] with N / M different prompts, M pictures a prompt, 16 at a time, on
one device and one thread, and use the same network. On a CPU seconds are those of the processor,
which on a shared machine vary less than those of the clock.

- ours: the reward, from tensors; its texts were not seen before in each repeat;
- plain: PIL pictures through transformers' own processor and tokenizer, a text per picture, and the
  model's forward pass, as the packages of the rewards and their model cards have it.

Repeats alternate between the two, so that a busy machine is busy for both. Printed are medians,
the median of the repeats' ratios with their range, and the largest difference of two scores
relative to the scores' spread (PIL rounds a resized picture to bytes, tensors do not).

    python benchmarks/reward_speed.py --pictures 64 --per-prompt 8 --size 256 --repeats 7
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from command_line import print_table
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, CLIPTokenizer, LlavaForConditionalGeneration

from domains.text_to_image.rewards import (
    CLIPScore,
    HPSv2,
    ImageReward,
    LAIONAesthetic,
    PickScore,
    VQAScore,
)
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from lit_rlft.kit.images import to_image
from tests.conftest import TOKENIZER
from tests.domains.text_to_image.rewards.published import all_weights, pil_processor

BATCH = 16
"""Pictures in a pass, on both sides."""
Plain = Callable[[list[Image.Image], list[str]], Tensor]
"""From pictures and prompts to scores."""


def rewards_of(folder: Path) -> dict[str, Reward]:
    """Return the rewards with their tiny weights."""
    words, clip, size = str(TOKENIZER), str(folder / "clip"), {"batch_size": BATCH}
    return {
        "CLIPScore": CLIPScore(clip),
        "PickScore": PickScore(clip, None, **size),
        "HPSv2": HPSv2(str(folder), tokenizer=words, **size),
        "LAIONAesthetic": LAIONAesthetic(str(folder / "head.pth"), clip, **size),
        "ImageReward": ImageReward(str(folder / "ImageReward.pt"), tokenizer=words, **size),
        "VQAScore": VQAScore(str(folder / "llava"), dtype="float32", **size),
    }


def plain_of(name: str, reward: Any, folder: Path, device: str) -> Plain:
    """Return a reward's formula on transformers' own processors."""
    if name == "VQAScore":
        return _plain_llava(folder / "llava", device)
    processor, tokenizer = pil_processor().from_pretrained(folder / "clip"), None
    if name != "LAIONAesthetic":
        tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    if name == "ImageReward":
        return _plain_blip(reward, processor, tokenizer, device)
    return _plain_clip(name, reward, processor, tokenizer, device)


def _plain_clip(name: str, reward: Any, processor: Any, tokenizer: Any, device: str) -> Plain:
    clip = reward.encoder.clip

    def unit(x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    def score(pictures: list[Image.Image], prompts: list[str]) -> Tensor:
        if name == "HPSv2":
            pictures = [_padded(picture) for picture in pictures]
        pixels = processor(pictures, return_tensors="pt")["pixel_values"].to(device)
        image = unit(clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output))
        if name == "LAIONAesthetic":
            return reward.head(image).squeeze(1)
        length = clip.config.text_config.max_position_embeddings
        read = tokenizer(
            prompts, padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        text = unit(clip.text_projection(clip.text_model(**read.to(device)).pooler_output))
        scale = clip.logit_scale.exp() if name == "PickScore" else 1.0
        return scale * (image * text).sum(dim=-1)

    return score


def _padded(picture: Image.Image) -> Image.Image:
    """Return a picture on a black square, as HPSv2 sees it."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def _plain_blip(reward: Any, processor: Any, tokenizer: Any, device: str) -> Plain:
    def score(pictures: list[Image.Image], prompts: list[str]) -> Tensor:
        pixels = processor(pictures, return_tensors="pt")["pixel_values"].to(device)
        read = tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=reward.reader.length,
            return_tensors="pt",
        ).to(device)
        raw = reward.network(pixels, read["input_ids"], read["attention_mask"])
        return (raw - 0.16717362830052426) / 1.0333394966054072

    return score


def _plain_llava(folder: Path, device: str) -> Plain:
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval().to(device)
    yes = processor.tokenizer.encode("Yes")[0]

    def score(pictures: list[Image.Image], prompts: list[str]) -> Tensor:
        asked = [
            f'USER: <image>\nDoes this figure show "{p}"? Please answer Yes or No. ASSISTANT:'
            for p in prompts
        ]
        read = processor(text=asked, images=pictures, padding=True, return_tensors="pt")
        return model(**read.to(device)).logits[:, -1].softmax(-1)[:, yes]

    return score


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--per-prompt", type=int, default=8, help="pictures of one prompt")
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shape = (args.pictures, 3, args.size // 8, args.size // 8)
    coarse = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    pictures = torch.nn.functional.interpolate(coarse, scale_factor=8).to(args.device)
    rows = torch.arange(args.pictures) // args.per_prompt
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = all_weights(Path(name))
        table = [_row(*own, folder, pictures, rows, args) for own in rewards_of(folder).items()]
    columns = ["reward", "ours, pictures/s", "plain, pictures/s", "ratio (range)", "difference"]
    print_table(columns, table)


def _row(
    name: str, reward: Reward, folder: Path, pictures: Tensor, rows: Tensor, args: Any
) -> list[str]:
    """Return a line of the table."""
    reward = reward.eval().to(args.device)
    plain = plain_of(name, reward, folder, args.device)
    images = [to_image(picture) for picture in pictures]
    rates: tuple[list[float], list[float]] = ([], [])
    for repeat in range(args.repeats + 1):
        texts = [f"{i} red circles, {repeat}" for i in range(int(rows.max()) + 1)]
        condition = Condition([{"prompt": text} for text in texts], {}, rows)
        prompts = [texts[row] for row in rows.tolist()]
        ours, seconds = _timed(partial(reward, pictures, condition), args.device)
        theirs, plain_seconds = _timed(partial(_in_batches, plain, images, prompts), args.device)
        if repeat:  # the first one warms up
            rates[0].append(len(pictures) / seconds)
            rates[1].append(len(pictures) / plain_seconds)
    ratios = [a / b for a, b in zip(*rates, strict=True)]
    difference = float((ours - theirs).abs().max() / theirs.std())
    return [
        f"`{name}`",
        *(f"{statistics.median(own):.0f}" for own in rates),
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{difference:.1%}",
    ]


def _in_batches(plain: Plain, images: list[Image.Image], prompts: list[str]) -> Tensor:
    starts = range(0, len(images), BATCH)
    return torch.cat([plain(images[i : i + BATCH], prompts[i : i + BATCH]) for i in starts])


def _timed(work: Callable[[], Tensor], device: str) -> tuple[Tensor, float]:
    on_gpu = device.startswith("cuda")
    clock = time.perf_counter if on_gpu else time.process_time
    start = clock()
    result = work()
    if on_gpu:
        torch.cuda.synchronize()
    return result.float().cpu(), clock() - start


if __name__ == "__main__":
    main()
