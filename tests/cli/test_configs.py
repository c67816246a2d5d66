"""Every config is parsed, and run at a tiny size where that is quick; slow tests combine all."""

import importlib
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lit_rlft
from lit_rlft.cli import main
from tests.support import TINY_RUN, TINY_SPLITS

CONFIGS = Path(lit_rlft.__file__).parents[1] / "configs"
ASSETS = CONFIGS.parent / "domains/text_to_image/assets"
DOMAINS, ALGORITHMS, TRAINERS, EXPERIMENTS = (
    sorted((CONFIGS / folder).glob("*.yaml"))
    for folder in ("domains", "algorithms", "trainer", "experiments")
)
# Domains whose models are so small that every algorithm is run on them.
SMALL = {"gaussian_mixture", "layout", "molecule_soft", "digits"}
MIXED = {"layout_mixed", "molecule_mixed"}
# Of `layout_gibbs` a model ships; of the other `run` writes one that is not trained.
GIBBS = {"layout_gibbs", "molecule_gibbs"}
# Models of the hub: test_families.py runs tiny ones in their places.
HUB = {"flux", "flux2_klein", "sana", "sd15", "sd2", "sd35", "sdxl", "zimage"}
# Recipes of the hub's models: test_recipes.py runs tiny ones in their places.
OF_THE_HUB = {path.stem for path in EXPERIMENTS if path.stem.split("_")[0] in {*HUB, "sd35m"}}
# What another experiment runs too, with other numbers.
LONG = {
    *(
        "shapes_pretrain_2",
        "shapes_pretrain_3",
        "shapes_pretrain_4",
        "shapes_pretrain_5",
        "shapes_unconditional_pretrain",
        "publaynet_pretrain",
        "qm9_pretrain",
    ),
    *("digits_pretrain", "layout_mixed_pretrain", "molecule_heavy_pretrain", "layout_pretrain"),
    *("molecule_mixed_pretrain", "molecule_gibbs_pretrain", "layout_gibbs_pretrain"),
    "shapes_drtune",
}
WEIGHTS = [ASSETS / "shapes/unet/diffusion_pytorch_model.safetensors", ASSETS / "shapes_clip"]
# What needs a continuous state.
CONTINUOUS = {"AdjointMatching", "RewardGradient", "NoisePPO", "InverseNoiseCorrection"}
CONTINUOUS_SETTINGS = {"mix_grpo": "sliding must be null", "grpo_guard": "ratio_norm must be false"}
CONTINUOUS_SETTINGS |= {"flow_grpo_fast": "sliding must be null"}
# Of each family's algorithm these are other settings: test_runs.py and test_ddpo.py train and
# test them on the Gaussian mixture; here they run only where slow tests are asked for.
VARIANTS = {"align_prop", "ddpo_sf", "dpok", "draft", "draft_lv", "grpo", "refl", "raft", "rwr"}
VARIANTS |= {"dpo_offline", "flow_grpo", "flow_grpo_fast", "mix_grpo", "grpo_guard"}
# What runs by default. The other files of this folder run all other algorithms on the Gaussian
# mixture, and test_pipeline.py of layouts and molecules runs them on their models.
DEFAULT = {
    "digits": {"inverse_noise_correction", "noise_ppo", "p_graft"},
    "gaussian_mixture": {"p_graft", "random_k"},
    "layout": {"p_graft"},
    # test_gibbs.py runs the algorithms on smaller models.
    "layout_gibbs": set(),
    "layout_mixed": {"ddpo"},
    "molecule_gibbs": set(),
    "molecule_mixed": {"ddpo"},
    "molecule_soft": {"drtune"},
}
# Experiments run the same models, data, rewards and algorithm by default.
IN_EXPERIMENTS = {"molecule", "shapes", "shapes_unconditional"}
# What needs data, and data that are none.
FROM_DATA, CONDITIONS = {"Pretrain", "InverseNoiseCorrection"}, {"AtomCounts"}
needs_weights = pytest.mark.skipif(
    not all(path.exists() for path in WEIGHTS), reason="the embedded models are not trained yet"
)
TINY = [
    *TINY_RUN,
    "--trainer.devices=1",
    "--trainer.max_epochs=1",
    "--trainer.limit_val_batches=1",
    "--trainer.val_check_interval=1",
]
# What makes a method fit into two sampling steps.
TINY_METHODS = {"DRTune": ("k=1", "m=1"), "ReFL": ("m=1",)}
# What makes data that are generated quick to generate.
TINY_SOURCES = {
    "Grammar": ("num_pages=64",),
    "Enumerated": ("max_heavy=3", "num_attempts=500"),
    "Generated": ("num_images=64",),
}
# What makes metrics quick that compare with a set: a small set, few draws for the errors.
TINY_METRICS: dict[str, dict[str, Any]] = {
    "domains.layout.metrics.SetDistances": {"max_layouts": 64, "num_draws": 2},
    "domains.image.metrics.SetDistances": {"max_images": 64, "num_draws": 2},
    "domains.molecule.metrics.SetDistances": {"max_molecules": 64, "num_draws": 2},
    "domains.molecule.metrics.Novelty": {
        "source": {
            "class_path": "domains.molecule.sources.Enumerated",
            "init_args": {"max_heavy": 3, "num_attempts": 500},
        }
    },
}


