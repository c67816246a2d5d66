from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from domains.text_to_image.shapes import detector, world
from domains.text_to_image.shapes.world import Figure, Prompt, Scene, parse

NUM_PICTURES = 1200
Example = tuple[Prompt, Scene]


def shows(scene: Scene, prompt: Prompt) -> bool:
    """Whether a scene is a true picture of a prompt, by exhaustive matching."""
    wanted = [(i, r) for i, r in enumerate(prompt.include) for _ in range(r.count)]
    if len(wanted) != len(scene.figures):
        return False
    for figures in permutations(scene.figures):
        pairs = list(zip(wanted, figures, strict=True))
        place = {i: figure for (i, _), figure in pairs}
        if all(
            r.shape == figure.shape
            and r.color in (None, figure.color)
            and (r.position is None or _lies(figure, r.position[0], place[r.position[1]]))
            for (_, r), figure in pairs
        ):
            return True
    return False


def _lies(figure: Figure, relation: str, other: Figure) -> bool:
    dx, dy = figure.x - other.x, figure.y - other.y
    if relation in ("left of", "right of"):
        return abs(dx) > abs(dy) and (dx < 0) == (relation == "left of")
    return abs(dy) > abs(dx) and (dy < 0) == (relation == "above")


def imitate_autoencoder(
    picture: NDArray[np.uint8], rng: np.random.Generator
) -> NDArray[np.float32]:
    blurred = ndimage.gaussian_filter(picture.astype(float), (0.7, 0.7, 0))
    shifted = blurred * rng.uniform(0.94, 1.04) + rng.normal(0, 6, 3)
    noisy = shifted + rng.normal(0, 6, picture.shape)
    damaged: NDArray[np.float32] = (np.clip(noisy, 0, 255) / 255).astype(np.float32)
    return damaged


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    rng = np.random.default_rng(0)
    prompts = [prompt for task in world.TASKS for prompt in world.all_prompts(task)]
    drawn = [world.sample(rng, prompts)[0] for _ in range(NUM_PICTURES)]
    return [(prompt, world.compose(prompt, rng)) for prompt in drawn]


def _correct(example: Example) -> bool:
    return detector.judge(world.render(example[1]), example[0]).correct


def test_true_captions_are_recognised_in_every_task(examples: list[Example]) -> None:
    correct = {task: [_correct(e) for e in examples if e[0].task == task] for task in world.TASKS}
    assert min(map(len, correct.values())) > 100
    assert min(np.mean(values) for values in correct.values()) > 0.99


def test_shuffled_captions_are_rejected(examples: list[Example]) -> None:
    verdicts, truths = [], []
    for (_, scene), (prompt, _) in zip(examples, examples[1:] + examples[:1], strict=True):
        verdicts.append(detector.judge(world.render(scene), prompt).correct)
        truths.append(shows(scene, prompt))
    accepted, true = np.array(verdicts), np.array(truths)
    # A shuffled caption may hold by chance, as "a ring" does for the picture of "a red ring".
    assert true.mean() < 0.05
    assert accepted.mean() < 0.05
    assert accepted[~true].mean() < 0.002
    assert accepted[true].mean() > 0.9


def test_blur_noise_and_color_shift_are_tolerated(examples: list[Example]) -> None:
    rng = np.random.default_rng(1)
    pictures = [imitate_autoencoder(world.render(scene), rng) for _, scene in examples]
    own = [detector.judge(x, p).correct for x, (p, _) in zip(pictures, examples, strict=True)]
    assert np.mean(own) > 0.97
    others = zip(pictures[:400], examples[1:401], strict=True)
    assert np.mean([detector.judge(x, prompt).correct for x, (prompt, _) in others]) < 0.05


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("color", world.COLORS)
@pytest.mark.parametrize("ground", world.GROUNDS)
def test_a_detection_describes_its_figure(shape: str, color: str, ground: str) -> None:
    figure = Figure(shape, color, 29.7, 35.2, 10.4)
    (found,) = detector.detect(world.render(Scene((figure,), ground)))
    assert (found.shape, found.color) == (shape, color)
    assert found.x == pytest.approx(figure.x, abs=1)
    assert found.y == pytest.approx(figure.y, abs=1)
    assert found.radius == pytest.approx(figure.radius, abs=1)
    assert found.confidence == min(found.shape_scores[shape], found.color_scores[color])
    assert 0.7 < found.confidence <= 1
    assert max(found.shape_scores, key=found.shape_scores.__getitem__) == shape


def test_float_and_larger_pictures_read_the_same() -> None:
    prompt = parse("a red circle and a blue square")
    scene = world.compose(prompt, np.random.default_rng(0))
    picture = world.render(scene)
    small = detector.detect(picture)
    assert detector.detect(picture.astype(np.float64) / 255)[0].shape == small[0].shape
    large = detector.detect(world.render(scene, 160))
    assert [(d.shape, d.color) for d in large] == [(d.shape, d.color) for d in small]
    assert large[0].x == pytest.approx(2.5 * small[0].x, abs=2.5)
    assert detector.judge(world.render(scene, 160), prompt).correct


