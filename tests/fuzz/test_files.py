"""Files with faults: cut off, with flipped bits, in another encoding, empty or too long."""

import gzip
import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tests.fuzz.harness import broken_rules  # noqa: E402
from tests.fuzz.test_configs import UNHURRIED, folder  # noqa: E402, F401
from tests.support import ROOT, TINY_SPLITS  # noqa: E402

MANY = int(os.environ.get("LIT_RLFT_FUZZ_FILES", "500"))
FEW = 12

QUICK = ["--trainer.accelerator=cpu", "--trainer.limit_train_batches=1"]
QUICK += ["--trainer.enable_progress_bar=false", "--model.sampler.num_steps=2"]
MIXTURE = ["--config=gaussian_mixture", "--config=p_graft", "--data.batch_size=2", *QUICK]
MIXTURE += [f"--data.{size}" for size in TINY_SPLITS["MixtureData"]]
LAYOUT = ["--config=layout", "--config=p_graft", "--metrics.parts=[]", *QUICK]
MOLECULES = ["--config=molecule_soft", "--config=p_graft", "--metrics.parts=[]", *QUICK]
PICTURES = ["--config=digits", "--config=p_graft", "--metrics.parts=[]", *QUICK]
SHAPES = ["--config=shapes", "--config=p_graft", "--metrics.parts=[]", *QUICK]

SOURCE = "--data.source.path=case/"
ASSETS = ROOT / "domains"
SMILES = ["C", "CC", "CCO", "C#N", "CC=O", "OCC", "CCC", "CN"]
PAGE = {"canvas": [612, 792], "elements": [{"label": "text", "box": [60, 60, 200, 90]}]}
XYZ = "5\nmethane\nC 0 0 0\nH .63 .63 .63\nH -.63 -.63 .63\nH -.63 .63 -.63\nH .63 -.63 -.63\n"


def saved(write: Callable[[BytesIO], object]) -> bytes:
    buffer = BytesIO()
    write(buffer)
    return buffer.getvalue()


def picture() -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (16, 16), np.uint8)
    return saved(lambda file: Image.fromarray(noise).save(file, format="PNG"))


@cache
def originals() -> dict[str, tuple[bytes, list[str]]]:
    """Return files by name, with the command that reads each."""
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 16, 1), np.uint8)
    prompts = [f"a {colour} ring" for colour in ("red", "green", "blue", "cyan", "grey", "pink")]
    records = [{"prompt": text} for text in prompts]
    lines = "\n".join(json.dumps(PAGE) for _ in range(12))
    csv = "smiles\n" + "\n".join(SMILES)
    source, smiles = "--data.source=", [*MOLECULES, "--data=MoleculeData"]
    prompted = [*SHAPES, "--data=PromptData"]
    files: dict[str, tuple[str | bytes, list[str]]] = {
        "case.yaml": (
            "model:\n  init_args:\n    num_candidates: 2\n    cut: 0.5\nseed_everything: 1\n",
            [*MIXTURE, "--config=case/case.yaml"],
        ),
        "pages.jsonl": (lines, [*LAYOUT, f"{source}JSONLayouts", f"{SOURCE}pages.jsonl"]),
        "mols.csv": (csv, [*smiles, f"{source}SmilesFile", f"{SOURCE}mols.csv"]),
        "mols.smi": ("\n".join(SMILES), [*smiles, f"{source}SmilesFile", f"{SOURCE}mols.smi"]),
        "mols.xyz": (XYZ * 8, [*smiles, f"{source}MoleculeFile", f"{SOURCE}mols.xyz"]),
        "pixels.npy": (
            saved(lambda file: np.save(file, pixels)),
            [*PICTURES, f"{source}Arrays", f"{SOURCE}pixels.npy"],
        ),
        "pixels.npz": (
            saved(lambda file: np.savez(file, images=pixels)),
            [*PICTURES, f"{source}Arrays", f"{SOURCE}pixels.npz"],
        ),
        "pixels.gz": (
            gzip.compress(pixels.tobytes()),
            [*PICTURES, f"{source}Arrays", f"{SOURCE}pixels.gz"],
        ),
        "prompts.txt": ("\n".join(prompts), [*prompted, "--data.source=case/prompts.txt"]),
        "prompts.json": (json.dumps(records), [*prompted, "--data.source=case/prompts.json"]),
        "prompts.csv": (
            "prompt\n" + "\n".join(prompts),
            [*prompted, "--data.source=case/prompts.csv"],
        ),
    }
    for name in ("config.json", "model.safetensors"):
        for domain, model, command in (
            ("layout", "grammar", LAYOUT),
            ("molecule", "small", MOLECULES),
        ):
            asset = (ASSETS / domain / "assets" / model / name).read_bytes()
            files[f"{model}/{name}"] = asset, [*command, f"--pipeline.pretrained=case/{model}"]
        asset = (ASSETS / "layout/assets/critic" / name).read_bytes()
        reward = ["--reward=Critic", "--reward.pretrained=case/critic"]
        files[f"critic/{name}"] = asset, [*LAYOUT, *reward]
    return {
        name: (text.encode() if isinstance(text, str) else text, command)
        for name, (text, command) in files.items()
    }


