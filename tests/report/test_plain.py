"""Settings as plain values, and texts without paths of the machine or secrets."""

from pathlib import Path

import pytest

from lit_rlft.core.settings import without_secrets
from lit_rlft.runs.plain import HIDDEN, flat, told


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see /home/jane/models/sd/unet.bin for it", "see unet.bin for it"),
        ("'/tmp/a-b/c' and file:///srv/data/x.npz", "'c' and x.npz"),
        ("~/.cache/hub/model.json (damaged)", "model.json (damaged)"),
        (r"C:\Users\jane\run and D:/data/x", "run and x"),
        (f"{Path.home()}/Jane Doe/x", "Jane Doe/x"),
        ("https://example.org/a/b and a/b/c, and/or 1/2", None),
        ("https://jane:geheim@example.org/a", f"https://{HIDDEN}@example.org/a"),
        ("http://h/score?api_key=abc&n=2", f"http://h/score?api_key={HIDDEN}&n=2"),
        (
            "http://h/?client_secret=a&password=b",
            f"http://h/?client_secret={HIDDEN}&password={HIDDEN}",
        ),
        ("hf_AbCdEfGhIjKlMnOp is no token", f"{HIDDEN} is no token"),
        ("xoxb-123456-AbCdEf is no token", f"{HIDDEN} is no token"),
        ("hf_hub_download of hf_internal_testing", "hf_hub_download of hf_internal_testing"),
        ("a ring bearer standing tall", "a ring bearer standing tall"),
        ("Authorization: Bearer abc.def-123456", f"Authorization: Bearer {HIDDEN}"),
    ],
)
def test_texts_lose_paths_and_secrets_alone(text: str, expected: str | None) -> None:
    assert told(text) == (text if expected is None else expected)


def test_settings_are_told_by_key() -> None:
    config = {
        "model": {
            "class_path": "lit_rlft.algorithms.graft.GRAFT",
            "init_args": {"lora": {"rank": 4}, "betas": [0.9, 0.95], "num_tokens": 7},
        },
        "reward": {"class_path": "my.Reward", "init_args": {"token": "abc", "path": "/srv/m/w.pt"}},
        "data": {"source": {"class_path": "a.B"}, "parts": [{"class_path": "c.D"}]},
        "none": None,
    }
    assert flat(config) == {
        "model": "GRAFT",
        "model.lora.rank": 4,
        "model.betas": "0.9, 0.95",
        "model.num_tokens": 7,
        "reward": "Reward",
        "reward.token": HIDDEN,
        "reward.path": "w.pt",
        "data.source": "B",
        "data.parts.0": "D",
        "none": None,
    }


def test_secrets_are_hidden_wherever_they_are() -> None:
    config = {"reward": {"url": "http://h/?key=abc", "token": "abc", "use_token": False}, "n": [1]}
    assert without_secrets(config) == {
        "reward": {"url": f"http://h/?key={HIDDEN}", "token": HIDDEN, "use_token": False},
        "n": [1],
    }
