"""One adversarial training step beside the loop that users write today: torchattacks' PGD inside a plain PyTorch loop.

    pip install --no-deps torchattacks
    python benchmarks/train_step.py
    python benchmarks/train_step.py --device cuda --architecture resnet18 --side 32 --channels 3 --batch 512 \
        --steps 10 --precision bf16 --compile

Same network, batch, attack and optimizer; the two take turns, and the ratio is taken pair by pair, so that a busy
machine slows both. Two peers: `plain` is the network as one writes it (convolution, BatchNorm, ReLU as modules, NCHW),
`fdml's model` is torchattacks over our own network, so that the rest of the difference is the loop's. For each row of
ours the table says what the step costs, how many times faster than the plain peer it is, what it costs in steps of our
PGD-AT, which share of it the attack takes, and which share of the device's own rate for one large matrix product, as
measured here, its products and convolutions reach.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import torchattacks  # pyright: ignore[reportMissingImports]: a peer, not a dependency
from rich.console import Console
from rich.table import Table
from stock import plain
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

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

EPS = 0.1
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def network(architecture: str, side: int, channels: int) -> RobustModel:
    torch.manual_seed(0)
    statistics_ = [0.5] * channels
    return build(architecture, input=(channels, side, side), classes=10, mean=statistics_, std=statistics_)


def peer_step(model: nn.Module, x: Tensor, y: Tensor, options: argparse.Namespace) -> Callable[[], None]:
    attack = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=options.steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, nesterov=True)
    model.to(x.device).train()

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            x_adv = attack(x, y)
            loss = F.cross_entropy(model(x_adv), y, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def our_step(
    name: str, model: RobustModel, x: Tensor, y: Tensor, options: argparse.Namespace, attacking: list[float]
) -> Callable[[], None]:
    """A step of the recipe ``name``; the seconds that its attack takes, the teacher's answers included, are added to
    ``attacking``."""
    chosen = replace(
        recipe(name), eps=EPS, attack_steps=options.steps, attack_step=0.25, attack_radius=1.0, lr=1e-3,
        start="random", batch_size=options.batch, precision=options.precision, compile=options.compile,
    )  # fmt: skip
    threat, world = Threat("linf", EPS), World(0, 1, x.device)
    model = like(model, x.device)
    guide = Teacher.of(like(model, x.device), chosen, Arrays((x * 255).byte(), y)) if chosen.needs_teacher else None
    peer = like(model, x.device) if chosen.has_peer else None
    learner = Learner(chosen, Guided(model, guide, x[:2], peer), world)
    index, generator = torch.arange(len(x), device=x.device), torch.Generator(x.device).manual_seed(0)
    model.train()

    def step() -> None:
        began = now(x.device)
        drawn = draw(chosen, Batch(index, x, y), 10, threat, generator)
        batch = prepare(chosen, learner.attacked, guide, threat, drawn, (drawn.x, drawn.y))
        attacking.append(now(x.device) - began)
        learner.step([batch], 0.1)

    return step


def like(model: RobustModel, device: torch.device) -> RobustModel:
    return copy.deepcopy(model).to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def now(device: torch.device) -> float:
    """Seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matrix_rate(device: torch.device, precision: str) -> float:
    """Operations per second of one large product of random matrices, the best of ten."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(TYPES[precision]) for _ in range(2))
    times = []
    for _ in range(11):
        began = now(device)
        torch.mm(a, b)
        times.append(now(device) - began)
    return 2 * side**3 / min(times[1:])


def operations(step: Callable[[], None]) -> int:
    """Of one step that is not compiled: those of its products and convolutions."""
    with Counter() as counter:
        step()
    return counter.total


class Counter(TorchDispatchMode):
    """``FlopCounterMode`` without its watch on modules, whose hooks refuse ``autograd.grad``."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="cnn")
    parser.add_argument("--side", type=int, default=28)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=7, help="steps of the inner PGD")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=TYPES, default="fp32")
    parser.add_argument("--compile", action="store_true", help="our steps; takes a minute a method at first")
    parser.add_argument("--methods", default=",".join(METHODS), help="ours, with commas; pgd-at is always among them")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    x = torch.rand(options.batch, options.channels, options.side, options.side, device=device)
    y = torch.randint(0, 10, (options.batch,), device=device)

    def fresh() -> RobustModel:
        return network(options.architecture, options.side, options.channels)

    eager = argparse.Namespace(**{**vars(options), "compile": False})
    methods = list(dict.fromkeys(["pgd-at", *options.methods.split(",")]))
    work = {f"fdml {name}": operations(our_step(name, fresh(), x, y, eager, [])) for name in methods}
    attacking: dict[str, list[float]] = {f"fdml {name}": [] for name in methods}
    contenders = {
        "torchattacks, plain": peer_step(plain(fresh()), x, y, options),
        "torchattacks, fdml's model": peer_step(fresh(), x, y, options),
        **{f"fdml {name}": our_step(name, fresh(), x, y, options, attacking[f"fdml {name}"]) for name in methods},
    }
    _check_same_answers(fresh(), plain(fresh()), x.cpu())
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(options.rounds + 2):
        for name, step in contenders.items():
            began = now(device)
            step()
            if turn >= 2:  # the first turns warm up the allocator and the kernels' caches, and compile
                times[name].append(now(device) - began)

    rate = matrix_rate(device, options.precision)
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
        rows[name]["of_matrix_rate"] = round(work[name] / statistics.median(times[name]) / rate, 3)
    if options.json:
        print(json.dumps({"options": vars(options), "torch": torch.__version__, "matrix_rate": rate, "rows": rows}))
        return
    size = f"{options.channels}x{options.side}x{options.side}, batch {options.batch}"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{options.threads} threads"
    form = options.precision + (", compiled" if options.compile else "")
    title = f"{options.architecture}, {size}, PGD-{options.steps}, {form}, {where}, {options.rounds} rounds"
    table = Table(title=title, caption=f"one large matrix product: {rate / 1e12:.3g} TFLOP/s")
    for column in ("step", "ms", "images/s", "times faster", "cost of pgd-at", "in the attack", "of the matrix rate"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, row in rows.items():
        shares = [f"{100 * row[key]:.0f}%" if key in row else "" for key in ("attack_share", "of_matrix_rate")]
        cells = (f"{row['milliseconds']:.1f}", f"{row['images_per_second']:,}", f"{row['times_faster']:.2f}")
        table.add_row(name, *cells, f"{row['times_pgd_at']:.2f}", *shares)
    Console(width=120).print(table)


def _check_same_answers(ours: RobustModel, stock: nn.Module, x: Tensor) -> None:
    with inference(ours), inference(stock), torch.no_grad():
        torch.testing.assert_close(ours(x), stock(x), atol=1e-4, rtol=1e-4)


if __name__ == "__main__":
    main()
