"""The report in a browser: no errors, no requests, the slider, enlarged samples, other axes."""

from collections.abc import Iterator

import pytest

from lit_rlft.report import write_report
from tests.browser import Browser, headless
from tests.report.folders import config, write_run

pytestmark = pytest.mark.slow  # a browser takes seconds to start

EVIL = "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'>"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Open a report of two runs, one label of which is a script."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        write_run(folder / "a", 1.0, labels=(EVIL,), kind="figure"),
        write_run(folder / "b", 2.0, labels=(EVIL,), kind="figure", settings=config(contrast=1.0)),
    ]
    with headless() as browser:
        browser.open(write_report(runs, folder / "r.html"))
        browser.wait("return document.body.dataset.ready === 'yes'")
        yield browser


@pytest.fixture(scope="module")
def two_rewards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Open a report of two runs that were trained on different rewards."""
    folder = tmp_path_factory.mktemp("rewards")
    runs = [write_run(folder / "a", 1.0), write_run(folder / "b", 22.0, reward="Pick")]
    with headless() as browser:
        browser.open(write_report(runs, folder / "r.html"))
        browser.wait("return document.body.dataset.ready === 'yes'")
        yield browser


def captions(page: Browser) -> list[str]:
    return page.run(
        "return [...document.querySelector('#samples .tile').querySelectorAll('figcaption')]"
        ".map((x) => x.textContent)"
    )


def slide(page: Browser, place: int) -> str:
    return page.run(
        "const s = document.getElementById('slider'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('input')); return document.getElementById('place').textContent",
        place,
    )


def test_nothing_is_asked_for_and_nothing_is_wrong(page: Browser) -> None:
    assert page.run("return window.hit") is None
    assert page.run("return document.querySelectorAll('#charts .main-svg').length") >= 2
    assert page.run("return document.querySelectorAll('#pareto .main-svg').length") > 0
    label = page.run("return document.querySelector('#samples .label').textContent")
    assert label == EVIL
    # Pictures load when they are seen; then they have a size.
    page.run("document.getElementById('samples').scrollIntoView()")
    page.wait("return document.querySelector('#samples img').naturalWidth > 0")
    assert page.errors() == []
    (own,) = page.requests()
    assert own.startswith("file://") and own.endswith("r.html")


def test_the_slider_shows_other_checkpoints(page: Browser) -> None:
    assert slide(page, 0) == "a: before training · b: before training"
    before = captions(page)
    assert [caption.partition(":")[0] for caption in before] == ["reference", "a", "b"]
    assert len({caption.partition(": ")[2] for caption in before}) == 1
    assert slide(page, 1).startswith("a: after 2 updates, 200 reward calls, Reward 0.5")
    assert slide(page, 2).startswith("a: after 4 updates, 400 reward calls, Reward 1 · b: after 4")
    values = [float(caption.partition(": ")[2]) for caption in captions(page)]
    assert values[1] - values[0] == pytest.approx(1, abs=2e-3)
    assert values[2] - values[0] == pytest.approx(2, abs=2e-3)
    assert page.run("return document.querySelectorAll('#samples .tile').length") == 4


def test_each_run_is_told_by_its_own_reward(two_rewards: Browser) -> None:
    told = slide(two_rewards, 2)
    assert ", Reward 1 · b: " in told and told.endswith(", Pick 22")
    before, a, b = (caption.partition(": ")[2].split() for caption in captions(two_rewards))
    assert [*before[::2], a[0], b[0]] == ["Reward", "Pick", "Reward", "Pick"]
    assert float(b[1]) - float(a[1]) == pytest.approx(21, abs=2e-2)
    titles = two_rewards.run(
        "return [...document.getElementById('guard').options].map((one) => {"
        "const s = document.getElementById('guard'); s.value = one.value;"
        "s.dispatchEvent(new Event('change'));"
        "return document.getElementById('pareto').layout.xaxis.title.text})"
    )
    assert titles == ["gain of Reward (trained)", "gain of Pick (trained)"]
    assert two_rewards.errors() == []


def test_curves_over_another_axis(page: Browser) -> None:
    axes = page.run("return [...document.getElementById('axis').options].map((x) => x.value)")
    assert axes == ["reward_calls", "seconds"]  # samples were not logged
    script = (
        "const s = document.getElementById('axis'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('change'));"
        "return document.querySelector('#charts .chart').data.map((trace) => [...trace.x])"
    )
    assert [200, 400] in page.run(script, "reward_calls")
    hours = page.run(script, "seconds")
    assert [18 / 3600, 36 / 3600] in hours
    page.run("document.getElementById('further').open = true")
    assert page.errors() == []


def test_a_sample_is_enlarged_and_turned(page: Browser) -> None:
    page.run("document.querySelector('#samples img').click()")
    page.wait("return document.querySelectorAll('#large .space canvas').length > 0")
    assert page.run("return document.querySelectorAll('#large .space').length") == 3
    names = page.run("return [...document.querySelector('#large .space').data[1].text]")
    assert names == ["C", "O"]
    page.run("document.querySelector('#large button').click()")
    page.wait("return !document.getElementById('large').open")
    assert page.run("return document.getElementById('large').childElementCount") == 0
    kinds = page.run("return [...document.getElementById('kind').options].map((x) => x.value)")
    assert kinds == ["best", "worst", "changed"]
    assert page.errors() == []
