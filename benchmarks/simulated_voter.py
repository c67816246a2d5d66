"""What a person's votes gain: a voter that is a program, through the page's own HTTP interface.

Method: P-GRAFT on the embedded shapes model, as configs/experiments/shapes_p_graft.yaml has it,
with `HumanPreference` as the reward. `lit-rlft fit` runs in this process and `lit-rlft vote` as
another program. A voter asks for the next question, fetches the pictures and answers, as a browser
does. Four candidates of a prompt are shown at a time; the chosen one is accepted, the others are
rejected (contrast). 12 rounds of 50 prompts are 600 votes.

* `preferring` chooses the picture with the highest ShapesEval, by chance among equal ones, and says
  "no difference" where all four are equal.
* `random` chooses by chance: the control, which must not gain.

The gain is that of ShapesEval over the pretrained model, under 192 held-out prompts, 4 samples each
from the same noise, with the standard error of paired samples.

    python benchmarks/simulated_voter.py --root runs/simulated_voter
"""

import argparse
import io
import json
import random
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image

from domains.text_to_image.rewards import ShapesEval
from lit_rlft.cli import main as command
from lit_rlft.core.pipeline import Condition

VOTERS = ("preferring", "random")
METRICS = '[{"class_path": "domains.text_to_image.rewards.ShapesEval"}]'
PROMPTS = 50


class Voter(threading.Thread):
    """Votes on what a fit asks until it is told to stop.

    Args:
        run: Folder of the fit.
        prefers: Whether it looks at the pictures.
        seed: Of what it leaves to chance.
    """

    def __init__(self, run: Path, prefers: bool, seed: int) -> None:
        super().__init__(daemon=True)
        self.run_folder, self.prefers = run, prefers
        self.chance, self.reward = random.Random(seed), ShapesEval()
        self.over, self.num_votes, self.num_ties = threading.Event(), 0, 0

    def run(self) -> None:
        """Serve the page and vote."""
        while not (self.run_folder / "votes").is_dir():
            if self.over.wait(0.1):
                return
        words = [sys.executable, "-m", "lit_rlft", "vote", str(self.run_folder), "--port=0"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            found = re.search(r"http://\S+/", server.stdout.readline())
            assert found is not None
            while not self.over.is_set():
                question = self._asked(f"{found[0]}next?voter=program")["question"]
                if question is None:
                    self.over.wait(0.05)
                else:
                    self._vote(found[0], question)
            server.terminate()

    def _vote(self, url: str, question: dict[str, Any]) -> None:
        places = [*range(question["count"])]
        if self.prefers:
            pictures = [self._picture(f"{url}drawing/{question['id']}/{i}") for i in places]
            prompts = torch.zeros(len(places), dtype=torch.int64)
            condition = Condition([{"prompt": question["label"]}], {}, prompts)
            scores = self.reward(torch.stack(pictures), condition).tolist()
            places = [i for i in places if scores[i] == max(scores)]
        tied = self.prefers and len(places) == question["count"]
        choice = None if tied else self.chance.choice(places)
        body = {"voter": "program", "question": question["id"], "choice": choice}
        self._asked(f"{url}vote", body)
        self.num_votes, self.num_ties = self.num_votes + 1, self.num_ties + tied

    def _asked(self, url: str, body: Any = None) -> dict[str, Any]:
        text = None if body is None else json.dumps(body).encode()
        with urlopen(Request(url, text, {"Content-Type": "application/json"})) as answer:
            return dict(json.load(answer))

    def _picture(self, url: str) -> torch.Tensor:
        with urlopen(url) as answer:
            image = Image.open(io.BytesIO(answer.read())).convert("RGB")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def measure(root: Path, voter: str, seed: int, votes: int, extra: list[str]) -> dict[str, float]:
    """Train with a voter, test, and return the gain, its error, votes and ties."""
    run = root / f"{voter}_{seed}"
    words = [
        *(
            "--config=configs/experiments/shapes_p_graft.yaml",
            f"--root={root}",
            f"--name={run.name}",
        ),
        *("--reward=lit_rlft.voting.human_preference.HumanPreference", "--reward.show=groups"),
        *("--reward.values=wins", "--reward.undo_seconds=0", f"--metrics.parts={METRICS}"),
        *(f"--data.num_train_prompts={votes}", f"--data.batch_size={PROMPTS}"),
        *("--model.num_epochs=4", "--trainer.limit_val_batches=0", f"--model.seed={seed}"),
        *("--trainer.enable_progress_bar=false", "--checkpoint.every_minutes=null", *extra),
    ]
    somebody = Voter(run, voter == "preferring", seed)
    somebody.start()
    try:
        command(["fit", *words])
    finally:
        somebody.over.set()
        somebody.join()
    command(["test", *words])
    gain = json.loads((run / "metrics.json").read_text())["gain"]["ShapesEval"]
    return {**gain, "votes": somebody.num_votes, "ties": somebody.num_ties}


def main() -> None:
    """Run both voters and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("runs/simulated_voter"))
    parser.add_argument("--voters", nargs="+", choices=VOTERS, default=VOTERS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--votes", type=int, default=600)
    options, extra = parser.parse_known_args()
    for voter in options.voters:
        found = measure(options.root, voter, options.seed, options.votes, extra)
        errors = found["mean"] / found["sem"]
        print(
            f"{voter}: {found['votes']} votes, {found['ties']} of them without a difference; gain "
            f"{found['mean']:+.4f} ± {found['sem']:.4f}, {errors:+.1f} standard errors",
            flush=True,
        )


if __name__ == "__main__":
    main()