@st.composite
def mistakes(draw: st.DrawFn, names: tuple[str, ...] = ()) -> tuple[str, bytes]:
    """Draw the name of one of these files, or of any, and its faulty contents."""
    name = draw(st.sampled_from(names or (*originals(), "last.ckpt")))
    content = originals()[name][0] if name != "last.ckpt" else trained()
    kind = draw(st.sampled_from(("cut", "bits", "bits", "encoding", "empty", "zeros", "twice")))
    place = draw(st.integers(0, len(content) - 1))
    if kind == "cut":
        return name, content[:place]
    if kind == "bits":
        changed = bytearray(content)
        # Headers are near the beginning.
        near = st.integers(0, min(len(content), draw(st.sampled_from((64, 4096, 10**9)))) - 1)
        for where in draw(st.lists(near, min_size=1, max_size=12)):
            changed[where] ^= 1 << draw(st.integers(0, 7))
        return name, bytes(changed)
    if kind == "encoding":
        text = content.decode("latin-1")
        return name, text.encode(draw(st.sampled_from(("utf-16", "utf-8-sig", "utf-32"))))
    if kind == "zeros":
        return name, content[:place] + bytes(len(content) - place)
    return name, b"" if kind == "empty" else content * 2


@cache
def trained() -> bytes:
    """Return a checkpoint of the mixture."""
    import tempfile

    from lit_rlft.cli import main
    from tests.support import working_directory

    with tempfile.TemporaryDirectory() as folder_, working_directory(Path(folder_)):
        main(["fit", *MIXTURE, "--name=run"])
        return Path("runs/run/checkpoints/last.ckpt").read_bytes()


def check(case: tuple[str, bytes], folder_: Path) -> None:
    name, content = case
    for made in ("runs", "case", "cache"):
        shutil.rmtree(folder_ / made, ignore_errors=True)
    path = folder_ / "case" / name
    if "/" in name:
        domain = {"grammar": "layout", "critic": "layout", "small": "molecule"}[path.parent.name]
        shutil.copytree(ASSETS / domain / "assets" / path.parent.name, path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if name == "last.ckpt":
        words = ["test", *MIXTURE, "--ckpt_path=case/last.ckpt", "--name=run"]
    else:
        words = ["fit", *originals()[name][1], "--name=run"]
    names = [path.name, path.parent.name if "/" in name else "case/"]
    # A config that is still YAML names its keys instead.
    names += ["model", "seed_everything", "there is no key"] if name == "case.yaml" else []
    wrong = broken_rules(words, names)
    assert not wrong, f"{name}, {len(content)} bytes {content[:200]!r}: {wrong}"


@settings(max_examples=FEW, **UNHURRIED)
@given(case=mistakes(("case.yaml", "last.ckpt", "pages.jsonl")))
def test_a_few_faulty_files(case: tuple[str, bytes], folder: Path) -> None:  # noqa: F811
    check(case, folder)


@pytest.mark.slow
@settings(max_examples=MANY, **UNHURRIED)
@given(case=mistakes())
def test_many_faulty_files(case: tuple[str, bytes], folder: Path) -> None:  # noqa: F811
    check(case, folder)
