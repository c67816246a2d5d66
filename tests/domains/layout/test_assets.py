"""The models that ship with the domain: what their README says of them, and their speed."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr

from domains.layout.data import LayoutData
from domains.layout.metrics import SetDistances, class_total_variation, source_layouts
from domains.layout.networks.encoder import LayoutEncoder, jittered, load_encoder, load_published
from domains.layout.page import measures
from domains.layout.pipeline import EMBEDDED, LayoutPipeline
from domains.layout.samples import Layouts
from domains.layout.sources import Grammar
from domains.layout.train import encoder as train_encoder
from domains.layout.train.encoder import accuracy, losses, question, train
from lit_rlft.core.checks import UsageError
from lit_rlft.core.sampling import Sampler
from lit_rlft.kit.data import collate
from tests.domains.layout.test_pipeline import assert_obeyed, sample

PAGES = source_layouts(Grammar(400, seed=1))


def drawn(name: str, task: str, num: int = 200, num_steps: int = 25, eta: float = 0.0) -> Layouts:
    pipeline = LayoutPipeline(name)
    data = LayoutData(Grammar(num + 40, seed=5), tasks={task: 1.0})
    data.setup("fit")
    rows = data.rows("train")
    condition = pipeline.encode(collate([rows[i] for i in range(num)]))
    layouts = pipeline.decode(sample(pipeline, condition, Sampler(num_steps, eta)), condition)
    assert_obeyed(layouts, condition)
    return layouts


def penalty(layouts: Layouts) -> torch.Tensor:
    return measures.overlap(layouts) + 10 * measures.alignment(layouts)


@pytest.mark.parametrize(
    ("name", "task", "limit"),
    [
        ("grammar", "unconditional", 0.15),
        ("grammar", "category", 0.33),
        ("grammar", "category_size", 0.33),
        ("grammar", "completion", 0.33),
        ("grammar_mixed", "unconditional", 0.28),
        ("grammar_mixed", "category", 0.42),
        ("grammar_gibbs", "unconditional", 0.21),
        ("grammar_gibbs", "category", 0.37),
    ],
)
def test_samples_are_as_good_as_the_readme_says(name: str, task: str, limit: float) -> None:
    layouts = drawn(name, task)
    assert penalty(layouts).mean() < limit
    assert class_total_variation(layouts, PAGES) < 0.06
    assert abs(layouts.num_elements.float().mean() - 8) < 0.7
    # There is something to learn: the best of four is far better.
    assert penalty(layouts).view(-1, 4).amin(dim=1).mean() < 0.6 * limit


@pytest.mark.parametrize("name", ["alignment", "overlap", "coverage", "inside_page"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_smooth_twins_rank_the_models_samples(name: str, eta: float) -> None:
    parts = [drawn("grammar", "unconditional", 150, steps, eta) for steps in (3, 6, 25)]
    measure: Any = getattr(measures, name)
    exact = torch.cat([measure(part) for part in parts])
    twin = torch.cat([measure(part, smooth=True) for part in parts])
    ranked = [values.double().round(decimals=5).numpy() for values in (exact, twin)]
    assert spearmanr(*ranked).statistic > 0.95


@pytest.mark.parametrize(("name", "least"), [("encoder", 0.9), ("critic", 0.88)])
def test_encoders_tell_jittered_pages(name: str, least: float) -> None:
    assert accuracy(load_encoder(name), PAGES, 0.005) > least
    assert accuracy(load_encoder(name), PAGES, 0.02) > least + 0.04


def test_features_do_not_depend_on_order_or_empty_slots() -> None:
    encoder = load_encoder("encoder")
    shuffle = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    moved = Layouts.of(PAGES.boxes[:, shuffle], PAGES.labels[:, shuffle], PAGES.classes)
    torch.testing.assert_close(encoder(moved), encoder(PAGES), atol=1e-4, rtol=1e-4)
    junk = PAGES.boxes.where(PAGES.valid.unsqueeze(-1), 0.7)
    same = Layouts.of(junk, PAGES.labels, PAGES.classes)
    torch.testing.assert_close(encoder(same), encoder(PAGES), atol=1e-5, rtol=1e-5)
    wider = Layouts.of(
        torch.nn.functional.pad(PAGES.boxes, (0, 0, 0, 5)),
        torch.nn.functional.pad(PAGES.labels, (0, 5), value=-1),
        PAGES.classes,
    )
    torch.testing.assert_close(encoder(wider), encoder(PAGES), atol=1e-4, rtol=1e-4)


def test_the_encoders_training_lowers_its_loss_and_files_give_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_encoder, "NUM_PAGES", 2048)
    fresh, trained = LayoutEncoder(), train(num_steps=25, seed=0)
    questions = question(PAGES, torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = (losses(n.eval(), *questions) for n in (fresh, trained))
        assert after < 0.8 * before
        trained.save(tmp_path)
        loaded = load_encoder(str(tmp_path))
        torch.testing.assert_close(loaded(PAGES), trained(PAGES), atol=0.05, rtol=0.05)


def test_published_networks_load_by_their_own_names(tmp_path: Path) -> None:
    # The layer names of the layout networks that LayoutFlow and others use.
    width, count = 32, 6
    layer = torch.nn.TransformerEncoderLayer(width, 4, width // 2, dropout=0.1)
    core = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    label, box = torch.nn.Embedding(count, width), torch.nn.Linear(4, width)
    both, token = torch.nn.Linear(2 * width, width), torch.randn(1, 1, width)
    parts = {"emb_label": label, "fc_bbox": box, "enc_fc_in": both, "enc_transformer.core": core}
    parts |= {"fc_out_disc": torch.nn.Linear(width, 1), "dec_fc_in": torch.nn.Linear(64, width)}
    parts |= {"dec_transformer": core, "fc_out_cls": torch.nn.Linear(width, count)}
    parts |= {"fc_out_bbox": torch.nn.Linear(width, 4)}
    state = {f"module.{n}.{k}": v for n, m in parts.items() for k, v in m.state_dict().items()}
    state |= {"module.enc_transformer.token": token, "module.pos_token": torch.rand(20, 1, width)}
    state["module.enc_transformer.token_mask"] = torch.zeros(1, 1, dtype=torch.bool)
    torch.save(state, tmp_path / "fid.pth.tar")
    network = load_published(str(tmp_path / "fid.pth.tar"), "publaynet")
    # The same features, computed as the literature has it: sequence first, padding hidden.
    page = PAGES.index(slice(0, 5))
    edges = page.edges * page.valid.unsqueeze(-1)
    numbers = (page.labels + 1).clamp(min=0)
    elements = torch.relu(both(torch.cat([box(edges), label(numbers)], dim=-1)))
    tokens = torch.cat([token.expand(-1, 5, -1), elements.transpose(0, 1)])
    hidden = torch.nn.functional.pad(~page.valid, (1, 0))
    wanted = core(tokens, src_key_padding_mask=hidden)[0]
    torch.testing.assert_close(network(page), wanted, atol=1e-5, rtol=1e-5)
    distances = SetDistances(Grammar(num_pages=32), pretrained=str(tmp_path / "fid.pth.tar"))
    assert distances.encoder.state_dict().keys() == network.state_dict().keys()
    torch.testing.assert_close(distances.encoder(page), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match=r"published layout network for 25 classes"):
        load_published(str(tmp_path / "fid.pth.tar"), "rico")
    with pytest.raises(UsageError, match="could not be loaded"):
        load_published(str(tmp_path / "missing"), "rico")


def test_the_readme_names_every_asset() -> None:
    text = (EMBEDDED / "README.md").read_text()
    folders = {path.name for path in EMBEDDED.iterdir() if path.is_dir()}
    assert folders == set(re.findall(r"^\| `(\w+)` \| (?:`Layout|the same)", text, re.MULTILINE))
    assert sum(p.stat().st_size for p in EMBEDDED.rglob("*") if p.is_file()) < 4e6


def test_jitter_moves_boxes_by_its_standard_deviation() -> None:
    shaken = jittered(PAGES, torch.full((400,), 0.01), torch.Generator().manual_seed(0))
    moved = (shaken.boxes - PAGES.boxes)[PAGES.valid][:, :2]
    assert moved.std().item() == pytest.approx(0.01, rel=0.1)
    assert torch.equal(shaken.labels, PAGES.labels)
