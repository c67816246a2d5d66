"""Configs with one mistake each: every domain, every algorithm, every key in turn."""

import copy
import math
import os
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from lit_rlft.cli.index import index  # noqa: E402
from tests.fuzz.harness import broken_rules  # noqa: E402
from tests.support import ROOT, TINY_SPLITS  # noqa: E402

MANY = int(os.environ.get("LIT_RLFT_FUZZ_CONFIGS", "2000"))
FEW = 24
QUICK_DOMAINS = ("gaussian_mixture", "layout", "molecule_soft")
DOMAINS = (*QUICK_DOMAINS, "layout_mixed", "molecule_mixed", "digits", "shapes")
ALGORITHMS = sorted(path.stem for path in (ROOT / "configs/algorithms").glob("*.yaml"))
GRADIENTS = ("adjoint_matching", "align_prop", "draft", "draft_lv", "drtune", "refl")
FROM_NOISE = ("inverse_noise_correction", "noise_ppo")
STEPS = ("flow_grpo", "flow_grpo_fast", "grpo_guard", "mix_grpo")
FROM_DATA = ("inverse_noise_correction", "pretrain")
KINDS = ("typo", "drop", "type", "number", "number", "class", "text", "add")
NUMBERS = (math.nan, math.inf, -math.inf, -1, -0.5, 0, 10**15, 1e300)
OTHERS = ("x", [], {}, None, True, [1, "a"], 3.7, "", "${nowhere.key}", "nowhere.Class", -3)
EXTRA = ("kl_coef", "beta", "seed", "best_of", "max_grad_norm", "sampling_batch_size", "tau", "k")

Path_ = tuple[str | int, ...]


@cache
def whole(domain: str, algorithm: str) -> dict[str, Any]:
    """Return the config of a tiny run."""
    config: dict[str, Any] = {}
    for name in (f"domains/{domain}", f"algorithms/{algorithm}"):
        config |= yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
    data = config["data"]
    sizes = TINY_SPLITS[data["class_path"].rpartition(".")[2]]
    data.setdefault("init_args", {}).update({k: int(v) for k, v in (s.split("=") for s in sizes)})
    data["init_args"] |= {"batch_size": 2, "eval_batch_size": 2}
    model = config["model"].setdefault("init_args", {})
    model |= {"num_eval_samples": 1, "minibatch_size": 4}
    model["sampler"] = {**model.get("sampler", {}), "num_steps": 12}
    config["trainer"] = {
        "accelerator": "cpu", "max_epochs": 1, "limit_train_batches": 1, "precision": "32-true",
        "limit_val_batches": 1, "enable_progress_bar": False, "log_every_n_steps": 1,
    }  # fmt: skip
    config["seed_everything"] = 0
    return config


def places(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Iterate over the paths of all keys."""
    parts: Any = ()
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    for name, part in parts:
        yield (*path, name)
        yield from places(part, (*path, name))


def refusals(domain: str, algorithm: str) -> list[str]:
    """Return the words of a refusal that comes whatever the mistake, if it is not found first."""
    words = []
    if algorithm in GRADIENTS and domain == "shapes":
        words.append("differentiable reward")
    if algorithm in (*GRADIENTS, *FROM_NOISE, *STEPS) and domain.endswith("_mixed"):
        words.append("ProductProcess")
    if algorithm in FROM_DATA and domain == "shapes":
        words.append("the data have no")
    if algorithm == "dpo_offline":
        words.append("the data have no pairs")
    return words


def at(config: Any, path: Path_) -> Any:
    for name in path:
        config = config[name]
    return config


@st.composite
def mistakes(draw: st.DrawFn, domains: tuple[str, ...]) -> tuple[str, list[str]]:
    """Draw the text of a config with a mistake, and what a message may name."""
    domain, algorithm = draw(st.sampled_from(domains)), draw(st.sampled_from(ALGORITHMS))
    config = copy.deepcopy(whole(domain, algorithm))
    kind = draw(st.sampled_from(KINDS))
    known = list(places(config))
    if kind == "class":
        known = [path for path in known if path[-1] == "class_path"]
    elif kind in ("typo", "add"):
        known = [path for path in known if isinstance(path[-1], str)]
    path = known[draw(st.integers(0, len(known) - 1))]
    parent, last = at(config, path[:-1]), path[-1]
    old = parent[last]
    names = [str(part) for part in path if part not in ("init_args", "class_path")]
    if isinstance(parent, dict) and isinstance(parent.get("class_path"), str):
        names.append(parent["class_path"].rpartition(".")[2])
    if kind == "typo":
        place = draw(st.integers(0, len(str(last)) - 1))
        wrong = str(last)[:place] + "q" + str(last)[place + draw(st.integers(0, 1)) :]
        parent[wrong] = parent.pop(last)
        names.append(wrong)
    elif kind == "drop":
        del parent[last]
    elif kind == "type":
        parent[last] = draw(st.sampled_from(OTHERS))
        names += ["config"] if last in ("model", "data") else []
    elif kind == "number":
        number = draw(st.sampled_from(NUMBERS))
        parent[last] = [number, *old[1:]] if isinstance(old, list) and old else number
    elif kind == "class":
        entry = draw(st.sampled_from(index()))
        parent[last] = draw(st.sampled_from([entry.path, entry.name, entry.path.lower(), "x.Y"]))
        names += [entry.name, "x.Y", entry.domain or "", "domain"]
    elif kind == "add":
        name = draw(st.sampled_from(EXTRA))
        if isinstance(parent, dict):
            parent[name] = draw(st.sampled_from((*NUMBERS, *OTHERS)))
        names.append(name)
    text = yaml.safe_dump(config, sort_keys=False)
    if kind == "text":
        cut = draw(st.integers(1, len(text) - 1))
        filling = draw(st.sampled_from(["", "\t", "}", "\x00", "é: [", "\n- x\n", ": :"]))
        text = text[:cut] + filling + (text[cut:] if filling else "")
        # Where the cut comes between two keys, what is missing is named.
        names += ["case.yaml", "must be given", "there is no key", *map(str, config), "argument"]
    names += [*(["memory", "sizes"] if "000000" in text else []), *refusals(domain, algorithm)]
    return text, names


def check(case: tuple[str, list[str]], folder: Path) -> None:
    text, names = case
    shutil.rmtree(folder / "runs", ignore_errors=True)
    (folder / "case.yaml").write_text(text, encoding="utf-8")
    wrong = broken_rules(["fit", "--config=case.yaml", "--name=run"], names)
    assert not wrong, f"{wrong}\n{text}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


UNHURRIED = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


@settings(max_examples=FEW, **UNHURRIED)
@given(case=mistakes(("gaussian_mixture",)))
def test_a_few_mistakes(case: tuple[str, list[str]], folder: Path) -> None:
    check(case, folder)


@pytest.mark.slow
@settings(max_examples=MANY, **UNHURRIED)
@given(case=mistakes(DOMAINS))
def test_many_mistakes(case: tuple[str, list[str]], folder: Path) -> None:
    check(case, folder)
