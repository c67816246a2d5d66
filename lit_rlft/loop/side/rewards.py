"""Rewards that run beside sampling: the setting, and the rewards that stand for others."""

import sys
import time
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lit_rlft.core.answers import device_of
from lit_rlft.core.checks import BadArgument, UsageError, at_least, one_of, positive, require
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Combination, Reward
from lit_rlft.loop.side.call import Answer, Call
from lit_rlft.loop.side.lane import Lane
from lit_rlft.loop.side.worker import SideProcess, SideThread, Worker, packed

__all__ = ["RewardWorkers", "SideReward", "SideTimes", "begin", "side_rewards"]

Kind = Literal["forward", "evaluate"]
Workers = Literal["process", "thread"]


@dataclass(frozen=True)
class RewardWorkers:
    """Rewards in workers of their own, which score samples while the next ones are drawn.

    Rewards are the same as without workers, to the last bit: chunks are, and so is their order. A
    combined reward has a worker for each part. Every process of a run has its own ones.

    Attributes:
        kind: Workers are processes, or threads of this one: enough for rewards that wait for
            others, as `HTTPReward`, which gets a thread in either case.
        parts: Names of the parts of a combined reward that have workers; None for all.
        devices: Where the workers compute, such as [cuda:1, cuda:2], shared out in turn over
            processes and parts; None for where samples are.
        ahead: Chunks that may wait for their rewards before sampling waits, which bounds the
            memory.
        timeout: Seconds that a chunk may take; a worker that takes longer is given up.
        restarts: How often a worker that died or was given up is started again.
    """

    kind: Workers = "process"
    parts: list[str] | None = None
    devices: list[str] | None = None
    ahead: int = 4
    timeout: float = 600.0
    restarts: int = 3

    def __post_init__(self) -> None:
        one_of(self, "kind", get_args(Workers))
        if self.kind == "process" and sys.platform == "win32":
            raise BadArgument(self, "kind", "is 'process', which needs Unix; set it to thread")
        at_least(1, self, "ahead")
        at_least(0, self, "restarts")
        positive(self, "timeout")
        rule = "names of parts, or null for all of them; set model.reward_workers to null for none"
        require(self.parts != [], self, "parts", rule)
        for device in self.devices or ():
            try:
                torch.device(device)
            except RuntimeError as error:
                problem = f"must be such as [cuda:1], got {device!r}"
                raise BadArgument(self, "devices", problem) from error

    def beside(self, reward: Reward, rank: int) -> Reward:
        """Return a reward with the rewards in it that have workers replaced; start these.

        Args:
            reward: Changed in place where it is a combined one; may have been given here before.
            rank: Number of this process.

        Raises:
            UsageError: There is no such part, or a reward cannot be sent to another process.
        """
        found = dict(reward.rewards.items()) if isinstance(reward, Combination) else {"": reward}
        chosen = list(found) if self.parts is None else self.parts
        if unknown := sorted(set(chosen) - set(found)):
            names = sorted(found) if isinstance(reward, Combination) else f"{reward.name} alone"
            problem = f"names {unknown}, but the reward has {names}"
            raise BadArgument(self, "parts", problem)
        chosen = [name for name in chosen if not found[name].asks]  # a person has no worker
        for place, (name, part) in enumerate((n, found[n]) for n in chosen):
            assert isinstance(part, Reward)
            if not isinstance(part, SideReward):
                number = rank * len(chosen) + place
                device = self.devices[number % len(self.devices)] if self.devices else None
                part = SideReward(part, self, device)
            part.start()
            if not isinstance(reward, Combination):
                return part
            reward.rewards[name] = part
        return reward


@dataclass
class SideTimes:
    """Seconds of side rewards.

    Attributes:
        busy: Spent by workers.
        waited: Spent by the main thread on waiting for them.
    """

    busy: float = 0.0
    waited: float = 0.0

    @property
    def hidden(self) -> float:
        """Seconds of workers that the run did not wait for."""
        return max(0.0, self.busy - self.waited)


@dataclass
class _Begun:
    """A call on its way.

    Attributes:
        samples: The very object that was sent.
        kind: What was asked.
        answer: To come.
    """

    samples: Any
    kind: Kind
    answer: "Future[Answer | None]"


