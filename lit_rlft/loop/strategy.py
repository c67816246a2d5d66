"""How the processes of a run share its weights: DDP, or FSDP2, which is registered here."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, _GeneratorContextManager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.accelerators.mps import MPSAccelerator
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed import all_reduce
from torch.distributed.constants import default_pg_timeout
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lit_rlft.core.checks import UsageError
from lit_rlft.distributed import split_like, to_save
from lit_rlft.kit.compiled import is_compiled
from lit_rlft.loop.checkpoint_file import secure
from lit_rlft.loop.checkpointed import Checkpointed
from lit_rlft.loop.precision import check_precision
from lit_rlft.loop.sharded import leaves_gradients, shard
from lit_rlft.loop.updates import Passes
from lit_rlft.runs.folder import has_given_folder

__all__ = [
    "FSDP2Strategy",
    "admit",
    "check_strategy",
    "check_trainer",
    "passes_of",
    "usable_accelerator",
]

_NAMES = ("auto", "ddp", "fsdp2", "single_device")
_CONFIG = "--config fsdp (trainer.strategy fsdp2)"
_REFUSED = {
    "fsdp": "cannot run a network many times in one step, as sampling does; use " + _CONFIG,
    "ddp_spawn": "cannot copy a whole run to the processes that it starts; use ddp",
    "deepspeed": f"has not been tested; {_CONFIG} splits weights, gradients and optimiser alike",
}
_OPTIMIZERS = (Adam, AdamW, SGD)
"""Whose steps treat each number of a weight for itself."""


def check_strategy(given: object) -> None:
    """Check that a trainer's strategy is one that runs are tested with.

    Args:
        given: A name, a class's path, or the trainer's own.

    Raises:
        UsageError: It is another one.
    """
    known = DDPStrategy | FSDP2Strategy | SingleDeviceStrategy
    name = given if isinstance(given, str) else type(given).__name__
    own = name.rpartition(".")[2].lower()
    if isinstance(given, known) and "xla" not in own:
        return
    if isinstance(given, str) and ("." in name or own.startswith(_NAMES)) and not _why(own):
        return  # a class of somebody else's is checked once there is an instance
    reason = _why(own) or f"has not been tested; use ddp, or {_CONFIG} to split the weights"
    raise UsageError(f"trainer.strategy {name} {reason}")


def admit(trainer: Trainer) -> None:
    """Check a trainer's device, before anything is there, and have it load checkpoints safely.

    Raises:
        UsageError: The device cannot compute what is needed.
    """
    if trainer.strategy.root_device.type == "mps":
        raise UsageError(
            "trainer.accelerator is mps, the GPU of a Mac, which has no float64, in which noise "
            "levels are computed; set it to cpu"
        )
    secure(trainer)


def usable_accelerator(given: Any) -> Any:
    """Return a trainer's accelerator as given; for "auto" on a Mac, the processor."""
    return "cpu" if given in (None, "auto") and MPSAccelerator.is_available() else given


def check_trainer(trainer: Trainer) -> None:
    """Check that weights can be trained with a trainer's strategy and precision.

    Raises:
        UsageError: They cannot, or nobody has tried.
    """
    check_strategy(trainer.strategy)
    _check_comes_back(trainer)
    check_precision(trainer.precision)
    if isinstance(trainer.strategy, FSDP2Strategy) and trainer.precision == "16-mixed":
        raise UsageError(
            "trainer.precision 16-mixed scales gradients on each process for itself, which weights "
            "that trainer.strategy fsdp2 splits cannot have; set it to bf16-mixed"
        )


def _check_comes_back(trainer: Trainer) -> None:
    """Raise UsageError where the caller of `fit` would have an untuned model after it.

    Lightning takes home weights alone, by their names before the adapter and the reference were
    made. A command needs none of it: it ends with its fit, and the next one reads the checkpoint.
    """
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher) and not has_given_folder(trainer):
        raise UsageError(
            f"trainer.strategy would train in processes made by {launcher._start_method}, as "
            "several devices in a notebook do, and the tuned model would not come back from them; "
            "set it to auto and trainer.devices to 1, or run a script with trainer.strategy ddp"
        )


def _why(name: str) -> str | None:
    if name.startswith("fsdp2"):
        return None
    return next((why for begin, why in _REFUSED.items() if name.startswith(begin)), None)


