"""One adversarial training step beside the loop that users write today: torchattacks' PGD inside a plain PyTorch loop.

    pip install --no-deps torchattacks
    python benchmarks/train_step.py

Same network, batch, attack and optimizer; the two take turns, and the ratio is taken pair by pair, so that a busy
machine slows both. Two peers: `plain` is the network as one writes it (convolution, BatchNorm, ReLU as modules, NCHW),
`fdml's model` is torchattacks over our own network, so that the rest of the difference is the loop's. For each row of
ours the table says what the step costs, how many times faster than the plain peer it is, what it costs in steps of our
PGD-AT, and which share of it the attack takes.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
import torchattacks  # pyright: ignore[reportMissingImports]: a peer, not a dependency
from rich.console import Console
from rich.table import Table
from stock import plain
from torch import Tensor, nn

from fdml.data.dataset import Arrays, Batch
from fdml.guidance import Guided, Teacher
from fdml.inference import inference
from fdml.learner import Learner
from fdml.models import RobustModel, build
from fdml.recipes import recipe
from fdml.reproduce import METHODS
from fdml.threat import Threat
from fdml.train_batch import draw, prepare
from fdml.world import World


def network(architecture: str, side: int, channels: int) -> RobustModel:
    torch.manual_seed(0)
    statistics_ = [0.5] * channels
    return build(architecture, input=(channels, side, side), classes=10, mean=statistics_, std=statistics_)


def peer_step(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int) -> Callable[[], None]:
    attack = torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, nesterov=True)
    model.train()

    def step() -> None:
        x_adv = attack(x, y)
        optimizer.zero_grad()
        F.cross_entropy(model(x_adv), y, label_smoothing=0.1).backward()
        optimizer.step()

    return step


def our_step(
    name: str, model: RobustModel, x: Tensor, y: Tensor, eps: float, steps: int, attacking: list[float]
) -> Callable[[], None]:
    """A step of the recipe ``name``; the seconds that its attack takes, the teacher's answers included, are added to
    ``attacking``."""
    chosen = replace(
        recipe(name), eps=eps, attack_steps=steps, attack_step=0.25, attack_radius=1.0, lr=1e-3, start="random"
    )
    threat, world = Threat("linf", eps), World(0, 1, torch.device("cpu"))
    model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    guide = None
    if chosen.needs_teacher:
        teacher = network_like(model)
        images = Arrays((x * 255).byte(), y)
        guide = Teacher.of(teacher, chosen, images)
    peer = network_like(model) if chosen.has_peer else None
    learner = Learner(chosen, Guided(model, guide, x[:2], peer), world)
    index, generator = torch.arange(len(x)), torch.Generator().manual_seed(0)
    model.train()

    def step() -> None:
        began = time.perf_counter()
        drawn = draw(chosen, Batch(index, x, y), 10, threat, generator)
        batch = prepare(chosen, model, guide, threat, drawn, (drawn.x, drawn.y))
        attacking.append(time.perf_counter() - began)
        learner.step([batch], 0.1)

    return step


def network_like(model: RobustModel) -> RobustModel:
    import copy

    return copy.deepcopy(model).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="cnn")
    parser.add_argument("--side", type=int, default=28)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=7, help="steps of the inner PGD")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    eps = 0.1
    x = torch.rand(options.batch, options.channels, options.side, options.side)
    y = torch.randint(0, 10, (options.batch,))

    def fresh() -> RobustModel:
        return network(options.architecture, options.side, options.channels)

    attacking: dict[str, list[float]] = {f"fdml {name}": [] for name in METHODS}
    contenders = {
        "torchattacks, plain": peer_step(plain(fresh()), x, y, eps, options.steps),
        "torchattacks, fdml's model": peer_step(fresh(), x, y, eps, options.steps),
        **{
            f"fdml {name}": our_step(name, fresh(), x, y, eps, options.steps, attacking[f"fdml {name}"])
            for name in METHODS
        },
    }
    _check_same_answers(fresh(), plain(fresh()), x)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(options.rounds + 2):
        for name, step in contenders.items():
            began = time.perf_counter()
            step()
            if turn >= 2:  # the first turns warm up the allocator and the kernels' caches
                times[name].append(time.perf_counter() - began)

    base = times["torchattacks, plain"]
    rows: dict[str, dict[str, float]] = {
        name: {
            "milliseconds": round(1e3 * statistics.median(taken), 2),
            "images_per_second": round(options.batch / statistics.median(taken)),
            "times_faster": round(statistics.median(b / t for b, t in zip(base, taken, strict=True)), 2),
            "times_pgd_at": round(
                statistics.median(t / o for t, o in zip(taken, times["fdml pgd-at"], strict=True)), 2
            ),
        }
        for name, taken in times.items()
    }
    for name, seconds in attacking.items():
        shares = [part / whole for part, whole in zip(seconds[2:], times[name], strict=True)]
        rows[name]["attack_share"] = round(statistics.median(shares), 2)
    if options.json:
        print(json.dumps({"options": vars(options), "torch": torch.__version__, "rows": rows}))
        return
    size = f"{options.channels}x{options.side}x{options.side}, batch {options.batch}"
    title = f"{options.architecture}, {size}, PGD-{options.steps}, {options.threads} threads, {options.rounds} rounds"
    table = Table(title=title)
    for column in ("step", "ms", "images/s", "times faster", "cost of pgd-at", "in the attack"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, row in rows.items():
        share = f"{100 * row['attack_share']:.0f}%" if "attack_share" in row else ""
        cells = (f"{row['milliseconds']:.1f}", f"{row['images_per_second']:,}", f"{row['times_faster']:.2f}")
        table.add_row(name, *cells, f"{row['times_pgd_at']:.2f}", share)
    Console(width=110).print(table)


def _check_same_answers(ours: RobustModel, stock: nn.Module, x: Tensor) -> None:
    with inference(ours), inference(stock), torch.no_grad():
        torch.testing.assert_close(ours(x), stock(x), atol=1e-4, rtol=1e-4)


if __name__ == "__main__":
    main()
