"""Checking a certificates file against the model that it speaks of."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fdml.certify.by_smoothing import Sampling
from fdml.certify.certificate import Certificate, read, unpack
from fdml.certify.confidence import clopper_pearson, clopper_pearson_upper
from fdml.certify.noise import LEVELS, GridNoise
from fdml.certify.prove import classifier
from fdml.certify.smoothing import Smoother
from fdml.data.dataset import DataSet
from fdml.errors import InputError
from fdml.evaluate.victim import Victim
from fdml.sequence import LOOK, mixture_lower, probability_of, radius_of
from fdml.threat import Threat
from fdml.world import World

CONTRADICTION = 1e-6
"""A certificate is contradicted where fresh samples make it less likely than this."""

FRESH = 2000
"""Samples drawn anew for each image that is looked at again."""


def recheck(
    path: Path,
    model: Path,
    data: DataSet,
    *,
    limit: int = 50,
    seed: int = 0,
    device: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Checks the file at ``path``: that it speaks of this model and this data (by their digests), that each line's
    radius follows from its counts, and that at most ``limit`` of the images, drawn by ``seed``, bear the certificate
    out: under fresh noise, or by their counter-examples.

    Returns ``valid``, what was ``checked``, and the ``faults`` as sentences. Raises ``InputError`` for what is no
    certificates file.
    """
    header, certificates = read(path)
    world = World.join(device)
    data = data.to(world.device)
    victim = Victim.read(model, model.stem, world.device)
    faults = [*_digests(header, victim, data), *_lines(header, certificates, data)]
    looked: Sequence[Certificate] = []
    if not faults:
        order = torch.randperm(len(certificates), generator=torch.Generator().manual_seed(seed))[:limit]
        looked = [certificates[place] for place in order.tolist()]
        faults += _images(header, looked, victim, data, seed, world)
    result = {"valid": not faults, "checked": {"lines": len(certificates), "images": len(looked)}, "faults": faults}
    if console is not None:
        for fault in faults[:20]:
            console.print(fault, markup=False, highlight=False)
        verdict = "valid" if not faults else f"not valid: {len(faults)} faults"
        console.print(f"{path}: {verdict}; {len(certificates)} lines and {len(looked)} images looked at", markup=False)
    return result


def _digests(header: dict[str, Any], victim: Victim, data: DataSet) -> list[str]:
    faults = []
    if header.get("model", {}).get("sha256") != victim.sha256():
        faults.append(f"the file speaks of another model: SHA-256 {str(header.get('model', {}).get('sha256'))[:16]}…")
    if header.get("data", {}).get("fingerprint") != data.fingerprint:
        faults.append(f"the file speaks of other data: {str(header.get('data', {}).get('name'))[:40]}")
    return faults


def _lines(header: dict[str, Any], certificates: Sequence[Certificate], data: DataSet) -> list[str]:
    """Faults of single lines: the arithmetic, the labels, and images that stand twice or are missing."""
    faults = []
    seen = set()
    labels = data.test.labels
    for c in certificates:
        if not 0 <= c.index < len(labels) or c.label != int(labels[c.index]):
            faults.append(f"image {c.index}: the data has no such image with the label {c.label}")
        if c.index in seen:
            faults.append(f"image {c.index}: stands twice")
        seen.add(c.index)
        if (wrong := _arithmetic(c)) is not None:
            faults.append(f"image {c.index}: {wrong}")
    if len(seen) != header.get("images", {}).get("count"):
        faults.append(f"the header speaks of {header.get('images', {}).get('count')} images, the file has {len(seen)}")
    return faults


def _arithmetic(c: Certificate) -> str | None:
    """What is wrong with the numbers of a line, or None."""
    if c.status != "certified":
        return None if c.radius == 0 else f"{c.status}, but with a radius of {c.radius:g}"
    if c.method not in ("smoothing", "cohen"):
        return (
            None
            if c.eps is not None and 0 < c.radius <= c.eps and (c.bound or 0) > 0
            else "a bound that proves nothing"
        )
    if c.sigma is None or c.alpha is None or c.hits is None or c.n is None or c.shift is None:
        return "a certificate of smoothing without sigma, alpha, hits, n or shift"
    if not (0 < c.sigma <= 4 and 0 < c.alpha < 0.5 and 0 <= c.hits <= c.n and c.shift >= 0):
        return f"sigma={c.sigma:g}, alpha={c.alpha:g} or {c.hits} hits of {c.n} are out of range"
    lower = float(clopper_pearson(c.hits, c.n, c.alpha)) if c.method == "cohen" else mixture_lower(c.hits, c.n, c.alpha)
    allowed = radius_of(lower, c.sigma) - c.shift
    # A look in the middle may have shown more than the last one did; never more than a fixed number of samples could.
    if c.method == "smoothing":
        allowed = max(allowed, radius_of(float(clopper_pearson(c.hits, c.n, c.alpha)), c.sigma) - c.shift)
    if c.radius > allowed * (1 + 1e-9):
        return f"{c.hits} hits of {c.n} certify {allowed:.6g}, not {c.radius:.6g}"
    return None


def _images(
    header: dict[str, Any],
    certificates: Sequence[Certificate],
    victim: Victim,
    data: DataSet,
    seed: int,
    world: World,
) -> list[str]:
    if header["method"] == "bounds":
        return _counterexamples(header, certificates, victim, data)
    settings = header["settings"]
    try:
        keys = ("sigma", "alpha", "n0", "n", "sequential")
        sampling = Sampling(**{key: settings[key] for key in keys}, seed=seed)
        precision = settings["precision"]
    except (KeyError, TypeError):
        raise InputError("the header's settings are not those of smoothing") from None
    _, like, _ = next(iter(data.test.batches([torch.arange(min(8, len(data.test)))])))
    noise = GridNoise(sampling.sigma, sampling.seed, world.device)
    smoother = Smoother(classifier(victim.model, like, precision), len(data.classes), noise, batch=2 * LOOK)
    faults = []
    for c in certificates:
        if c.status != "certified":
            continue
        _, x, _ = next(iter(data.test.batches([torch.tensor([c.index])])))
        image = (x[0] * LEVELS).round().to(torch.uint8)
        hits = int(smoother.counts(image, c.index, FRESH, "recheck")[c.answer])
        upper = float(clopper_pearson_upper(hits, FRESH, CONTRADICTION))
        if upper < probability_of(c.radius + (c.shift or 0.0), sampling.sigma):
            faults.append(
                f"image {c.index}: {hits} of {FRESH} fresh samples are {data.classes[c.answer]}: too few for the radius"
                f" {c.radius:.4g}"
            )
    return faults


def _counterexamples(
    header: dict[str, Any], certificates: Sequence[Certificate], victim: Victim, data: DataSet
) -> list[str]:
    """Faults of counter-examples: outside the threat, or answered as before. Proofs are made again by certifying."""
    threat = Threat(header["settings"]["norm"], header["settings"]["eps"])
    faults = []
    for c in certificates:
        if c.counterexample is None:
            continue
        _, x, _ = next(iter(data.test.batches([torch.tensor([c.index])])))
        x_adv = torch.from_numpy(unpack(c.counterexample, x.numel())).view_as(x).to(x.device)
        if not bool(threat.contains(x_adv, x)):
            faults.append(f"image {c.index}: its counter-example is {float(threat.distance(x_adv, x)):.6g} away")
        if int(victim.forward(x_adv).argmax(1)) == c.answer:
            faults.append(f"image {c.index}: its counter-example is answered {data.classes[c.answer]}, as the image is")
    return faults
