"""The report of an evaluation, made from what the store holds (docs/report.md describes every field)."""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fdml
from fdml.evaluate import flags
from fdml.evaluate.accuracy import interval
from fdml.evaluate.assess import MINIMAL, Plan, Source, entries_of
from fdml.evaluate.store import Store
from fdml.evaluate.suites import LABELS, Entry
from fdml.evaluate.victim import Victim
from fdml.world import World

FORMAT = 1
PACKAGES = ("fdml", "torch", "numpy", "onnxruntime")


def report(
    plan: Plan,
    victims: Sequence[Victim],
    store: Store,
    world: World,
    surrogates: Mapping[str, Source],
    *,
    seconds: float,
) -> dict[str, Any]:
    """Everything that was found, as JSON values. The work must be complete."""
    images = [plan.batch(start) for start in plan.starts]
    y = torch.cat([batch.y for batch in images]).cpu()
    found = {
        "format": FORMAT,
        "fdml": fdml.__version__,
        "suite": plan.suite,
        "protocols": list(plan.protocols),
        "attacks": list(plan.attacks),
        "rng": plan.rng,
        "seed": plan.seed,
        "seconds": round(seconds, 2),
        "data": {
            "name": plan.data.name,
            "fingerprint": plan.data.fingerprint,
            "split": "test",
            "n": len(y),
            "classes": list(plan.data.classes),
            "input": list(plan.data.input),
        },
        "threat": {"norm": plan.threat.norm, "eps": plan.threat.eps},
        "hardware": _hardware(world),
        "versions": _versions(),
        "images": list(range(len(y))),
        "labels": y.tolist(),
    }
    found["models"] = [_model(plan, victim, store, surrogates, y) for victim in victims]
    found["transfer"] = _transfer(plan, store, victims, surrogates)
    return found


def _model(plan: Plan, victim: Victim, store: Store, surrogates: Mapping[str, Source], y: Tensor) -> dict[str, Any]:
    n = len(y)
    clean = _joined(plan, store, victim.name, "clean", "answers")
    right = clean == y
    attacks, standing, kinds = [], {"clean": right}, {"clean": "clean"}
    worst, worst_answers = right.clone(), clean.clone()
    protocols: dict[str, Tensor] = {}
    for one in entries_of(plan, victim, surrogates):
        line, stands, answers = _entry(plan, store, victim.name, one, right, clean)
        attacks.append(line)
        standing[one.name], kinds[one.name] = stands, one.kind
        gradients = tuple(each for each in one.steps if not each.counted)
        if 0 < len(gradients) < len(one.steps):  # a cascade: what its queries alone fool is a black-box finding
            queried = f"{one.name} with its queries"
            standing[queried], kinds[queried] = stands, "query"
            standing[one.name] = _entry(plan, store, victim.name, replace(one, steps=gradients), right, clean)[1]
        if one.counts:
            worst_answers[worst & ~stands] = answers[worst & ~stands]
            worst &= stands
            protocols[one.protocol] = protocols.get(one.protocol, right) & stands
    raised = flags.from_outcomes(standing, kinds)
    if victim.gradients:
        index, x, labels = plan.batch(0)
        raised += flags.probe(victim.model, x, labels, plan.threat, generator=plan.generator(index, "probe"))
    classes = len(plan.data.classes)
    answered = worst_answers >= 0
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    confusion.index_put_((y[answered], worst_answers[answered]), torch.tensor(1), accumulate=True)
    return {
        "name": victim.name,
        "file": None if victim.file is None else str(victim.file),
        "sha256": victim.sha256(),
        "card": None if victim.card is None else json.loads(victim.card.to_json()),
        "gradients": victim.gradients,
        "clean": _share(right) | {"predictions": clean.tolist()},
        "attacks": attacks,
        "worst": _share(worst) | {"predictions": worst_answers.tolist()},
        "by_protocol": {name: _share(stands) for name, stands in protocols.items()},
        "classes": [
            {
                "name": name,
                "n": int((y == label).sum()),
                "clean": _mean(right[y == label]),
                "worst": _mean(worst[y == label]),
            }
            for label, name in enumerate(plan.data.classes)
        ],
        "confusion": confusion.tolist(),
        "curves": _curves(plan, store, victim, n),
        "minimal": _minimal(plan, store, victim),
        "corruptions": _corruptions(plan, store, victim),
        "flags": [asdict(flag) for flag in raised],
    }