class FSDP2Strategy(ModelParallelStrategy):
    """Splits the denoiser's weights, gradients and optimiser states among all processes.

    A frozen copy of the denoiser is split too. Checkpoints are those of one process: the first one
    writes them whole, and every process takes its part of them.

    Args:
        process_group_backend: "nccl" or "gloo"; None takes that of the device.
        timeout: How long a process waits for the others.
    """

    def __init__(
        self,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def networks(self) -> list[nn.Module]:
        """Return the networks whose weights are split; the first one is trained."""
        module = self.lightning_module
        assert isinstance(module, Checkpointed)
        return [module.pipeline.denoiser, *module.reference.children()]

    def block_backward_sync(self) -> _GeneratorContextManager[None]:
        """Return a context in which backward passes leave gradients on their process."""
        return leaves_gradients(self.networks()[0])

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Split the weights, while they are on the CPU; then make the optimiser.

        Raises:
            UsageError: The algorithm, its optimiser or a compiled network cannot be split.
        """
        assert self.model is not None and self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        for network in self.networks():
            _check_compiled(network)
            shard(network, self.device_mesh["data_parallel"])
        self.model_to_device()
        self.barrier()
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self._check_trained()
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        for optimizer in self.optimizers if fitting else []:
            _check_optimizer(optimizer)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights as the first process writes them, without frozen ones that are split.

        All processes must call this.
        """
        module = self.lightning_module
        assert module is not None
        state = module.state_dict()
        trained = {name for name, p in module.named_parameters() if p.requires_grad}
        return {
            name: to_save(value)
            for name, value in state.items()
            if name in trained or not isinstance(value, DTensor)
        }

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this process's part of the trained weights of a checkpoint, which fits the model."""
        assert self.lightning_module is not None
        own = dict(self.lightning_module.named_parameters())
        with torch.no_grad():
            for name, value in checkpoint["state_dict"].items():
                own[name].copy_(split_like(value, own[name]))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimiser's state as one process would have it; all of them must call this."""
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = plain.state_dict()
        parts = {
            i: {k: to_save(v) if isinstance(v, Tensor) else v for k, v in part.items()}
            for i, part in state["state"].items()
        }
        return {**state, "state": parts}

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's part of the states of a checkpoint."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            parts = {i: dict(_parts_of(part, weights[i])) for i, part in state["state"].items()}
            optimizer.load_state_dict({**state, "state": parts})
            _optimizer_to_device(optimizer, self.root_device)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only=weights_only)

    def _check_trained(self) -> None:
        module = self.lightning_module
        assert isinstance(module, Checkpointed)
        if any(not isinstance(weight, DTensor) for weight in module._trained().values()):
            raise UsageError(
                f"trainer.strategy fsdp2 splits the denoiser, but {module.algorithm} trains a "
                "network beside it; set trainer.strategy to ddp"
            )


def _check_compiled(network: nn.Module) -> None:
    if is_compiled(network):
        raise UsageError(
            "pipeline.init_args.compile has not been tested with trainer.strategy fsdp2; set it to "
            "null, or trainer.strategy to ddp"
        )


def _check_optimizer(optimizer: Optimizer) -> None:
    if type(optimizer) not in _OPTIMIZERS:
        names = ", ".join(f"torch.optim.{kind.__name__}" for kind in _OPTIMIZERS)
        raise UsageError(
            f"model.init_args.optimizer: {type(optimizer).__name__} has not been tested with "
            f"trainer.strategy fsdp2, under which a process has parts of a weight; use one of "
            f"{names}, or set trainer.strategy to ddp"
        )


def _parts_of(state: Mapping[str, Any], weight: Tensor) -> Iterator[tuple[str, Any]]:
    for name, value in state.items():
        whole = isinstance(value, Tensor) and value.shape == weight.shape
        yield name, split_like(value, weight) if whole else value


StrategyRegistry.register(
    "fsdp2",
    FSDP2Strategy,
    description="FSDP2 for networks that run many times in one step",
)


def passes_of(
    trainer: Trainer,
    backward: Callable[[Tensor], object],
    parameters: Sequence[nn.Parameter],
    idle: Callable[[], Tensor] | None = None,
) -> Passes:
    """Return how a trainer's processes share the backward passes of updates.

    Args:
        trainer: The run's.
        backward: As `Passes` has it, like the others.
        parameters: What is trained.
        idle: None where processes need not wait.
    """
    several, strategy = trainer.world_size > 1, trainer.strategy
    add_up = all_reduce if several and isinstance(strategy, DDPStrategy) else None
    split = (None, trainer.world_size, partial(_no_sync, strategy))
    return Passes(backward, parameters, *split, idle=idle, add_up=add_up)


def _no_sync(strategy: object) -> AbstractContextManager[Any]:
    """Return a context in which backward passes leave gradients on their process."""
    if isinstance(strategy, DDPStrategy | FSDP2Strategy):
        return strategy.block_backward_sync()
    return nullcontext()