def test_touching_figures_of_different_colors_are_told_apart() -> None:
    scene = Scene(
        (Figure("square", "red", 22, 32, 11), Figure("square", "cyan", 41.4, 32, 11)), "white"
    )
    found = detector.detect(world.render(scene))
    assert sorted((d.shape, d.color) for d in found) == [("square", "cyan"), ("square", "red")]


def test_a_vivid_ground_is_not_ground() -> None:
    picture = world.render(Scene((Figure("circle", "red", 32, 32, 12),), "white"))
    picture[(picture == world.GROUNDS["white"]).all(-1)] = world.COLORS["yellow"]
    assert not detector.judge(picture, parse("a red circle")).correct


def test_specks_are_overlooked_and_emptiness_scores_nothing() -> None:
    picture = world.render(Scene((Figure("circle", "red", 32, 32, 12),), "white"))
    picture[3:6, 3:6] = world.COLORS["blue"]
    assert detector.judge(picture, parse("a red circle")) == detector.Judgement(1.0, True)
    empty = world.render(Scene((), "grey"))
    assert detector.detect(empty) == []
    assert detector.judge(empty, parse("two rings")) == detector.Judgement(0.0, False)


def test_malformed_figures_satisfy_nothing() -> None:
    circle = world.render(Scene((Figure("circle", "red", 32, 32, 12),), "white"))
    half, brown, stretched = circle.copy(), circle.copy(), np.repeat(circle, 2, 0)[32:96]
    half[32:] = world.GROUNDS["white"]
    brown[(circle == world.COLORS["red"]).all(-1)] = (120, 70, 40)
    merged = Scene(
        (Figure("circle", "red", 24, 32, 9), Figure("circle", "red", 40, 32, 9)), "white"
    )
    for picture in (half, brown, stretched, world.render(merged)):
        for text in ("a circle", "a red circle", "two circles"):
            judgement = detector.judge(picture, parse(text))
            assert not judgement.correct and judgement.score < 0.7


def test_noise_is_no_picture_of_anything() -> None:
    rng = np.random.default_rng(0)
    for prompt in ("a circle", "two squares", "a red ring"):
        assert not detector.judge(rng.random((64, 64, 3)), parse(prompt)).correct


CIRCLE = Figure("circle", "red", 17, 30, 11)
SQUARE = Figure("square", "blue", 46, 34, 11)
EXTRA = Figure("diamond", "green", 32, 10, 7)


def _score(text: str, *figures: Figure) -> float:
    return detector.judge(world.render(Scene(figures, "white")), parse(text)).score


@pytest.mark.parametrize(
    ("text", "rising"),
    [
        (
            "a red circle and a blue square",
            [
                (),
                (CIRCLE,),
                (CIRCLE, replace(SQUARE, color="pink")),
                (CIRCLE, SQUARE),
            ],
        ),
        (
            "a red circle and a blue square",
            [
                (replace(CIRCLE, color="blue"), replace(SQUARE, color="red")),
                (replace(CIRCLE, color="green"), SQUARE),
                (CIRCLE, SQUARE),
            ],
        ),
        ("a circle and a square", [(CIRCLE,), (CIRCLE, SQUARE, EXTRA), (CIRCLE, SQUARE)]),
        (
            "a circle left of a square",
            [
                (CIRCLE,),
                (replace(CIRCLE, x=46), replace(SQUARE, x=17)),
                (replace(CIRCLE, x=46, y=46), replace(SQUARE, y=17)),
                (CIRCLE, SQUARE),
            ],
        ),
        ("a red circle", [(), (SQUARE,), (replace(SQUARE, color="red"),), (CIRCLE,)]),
        (
            "two circles",
            [
                (),
                (CIRCLE,),
                (CIRCLE, SQUARE),
                (CIRCLE, replace(CIRCLE, x=46)),
            ],
        ),
    ],
)
def test_the_score_rises_as_damage_shrinks(text: str, rising: list[tuple[Figure, ...]]) -> None:
    scores = [_score(text, *figures) for figures in rising]
    assert scores == sorted(set(scores))
    assert scores[-1] == 1
    assert scores[-2] <= 0.9


def test_the_score_is_one_only_when_correct(examples: list[Example]) -> None:
    pictures = [world.render(scene) for _, scene in examples[:60]]
    for picture in pictures:
        for prompt, _ in examples[100:110]:
            judgement = detector.judge(picture, prompt)
            assert judgement.score == 1 if judgement.correct else 0 <= judgement.score <= 0.9


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((64, 64), np.uint8), r"\[H, W, 3\]"),
        (np.zeros((3, 64, 64), np.uint8), r"\[H, W, 3\]"),
        (np.zeros((8, 8, 3), np.uint8), "16 pixels"),
        (np.zeros((64, 64, 3), np.int64), "int64"),
        (np.full((64, 64, 3), 255.0), "255"),
        (np.full((64, 64, 3), -1.0), "-1"),
        (np.full((64, 64, 3), np.nan), "nan"),
    ],
)
@pytest.mark.parametrize(
    "function", [detector.detect, lambda x: detector.judge(x, parse("a ring"))]
)
def test_bad_pictures_are_refused(
    picture: NDArray[Any], message: str, function: Callable[[NDArray[Any]], object]
) -> None:
    with pytest.raises(ValueError, match=message):
        function(picture)