def _entry(
    plan: Plan, store: Store, victim: str, one: Entry, right: Tensor, clean: Tensor
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """A line of the report, which images stand under it, and what the model answers."""
    stands, answers, outcomes = right.clone(), clean.clone(), np.where(right.numpy(), ".", "-")
    queries, seconds, steps = torch.zeros_like(clean), 0.0, []
    for each in one.steps:
        records = [store.record(victim, each.name, start, _size(plan, start)) for start in plan.starts]
        tried, fooled, said, asked = (
            torch.cat([getattr(record, field) for record in records])
            for field in ("tried", "fooled", "answers", "queries")
        )
        before = stands.clone()
        answers[before & tried] = said[before & tried]
        stands &= ~fooled
        queries[before] += asked[before]
        # A record may hold more images than this entry attacked, where another entry ran the step too.
        share = float(before.sum()) / max(1, int(tried.sum()))
        spent = sum(record.seconds for record in records) * min(1.0, share)
        seconds += spent
        steps.append(
            {
                "name": each.name,
                "label": each.label,
                "accuracy": _mean(stands),
                "fooled": int((before & ~stands).sum()),
                "seconds": round(spent, 3),
            }
        )
    outcomes[(right & ~stands).numpy()] = "x"
    line = {
        "name": one.name,
        "label": one.label,
        "protocol": one.protocol,
        "source": one.source,
        "settings": one.steps[0].settings if len(one.steps) == 1 else {each.name: each.settings for each in one.steps},
        **_share(stands),
        "seconds": round(seconds, 3),
        "outcomes": "".join(outcomes),
        "predictions": answers.tolist(),
        "queries": queries.tolist() if bool(queries.any()) else None,
        "steps": steps if len(steps) > 1 else [],
    }
    return line, stands, answers


def examples(plan: Plan, victim: Victim, store: Store, count: int = 8) -> dict[str, Any] | None:
    """The first images that were fooled, as arrays for a gallery: x, x_adv, y, answers, attack."""
    found: dict[str, list] = {"x": [], "x_adv": [], "y": [], "answers": [], "attack": []}
    for start in plan.starts:
        known = store.fallen(victim.name, start)
        if known is None:
            continue
        rows, x_adv, names = known
        _, x, y = plan.batch(start)
        order = rows.argsort()[: count - len(found["y"])]
        with torch.no_grad():
            answers = victim.model(x_adv[order].to(x.device)).argmax(1)
        labels = [LABELS.get(names[at].partition("@")[0], names[at]) for at in order.tolist()]
        for place, row in enumerate(rows[order].tolist()):
            found["x"].append(x[row].cpu().numpy())
            found["x_adv"].append(x_adv[order[place]].numpy())
            found["y"].append(int(y[row]))
            found["answers"].append(int(answers[place]))
            found["attack"].append(labels[place])
        if len(found["y"]) >= count:
            break
    if not found["y"]:
        return None
    return {name: np.array(values) if name != "attack" else values for name, values in found.items()}


def write_adversarial(plan: Plan, victim: Victim, store: Store, path: Path, write: Callable) -> None:
    """``adversarial.npz``: for every image the first adversarial one that was found, or itself; with labels, and
    whether it fooled the model."""
    batches, fooled = [], []
    labels = []
    for start in plan.starts:
        _, x, y = plan.batch(start)
        x, flag = x.cpu().contiguous(), torch.zeros(len(x), dtype=torch.bool)
        known = store.fallen(victim.name, start)
        if known is not None:
            x[known[0]], flag[known[0]] = known[1], True
        batches.append(x)
        fooled.append(flag)
        labels.append(y.cpu())
    x_adv, y, fell = (torch.cat(each).numpy() for each in (batches, labels, fooled))
    write(path, lambda place: np.savez_compressed(place, x_adv=x_adv, y=y, fooled=fell))


def _curves(plan: Plan, store: Store, victim: Victim, n: int) -> list[dict[str, Any]]:
    states = [store.read(victim.name, "curve", start) for start in plan.starts]
    if any(state is None for state in states):
        return []
    stands = torch.cat([state.tensors["stands"] for state in states if state is not None], 1)
    shares = [float(row.double().mean()) for row in stands]
    assert states[0] is not None
    epsilons = states[0].values["eps"]
    return [
        {
            "attack": "pgd",
            "eps": epsilons,
            "accuracy": shares,
            "intervals": [list(interval(share, n)) for share in shares],
        }
    ]


def _minimal(plan: Plan, store: Store, victim: Victim) -> list[dict[str, Any]]:
    lines = []
    for name, (norm, _) in MINIMAL.items():
        states = [state for start in plan.starts if (state := store.read(victim.name, name, start)) is not None]
        if not states:
            continue
        distances = torch.cat([state.tensors["distances"] for state in states])
        median = float(np.median(distances.numpy()))
        lines.append(
            {
                "attack": name,
                "norm": norm,
                "distances": [value if value < float("inf") else None for value in distances.tolist()],
                "median": median if median < float("inf") else None,
                "seconds": round(sum(float(state.values["seconds"]) for state in states), 3),
            }
        )
    return lines


def _corruptions(plan: Plan, store: Store, victim: Victim) -> list[dict[str, Any]]:
    states = [store.read(victim.name, "corruptions", start) for start in plan.starts]
    if any(state is None for state in states):
        return []
    lines = []
    assert states[0] is not None
    for key in sorted(states[0].tensors):
        name, _, severity = key.rpartition(" ")
        right = torch.cat([state.tensors[key] for state in states if state is not None])
        lines.append({"name": name, "severity": int(severity), "accuracy": _mean(right)})
    return lines


def _transfer(
    plan: Plan, store: Store, victims: Sequence[Victim], surrogates: Mapping[str, Source]
) -> dict[str, Any] | None:
    names = [victim.name for victim in victims if victim.gradients] + list(surrogates)
    rows = []
    for source in names:
        states = [s for start in plan.starts if (s := store.read("transfer", f"matrix-{source}", start)) is not None]
        if not states:
            return None
        rows.append([_mean(torch.cat([state.tensors[target] for state in states])) for target in names])
    return {"sources": names, "targets": names, "attack": "mi-fgsm", "accuracy": rows} if rows else None


def _joined(plan: Plan, store: Store, victim: str, unit: str, field: str) -> Tensor:
    states = [store.read(victim, unit, start) for start in plan.starts]
    return torch.cat([state.tensors[field] for state in states if state is not None])


def _size(plan: Plan, start: int) -> int:
    return min(plan.chunk, plan.count - start)


def _mean(right: Tensor) -> float:
    return float(right.double().mean()) if len(right) else 0.0


def _share(stands: Tensor) -> dict[str, Any]:
    share = _mean(stands)
    return {"accuracy": share, "interval": list(interval(share, len(stands)))}


def _hardware(world: World) -> dict[str, Any]:
    device = str(world.device)
    if world.device.type == "cuda":
        device = torch.cuda.get_device_name(world.device)
    return {
        "device": device,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "processes": world.size,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
