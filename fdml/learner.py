"""A model in training: one step at a time, resumable between any two."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fdml.guidance import Guided
from fdml.models import RobustModel
from fdml.models.norm import BatchNorm2d
from fdml.objective import objective
from fdml.recipe import Recipe
from fdml.train_batch import TrainBatch
from fdml.world import World


class Learner:
    """The student (or teacher) with its optimizer and the moving average of its weights.

    ``attacked`` is the model as the inner attack calls it, compiled where the recipe says so. ``average`` is the model
    to validate and to keep: the exponential moving average of weights and statistics, whose decay rises as
    (1 + n) / (10 + n) to its value so that a short run does not average its own beginning; without a decay it is the
    model itself.
    """

    def __init__(self, recipe: Recipe, guided: Guided, world: World) -> None:
        self.recipe, self.guided, self.world = recipe, guided, world
        self.model = guided.model
        self.average: RobustModel = copy.deepcopy(guided.model) if recipe.ema else guided.model
        self.steps = 0
        # Statistics are synchronised by the norm layers themselves, where the passes of one step need them.
        for module in guided.modules():
            if isinstance(module, BatchNorm2d):
                module.synchronised = recipe.sync_norm
        self.parallel = DistributedDataParallel(guided, broadcast_buffers=False) if world.size > 1 else None
        runner: nn.Module = self.parallel or guided
        self.runner: Callable = torch.compile(runner) if recipe.compile else runner
        self.attacked: Callable = torch.compile(self.model) if recipe.compile else self.model
        # Decay is for what multiplies an activation; biases and scales of normalisation do not overfit.
        weights = [p for p in guided.parameters() if p.ndim > 1]
        others = [p for p in guided.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.SGD(
            [{"params": weights, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.momentum > 0,
        )

    def step(self, batches: Sequence[TrainBatch], done: float) -> dict[str, Tensor]:
        """One step of descent, on the mean over the parts of a batch, when the share ``done`` of training is behind;
        returns the terms of the loss and the logs, meaned alike."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, done)
        if recipe.awp and done >= recipe.awp_after:
            with self._perturbed_weights(batches, done):
                values = self._backward(batches, done)
        else:
            values = self._backward(batches, done)
        if recipe.clip:
            nn.utils.clip_grad_norm_(self.guided.parameters(), recipe.clip)
        self.optimizer.step()
        self._update_average()
        return values

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name."""
        momenta = {
            f"momentum.{index}": self.optimizer.state[p]["momentum_buffer"]
            for index, p in enumerate(self._parameters())
            if "momentum_buffer" in self.optimizer.state[p]
        }
        guided = {f"guided.{name}": value for name, value in self.guided.state_dict().items()}
        average = {f"average.{name}": value for name, value in self.average.state_dict().items()}
        return momenta | guided | (average if self.recipe.ema else {}) | {"steps": torch.tensor(self.steps)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Goes back to what ``state`` returned."""
        self.guided.load_state_dict(_below("guided.", tensors))
        if self.recipe.ema:
            self.average.load_state_dict(_below("average.", tensors))
        momenta = _below("momentum.", tensors)
        for index, p in enumerate(self._parameters()):
            if str(index) in momenta:
                # `copy_` into a like tensor keeps the memory layout, and with it the order of every sum.
                self.optimizer.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(momenta[str(index)])
        self.steps = int(tensors["steps"])

    def is_finite(self) -> bool:
        """Whether every weight is a number."""
        return all(bool(torch.isfinite(p).all()) for p in self._parameters())

    def _parameters(self) -> list[nn.Parameter]:
        return list(self.guided.parameters())

    def _backward(self, batches: Sequence[TrainBatch], done: float) -> dict[str, Tensor]:
        """The gradient of the mean loss over the parts, and the means of what there is to report."""
        recipe = self.recipe
        self.optimizer.zero_grad(set_to_none=True)
        means: dict[str, Tensor] = {}
        for place, batch in enumerate(batches, 1):
            last = self.parallel is None or place == len(batches)  # gradients travel once
            with nullcontext() if last or self.parallel is None else self.parallel.no_sync():
                with torch.autocast(batch.x.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                    terms = objective(recipe, self.runner, self.guided, batch, done, self.world)
                    loss = terms.total() / len(batches)
                loss.backward()
            logs = {name: value.detach() / len(batches) for name, value in (terms.losses | terms.logs).items()}
            for name, value in ({"loss": loss.detach()} | logs).items():
                means[name] = means[name] + value if name in means else value
        return means

    @torch.no_grad()
    def _update_average(self) -> None:
        self.steps += 1
        if self.average is self.model:
            return
        decay = min(self.recipe.ema, (1 + self.steps) / (10 + self.steps))
        pairs = list(zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=True))
        moved = [pair for pair in pairs if pair[0].is_floating_point()]
        # One kernel for all tensors on a GPU.
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            [mean for mean, _ in moved], [value for _, value in moved], 1 - decay
        )
        for mean, value in pairs:
            if not mean.is_floating_point():
                mean.copy_(value)

    @contextmanager
    def _perturbed_weights(self, batches: Sequence[TrainBatch], done: float) -> Iterator[None]:
        """Adversarial weight perturbation (Wu et al. 2020, algorithm 1): inside the block each weight matrix stands
        moved along its gradient by awp · its own norm; after it the weights are as they were, and so are the
        statistics that the extra pass would have changed."""
        before = {name: buffer.clone() for name, buffer in self.guided.named_buffers()}
        self._backward(batches, done)
        moved: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for name, buffer in self.guided.named_buffers():
                buffer.copy_(before[name])
            for weight in self.model.parameters():
                if weight.ndim > 1 and weight.grad is not None:
                    moved.append((weight, weight.clone()))
                    weight.add_(weight.grad * (self.recipe.awp * weight.norm() / (weight.grad.norm() + 1e-12)))
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, original in moved:
                    weight.copy_(original)


def learning_rate(recipe: Recipe, done: float) -> float:
    """The rate when the share ``done`` of training is behind."""
    if recipe.schedule == "constant":
        return recipe.lr
    if recipe.schedule == "multi-step":
        return recipe.lr * 0.1 ** ((done >= 0.5) + (done >= 0.75))
    if done < recipe.warmup:
        return recipe.lr * max(done / recipe.warmup, 0.01)
    return recipe.lr * (1 - done) / (1 - recipe.warmup) if recipe.warmup < 1 else recipe.lr


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
