"""`lit-rlft list`: what it shows is what there is, also of other packages."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.cli import main
from lit_rlft.cli.index import Entry, index, sentence_of
from lit_rlft.cli.listing import listing
from lit_rlft.cli.packages import GROUP, domain_packages, modules
from lit_rlft.cli.paths import packaged_configs
from lit_rlft.core.pipeline import Pipeline
from lit_rlft.core.reward import Metric, Reward
from lit_rlft.core.selection import Selection
from tests.support import ROOT

BASES = {
    "algorithm": RewardFineTuner,
    "pipeline": Pipeline,
    "reward": Reward,
    "metric": Metric,
    "selection": Selection,
}


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    capsys.readouterr()
    main(["list", *words])
    return capsys.readouterr().out.splitlines()


def names(lines: list[str]) -> list[str]:
    return [line.split()[0] for line in lines[1:] if line and not line.startswith(" ")]


def imported(entry: Entry) -> type:
    package, _, name = entry.path.rpartition(".")
    return getattr(importlib.import_module(package), name)


@pytest.fixture
def another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a distribution with a domain whose rewards lie in a sub-package."""
    files = {
        "acme_sound/__init__.py": "'''Sounds: waves in air. More of them.'''\nraise ImportError\n",
        "acme_sound/rewards/__init__.py": "from .loud import Loudness\n",
        "acme_sound/rewards/loud.py": (
            "from abc import abstractmethod\nfrom lit_rlft import Reward as Base\n"
            "class _Hidden(Base):\n    differentiable = True\n"
            "    @abstractmethod\n    def level(self): ...\n"
            "    def forward(self, samples, condition): return self.level()\n"
            "class Incomplete(_Hidden):\n    '''Abstract still.'''\n"
            "class Loudness(_Hidden):\n    '''How loud it is. In decibels.'''\n"
            "    def level(self): return 1\n"
        ),
        "acme_sound/broken.py": "class Broken(:\n",
        "acme_sound-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: acme-sound\n",
        "acme_sound-1.0.dist-info/entry_points.txt": f"[{GROUP}]\nsound = acme_sound\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_our_domains_are_registered() -> None:
    root = Path(__file__).parents[2] / "domains"
    ours = {path.parent.name for path in root.glob("*/__init__.py")}
    assert ours <= domain_packages().keys()
    assert all(modules(domain_packages()[name]) for name in ours)


@pytest.mark.parametrize("kind", BASES)
def test_the_index_agrees_with_the_classes_themselves(kind: str) -> None:
    found = [entry for entry in index() if entry.kind == kind]
    assert found
    for entry in found:
        cls = imported(entry)
        assert issubclass(cls, BASES[kind]) and not inspect.isabstract(cls), entry
        assert cls.__name__ == entry.name and cls.__module__ == entry.module
        assert sentence_of(inspect.getdoc(cls) or "") == entry.summary
        if kind == "reward" and entry.gradient != "depends":
            assert cls.differentiable is (entry.gradient == "yes"), entry


@pytest.mark.parametrize("kind", BASES)
def test_the_index_misses_none(kind: str) -> None:
    for package in ("lit_rlft.core", "lit_rlft.algorithms", *domain_packages().values()):
        for module in modules(package):
            if "train_" not in module and "make_" not in module:
                importlib.import_module(module)
    todo, classes = [BASES[kind]], set()
    while todo:
        cls = todo.pop()
        classes.add(cls)
        todo += [one for one in cls.__subclasses__() if one not in classes]
    ours = ("lit_rlft.", "domains.")
    expected = {
        f"{cls.__module__}.{cls.__name__}"
        for cls in classes
        if cls.__module__.startswith(ours)
        and not inspect.isabstract(cls)
        and not cls.__name__.startswith("_")
        and "<locals>" not in cls.__qualname__
    }
    kinds = (kind, "reward") if kind == "metric" else (kind,)
    found = {f"{e.module}.{e.name}" for e in index() if e.kind in kinds}
    unnamed = {"lit_rlft.kit.judge.Judge", "lit_rlft.loop.side.rewards.SideReward"}
    assert expected - unnamed <= found


def test_rewards_tell_their_domain_and_whether_they_have_a_gradient(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = listed(capsys, "rewards", "--domain", "text_to_image")
    rows = {line.split()[0]: line.split()[1:3] for line in lines if not line.startswith(" ")}
    assert rows["CLIPScore"] == ["yes", "text_to_image"]
    assert rows["ShapesEval"] == ["no", "text_to_image"]
    assert "QED" not in rows and "WeightedSum" not in rows
    everywhere = listed(capsys, "rewards")
    assert any(line.split()[:3] == ["WeightedSum", "depends", "any"] for line in everywhere)
    assert max(map(len, everywhere)) <= 80


def test_lists_show_configs_by_algorithm_and_domain(capsys: pytest.CaptureFixture[str]) -> None:
    lines = " ".join(listed(capsys, "algorithms"))
    assert all(name in lines for name in ("PGRAFT", "p_graft", "random_k", "noise_ppo"))
    assert "inverse_noise_co" in lines
    assert "shapes" in " ".join(listed(capsys, "domains"))
    assert names(listed(capsys, "configs")) == [path.stem for path in packaged_configs()]
    images = names(listed(capsys, "configs", "--domain", "image"))
    assert "digits" in images and "shapes" not in images


def test_selections_and_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"TopK", "RandomK", "Threshold"} <= set(names(listed(capsys, "selections")))
    molecule = names(listed(capsys, "metrics", "--domain", "molecule"))
    assert "SetDistances" in molecule and "MMD" not in molecule and "QED" not in molecule


def test_everything_is_shown_unless_a_kind_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(listed(capsys))
    for title in ("ALGORITHMS", "DOMAINS", "REWARDS", "METRICS", "SELECTIONS", "CONFIGS"):
        assert f"{title}\n" in text


@pytest.mark.parametrize(
    ("words", "hint"),
    [(["rewardz"], "did you mean rewards"), (["rewards", "--domain", "molecules"], "molecule?")],
)
def test_unknown_kinds_and_domains_are_refused(words: list[str], hint: str) -> None:
    with pytest.raises(SystemExit, match=hint):
        main(["list", *words])


def test_another_packages_domain_is_listed(
    another: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = listed(capsys, "rewards", "--domain", "sound")
    assert names(rows) == ["Loudness"]
    assert rows[1].split()[1:3] == ["yes", "sound"] and "How loud it is" in rows[1]
    assert any(line.startswith("sound ") and "Sounds" in line for line in listed(capsys, "domains"))
    (entry,) = [one for one in index() if one.name == "Loudness"]
    assert entry.path == "acme_sound.rewards.Loudness"  # as short as it can be imported


def test_a_registration_that_leads_nowhere_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gone-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: gone\n")
    (folder / "entry_points.txt").write_text(f"[{GROUP}]\ngone = gone_away.domain\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert listed(capsys, "rewards", "--domain", "gone") == [
        "name  gradient  domain  [configs that use it]"
    ]


def test_names_stay_whole_and_a_reader_may_leave() -> None:
    assert "inverse_noise_correction" in listing("algorithms")
    assert "shapes_unconditional" in listing("domains")
    code = "import sys; from lit_rlft.cli import main; main(['list'])"
    command = f'{sys.executable} -c "{code}" | head -n 1'
    result = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "ALGORITHMS" and not result.stderr