class SideReward(Reward):
    """Stands for a reward that a worker holds.

    Samples that its worker is lost on have NaN.

    Args:
        reward: The reward, not a part of this module: trainers neither move nor convert it.
        workers: The setting.
        device: Where it computes; None for where samples are.

    Attributes:
        times: What it took so far.
    """

    follows: Tensor

    def __init__(self, reward: Reward, workers: RewardWorkers, device: str | None) -> None:
        super().__init__()
        self._held = (reward.requires_grad_(False).eval(),)
        self.waits, self.distinguishes = reward.waits, reward.distinguishes
        self.workers, self.device = workers, device
        self.times = SideTimes()
        # Trainers change the type of floating-point buffers with that of weights.
        self.register_buffer("follows", torch.zeros((), dtype=torch.float32), persistent=False)
        self._lane: Lane | None = None
        self._begun: list[_Begun] = []
        self._reported: set[str] = {reward.name}

    @property
    def inner(self) -> Reward:
        """The reward that this one stands for."""
        return self._held[0]

    @property
    def stands_for(self) -> Reward:
        return self.inner

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def num_restarts(self) -> int:
        """How often its worker was started again."""
        return 0 if self._lane is None else self._lane.num_restarts

    @property
    def worker(self) -> Worker | None:
        """The worker of this moment."""
        return None if self._lane is None else self._lane.worker

    def start(self) -> None:
        """Start the worker, unless it is there; it makes itself ready beside the main thread.

        Raises:
            UsageError: The reward cannot be sent to another process.
        """
        if self._lane is not None:
            return
        name, timeout = self.name, self.workers.timeout
        if self.workers.kind == "thread" or self.inner.waits:

            def make() -> Worker:
                return SideThread(name, self.inner)
        else:
            sent = packed(self.inner)

            def make() -> Worker:
                return SideProcess(name, sent, timeout)

        self._lane = Lane(name, make, timeout=timeout, restarts=self.workers.restarts)

    def stop(self) -> None:
        """End the worker; the next call starts another one."""
        if self._lane is not None:
            self._lane.stop()
        self._lane = None
        self._begun.clear()

    def begin(self, kind: Kind, samples: Any, condition: Condition) -> None:
        """Send samples; asking for the same thing about the same object then waits for it."""
        self.start()
        assert self._lane is not None
        call = Call(kind, samples, condition, self._device_of(samples), self._dtype)
        self._begun.append(_Begun(samples, kind, self._lane.submit(call)))

    def forward(self, samples: Any, condition: Condition) -> Any:
        found = self._finish("forward", samples, condition)
        return torch.full((len(condition),), torch.nan) if found is None else found.value

    def evaluate(self, samples: Any, condition: Condition) -> Any:
        found = self._finish("evaluate", samples, condition)
        if found is None:
            return {name: torch.full((len(condition),), torch.nan) for name in self._reported}
        if isinstance(found.value, dict):
            self._reported |= found.value.keys()
        return found.value

    def __getstate__(self) -> dict[str, Any]:
        """Copies do not take the worker along."""
        held = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**held, "_lane": None, "_begun": []}

    @property
    def _dtype(self) -> torch.dtype | None:
        return None if self.follows.dtype == torch.float32 else self.follows.dtype

    def _device_of(self, samples: Any) -> str:
        return self.device or str(device_of(samples, torch.device("cpu")))

    def _finish(self, kind: Kind, samples: Any, condition: Condition) -> Answer | None:
        begun = next((b for b in self._begun if b.samples is samples and b.kind == kind), None)
        if begun is None:
            self.begin(kind, samples, condition)
            begun = self._begun[-1]
        self._begun = [one for one in self._begun if one is not begun]
        start = time.perf_counter()
        try:
            found = begun.answer.result()
        except CancelledError as error:
            raise UsageError(f"the side worker of {self.name} was stopped") from error
        self.times.waited += time.perf_counter() - start
        self.times.busy += 0.0 if found is None else found.seconds
        return found


def side_rewards(reward: Reward) -> list[SideReward]:
    """Return the rewards in a reward that have workers."""
    return [part for part in reward.modules() if isinstance(part, SideReward)]


def begin(reward: Reward, kind: Kind, samples: Any, condition: Condition) -> None:
    """Let the workers of a reward begin with samples, all side by side."""
    for part in side_rewards(reward):
        counted = not isinstance(reward, Combination) or part in reward.counted.values()
        if counted or kind == "evaluate":  # parts that are held out are measured, not trained on
            part.begin(kind, samples, condition)
