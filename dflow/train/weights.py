"""What a training learns: weights, their moving averages, and the moments of the optimizer."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import safetensors
import torch
from accelerate import Accelerator
from torch import Tensor

from dflow.nn.recompute import recompute
from dflow.train import schedule, shards
from dflow.train.machine import compile_in_place
from dflow.train.tasks import Task


class Weights:
    """The weights of a model in training, whole on every process or in pieces.

    Attributes:
        model: in training.
        objective: the module that every process calls on a batch at every step.
        evaluated: the model that is evaluated and saved; see `evaluation`.
        averages: the parameters of `evaluated`: those of `model`, or their moving averages.
        learned: whether there is anything to optimise; there is not where all has a closed form.
        sharded: whether parameters, averages and moments are in pieces.
        optimizer: AdamW.
    """

    def __init__(self, task: Task, accelerator: Accelerator) -> None:
        config, objective, device = task.recipe.train, task.method.objective, accelerator.device
        self.config, self.accelerator, self.model = config, accelerator, task.model
        self.learned = any(True for _ in objective.parameters())
        self.sharded = config.shard and accelerator.num_processes > 1 and self.learned
        self.evaluated: Any = self.model
        if self.sharded:
            self.evaluated = shards.shell(self.model).to(device)
            shards.shard(objective, device, accelerator.num_processes)
        else:
            # Before the optimizer has the parameters: on some devices moving makes new ones.
            objective.to(device)
            if config.ema:
                self.evaluated = copy.deepcopy(self.model).to(device)
        self.averages: list[Tensor] = list(self.model.parameters())
        if config.ema and self.sharded:
            self.averages = [p.detach().clone() for p in self.averages]
        elif config.ema:
            self.averages = list(self.evaluated.parameters())
        groups = schedule.parameter_groups(objective.parameters(), config.weight_decay)
        self.optimizer = torch.optim.AdamW(
            groups if self.learned else [torch.zeros(())],
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            fused=True,
        )
        if config.checkpointing:
            recompute(objective)
        if config.compile:
            compile_in_place(objective, device)
        self.objective: Any
        if self.learned:
            # Whatever is in pieces exchanges its gradients by itself.
            self.objective = accelerator.prepare_model(objective, evaluation_mode=self.sharded)
            self.optimizer = accelerator.prepare(self.optimizer)
        else:
            self.objective = objective

    # -- steps -----------------------------------------------------------------------------------------------

    def exchanging(self, last: bool) -> AbstractContextManager[Any]:
        """Within it gradients are added up; those of all processes with the last piece of a batch."""
        return nullcontext() if last or not self.learned else self.accelerator.no_sync(self.objective)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss."""
        if self.learned:
            self.accelerator.backward(loss)

    def clip(self) -> Tensor:
        """Clip the gradient; returns its norm before, 0 where nothing is optimised."""
        if not self.learned:
            return torch.zeros((), device=self.accelerator.device)
        # Without a limit nothing is clipped, and the norm says whether the gradient is finite.
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), self.config.clip or math.inf)
        return torch.zeros((), device=self.accelerator.device) if norm is None else shards.whole(norm)

    def step(self, index: int) -> None:
        """Move weights and averages by the gradient."""
        if not self.learned:
            return
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.config.ema:
            decay = schedule.average_decay(self.config.ema, index)
            with torch.no_grad():
                torch._foreach_lerp_(self.averages, list(self.model.parameters()), 1 - decay)

    def leave_out(self) -> None:
        """Forget the gradient."""
        if self.accelerator.scaler:
            self.accelerator.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def evaluation(self) -> Iterator[Any]:
        """The model to evaluate, with its weights, in evaluation mode; every process has to ask for it."""
        model = self.evaluated
        model.train(False)
        if model is not self.model:
            # Buffers are counted, not learned, and have no averages.
            for old, new in zip(model.buffers(), self.model.buffers(), strict=True):
                old.copy_(new)
        if self.sharded:
            shards.fill(model, self.averages)
        yield model
        if self.sharded:
            shards.empty(model)

    # -- state -----------------------------------------------------------------------------------------------

    def whole(self) -> dict[str, Tensor]:
        """All that resuming needs, on the CPU of the main process; every process has to ask for it."""
        tensors = {}
        for name, tensor in self._tensors().items():
            # One after the other, so that only what is saved is ever there whole; all processes take part.
            tensor = shards.whole(tensor.detach())
            if self.accelerator.is_main_process:
                # Tied weights share memory, which the format refuses: each name gets its own copy.
                tensors[name] = tensor.cpu().clone().contiguous()
        return tensors

    def load(self, path: Path) -> None:
        """Take the weights of a file that holds those of `whole`, each process its pieces.

        Raises:
            SafetensorError, KeyError, RuntimeError, ValueError: other weights than these.
        """
        pieces = self._pieces()
        with safetensors.safe_open(path, "pt") as file:
            tensors = {
                name: shards.piece(file, name, pieces[name]) if name in pieces else file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118 - not a dict
            }
        self.model.load_state_dict(_under("model.", tensors))
        if self.config.ema:
            current = self._tensors()
            for name in pieces:
                if name.startswith("averaged."):
                    current[name].copy_(tensors.pop(name))
            self.evaluated.load_state_dict(_under("averaged.", tensors), strict=not pieces)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimizer.", tensors).items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of a state by name; in pieces where the model is."""
        model = self.model.state_dict(keep_vars=True)
        tensors = {f"model.{k}": v for k, v in model.items()}
        if self.config.ema:
            average = {id(p): a for p, a in zip(self.model.parameters(), self.averages, strict=True)}
            counted = self.evaluated.state_dict()
            tensors |= {f"averaged.{k}": average.get(id(v), counted[k]) for k, v in model.items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
        return tensors

    def _pieces(self) -> dict[str, Any]:
        """By name tensors that are cut as those of a state are here, where the model is in pieces."""
        if not self.sharded:
            return {}
        model = {k: v for k, v in self.model.state_dict(keep_vars=True).items() if shards.is_piece(v)}
        learned = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {f"optimizer.{i}.{k}": p for i, p in enumerate(learned) for k in ("exp_avg", "exp_avg_sq")}
        return {f"{of}.{k}": v for of in ("model", "averaged") for k, v in model.items()} | moments


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, by the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