def name(path: Path) -> str:
    return path.stem


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def parsed(configs: list[Path], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    with pytest.raises(SystemExit) as raised:
        main(["fit", *(f"--config={path}" for path in configs), "--print_config"])
    assert raised.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def tiny_metrics(configs: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write a config of the same metrics, made quick, where there are metrics."""
    metrics = next((config["metrics"] for config in configs if "metrics" in config), None)
    if metrics is None:
        return []
    for part in metrics["parts"]:
        part["init_args"] = part.get("init_args", {}) | TINY_METRICS.get(part["class_path"], {})
    path = folder / "metrics.yaml"
    path.write_text(yaml.safe_dump({"metrics": metrics}))
    return [path]


def run(configs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train one tiny round of a config, then test the result."""
    monkeypatch.chdir(tmp_path)
    loaded = [load(path) for path in configs]
    if configs[0].stem == "molecule_gibbs":
        write_untrained(configs[0].stem, loaded[0]["pipeline"])
    data = next(config["data"] for config in loaded if "data" in config)
    splits = [*TINY_SPLITS[class_name(data)]]
    source = data["init_args"].get("source", {})
    if isinstance(source, dict):
        kind = source.get("class_path", "").rpartition(".")[2]
        splits += [f"source.init_args.{setting}" for setting in TINY_SOURCES.get(kind, ())]
    flags = [f"--config={path}" for path in [*configs, *tiny_metrics(loaded, tmp_path)]]
    method = next((c["model"]["init_args"].get("method") for c in loaded if "model" in c), None)
    settings = TINY_METHODS.get(class_name(method), ()) if method else ()
    flags += [f"--model.init_args.method.init_args.{setting}" for setting in settings]
    if any("sliding" in c["model"]["init_args"] for c in loaded if "model" in c):
        flags.append("--model.init_args.sliding.size=1")
    flags += [*TINY, *(f"--data.init_args.{split}" for split in splits), "--name=run"]
    main(["fit", *flags])
    last = "runs/run/checkpoints/last.ckpt"
    trained = torch.load(last, weights_only=True)["state_dict"]
    assert trained and all(value.isfinite().all() for value in trained.values())
    main(["test", *flags, f"--ckpt_path={last}"])
    assert Path("runs/run/metrics.json").is_file()


def write_untrained(domain: str, pipeline: dict[str, Any]) -> None:
    """Write a model where the domain's experiment of pretraining would write one."""
    experiment = load(CONFIGS / f"experiments/{domain}_pretrain.yaml")
    path = pipeline["init_args"]["pretrained"]
    assert path == f"runs/{domain}_pretrain/tuned"
    module = importlib.import_module(pipeline["class_path"].rpartition(".")[0])
    sizes = experiment["pipeline"]["init_args"]["architecture"]
    made = getattr(module, class_name(pipeline))(None, architecture=module.Architecture(**sizes))
    made.save(Path(path))


def refusal(domain: Path, algorithm: Path) -> str | None:
    """Return what a combination that cannot work is refused with."""
    kind = class_name(load(algorithm)["model"])
    if domain.stem in MIXED | GIBBS and kind in CONTINUOUS:
        return r"(Product|Gibbs)Process.*use configs/algorithms/"
    if domain.stem in MIXED and algorithm.stem in CONTINUOUS_SETTINGS:
        return rf"{CONTINUOUS_SETTINGS[algorithm.stem]} for a ProductProcess"
    if domain.stem in GIBBS and algorithm.stem in ("flow_grpo", *CONTINUOUS_SETTINGS):
        return "transition must be eta for a GibbsProcess"
    if class_name(load(domain)["data"]) in CONDITIONS and kind in FROM_DATA:
        return r"the data have no 'types'.*pretrain\.yaml"
    if algorithm.stem == "dpo_offline":
        return "the data have no pairs; give --data PreferencePairs"
    return None


def runs_by_default(domain: Path, algorithm: Path) -> bool:
    refused = refusal(domain, algorithm) is not None and algorithm.stem not in VARIANTS
    return (refused and domain.stem != "molecule_gibbs") or algorithm.stem in DEFAULT[domain.stem]


def class_name(part: dict[str, Any]) -> str:
    return part["class_path"].rpartition(".")[2]


@pytest.mark.parametrize("path", [*DOMAINS, *ALGORITHMS, *EXPERIMENTS, *TRAINERS], ids=name)
def test_the_first_line_says_how_to_run_it_or_what_it_is(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    if path in TRAINERS:
        return
    words = shlex.split(first[2:])
    assert words[:2] == ["lit-rlft", "fit"]
    named = [CONFIGS.parent / word for word in words if word.startswith("configs/")]
    assert path in named and all(config.is_file() for config in named)


def test_domains_and_algorithms_set_nothing_alike() -> None:
    """So what one combination parses to, another does."""
    keys = [{key for path in paths for key in load(path)} for paths in (DOMAINS, ALGORITHMS)]
    assert keys[0] and keys[1] and not keys[0] & keys[1]


def slow(needed: bool) -> list[pytest.MarkDecorator]:
    """Mark what does not run by default."""
    return [] if needed else [pytest.mark.slow]


def pair(domain: Path, algorithm: Path, *, needed: bool) -> Any:
    """Return a parameter of a test; one that is not needed does not run by default."""
    name = f"{domain.stem}-{algorithm.stem}"
    return pytest.param(domain, algorithm, id=name, marks=slow(needed))


@pytest.mark.parametrize(
    ("domain", "algorithm"),
    [
        # By default each algorithm once, and each domain at least once.
        pair(domain, algorithm, needed=j % len(DOMAINS) == i)
        for i, domain in enumerate(DOMAINS)
        for j, algorithm in enumerate(ALGORITHMS)
    ],
)
def test_domains_and_algorithms_combine(
    domain: Path, algorithm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = parsed([domain, algorithm], capsys)
    for part in ("pipeline", "reward", "data"):
        assert class_name(config[part]) == class_name(load(domain)[part])
    assert class_name(config["model"]) == class_name(load(algorithm)["model"])


@pytest.mark.parametrize("trainer", TRAINERS, ids=name)
def test_trainers_are_understood(trainer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = parsed([DOMAINS[0], ALGORITHMS[0], trainer], capsys)
    assert load(trainer)["trainer"].items() <= config["trainer"].items()


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=name)
def test_experiments_run_on_any_machine(experiment: Path) -> None:
    assert load(experiment)["trainer"].get("accelerator", "auto") in ("cpu", "auto")


@pytest.mark.parametrize(
    ("domain", "algorithm"),
    [
        pair(domain, algorithm, needed=runs_by_default(domain, algorithm))
        for domain in DOMAINS
        if domain.stem in SMALL | MIXED | GIBBS
        for algorithm in ALGORITHMS
    ],
)
def test_small_domains_run_or_are_refused_by_name(
    domain: Path, algorithm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs, message = [domain, algorithm, CONFIGS / "trainer/cpu.yaml"], refusal(domain, algorithm)
    if message is None:
        run(configs, tmp_path, monkeypatch)
        return
    with pytest.raises(SystemExit, match=message):
        run(configs, tmp_path, monkeypatch)


@needs_weights
@pytest.mark.parametrize(
    "domain",
    [
        pytest.param(domain, id=domain.stem, marks=slow(domain.stem not in IN_EXPERIMENTS))
        for domain in DOMAINS
        if domain.stem not in SMALL | MIXED | GIBBS | HUB
    ],
)
def test_embedded_domains_run(
    domain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run([domain, CONFIGS / "algorithms/p_graft.yaml"], tmp_path, monkeypatch)


@needs_weights
@pytest.mark.parametrize(
    "experiment",
    [
        pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem in LONG else [])
        for path in EXPERIMENTS
        if path.stem not in OF_THE_HUB
    ],
)
def test_experiments_run(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Later stages of pretraining start from what the earlier ones wrote.
    for stage in ("shapes_pretrain", "shapes_pretrain_2", "shapes_pretrain_4"):
        (tmp_path / "runs" / stage).mkdir(parents=True)
        (tmp_path / "runs" / stage / "tuned").symlink_to(WEIGHTS[0].parents[1])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("train.json", "val.json"):
        write_publaynet(tmp_path / name)
    write_qm9(tmp_path)
    run([experiment], tmp_path, monkeypatch)


def write_publaynet(path: Path) -> None:
    """Write a file of twenty pages in PubLayNet's format."""
    names = ("text", "title", "list", "table", "figure")
    content = {
        "images": [{"id": i, "width": 600, "height": 800} for i in range(20)],
        "annotations": [
            {"image_id": i, "category_id": 1 + j, "bbox": [50, 50 + 100 * j, 400 + i, 80]}
            for i in range(20)
            for j in range(3)
        ],
        "categories": [{"id": 1 + i, "name": name} for i, name in enumerate(names)],
    }
    path.write_text(json.dumps(content))


def write_qm9(folder: Path) -> None:
    """Write thirty molecules as QM9's archive unpacks them, under the name of the archive."""
    unpacked = folder / "dsgdb9nsd.xyz.tar.bz2"
    unpacked.mkdir()
    for i in range(30):
        length = 0.62 + 0.001 * i
        signs = [(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)]
        places = [("C", 0.0, 0.0, 0.0), *(("H", *(length * s for s in sign)) for sign in signs)]
        atoms = "".join(f"{s}\t{x}\t{y}\t{z}\t0.0\n" for s, x, y, z in places)
        (unpacked / f"dsgdb9nsd_{i + 1:06d}.xyz").write_text(f"5\ngdb {i + 1}\n{atoms}0\nC\tC\n")
    header = "\n".join(["-"] * 9)
    (folder / "uncharacterized.txt").write_text(f"{header}\n  999  C  C\n")
