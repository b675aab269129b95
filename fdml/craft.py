"""Adversarial images of a user's own pictures, and the pictures that show them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fdml.attacks import FEATURES, Model
from fdml.attacks.tuned import tuned
from fdml.card import Card, read_card
from fdml.data import npz
from fdml.data.dataset import Batch
from fdml.errors import InputError, unknown
from fdml.evaluate import predictions
from fdml.evaluate.suites import CASCADES, Step, entry
from fdml.evaluate.victim import Victim
from fdml.files import write_whole
from fdml.inference import inference
from fdml.losses import Labels
from fdml.pictures import read
from fdml.randomness import Streams
from fdml.threat import Images, Threat
from fdml.world import World


@dataclass(frozen=True)
class Crafted:
    """One image and what became of it. Probabilities are of the class named; ``distance`` is in the threat's norm, of
    the image of whole grey levels that was written."""

    image: str
    label: str
    before: str
    before_probability: float
    after: str
    after_probability: float
    fooled: bool
    distance: float
    file: str
    picture: str


def craft(
    model: Path,
    images: Sequence[Path],
    threat: Threat,
    out: Path,
    *,
    attack: str = "apgd-ce",
    steps: int | None = None,
    label: str | None = None,
    target: str | None = None,
    guides: Path | None = None,
    seed: int = 0,
    device: str | None = None,
) -> list[Crafted]:
    """Attacks pictures and writes, for each, ``NAME-adversarial.png`` (what a camera or a file would hold: 8 bits,
    inside the threat model) and ``NAME-compared.png`` (clean, adversarial, and their difference magnified).

    ``label`` is the true class of all images; without it the model's own answer is what is to be changed. ``steps`` and
    ``target``, the class to be answered, are those of ``tuned``; an image that is answered wrongly already is left as
    it is, whatever the target. ``guides`` is an .npz file of images of the model's shape and their labels, places in
    its list of classes: what an attack on features steers by.

    Raises ``InputError`` for an unknown attack or class, steps or a target that the attack does not take, a target that
    an image is already, guides that are missing, not asked for or not the model's, and an unreadable image.
    """
    card = read_card(model)
    for name in (label, target):
        if name is not None and name not in card.classes:
            raise unknown("class", name, card.classes)
    aim = None if target is None else card.classes.index(target)
    chosen = _chosen(attack, steps, aim)
    if guides is None and attack in FEATURES:
        raise InputError(
            f"attack {attack!r} needs images of other classes: give guides, an .npz file of images x and labels y, or "
            "use it in fdml evaluate"
        )
    if guides is not None and attack not in FEATURES:
        raise InputError(f"attack {attack!r} takes no guides: leave them out, or take {', '.join(FEATURES)}")
    stems = [path.stem for path in images]
    if len(set(stems)) < len(stems):
        raise InputError(
            f"two images are called {max(stems, key=stems.count)!r}: their results would overwrite each other"
        )
    where = World.join(device).device
    victim = Victim.read(model, "model", where)
    x = torch.stack([torch.tensor(read(path, card.input)) for path in images]).to(where).float() / 255
    clean = predictions(victim.model, x)
    y = clean if label is None else torch.full_like(clean, card.classes.index(label))
    if aim is not None and (y == aim).any():
        path, how = images[y.tolist().index(aim)], "labelled" if label else "answered"
        raise InputError(f"{path} is {how} {target!r} already: the target must be another class")
    options = {}
    if guides is not None:
        others = _guides(guides, card, where)
        options = {"guides": others.x, "guide_y": others.y}
    x_adv = _attacked(victim, chosen, x, y, threat, seed, **options)
    written = whole_levels(victim.model, x, x_adv, y, threat)
    before, after = _answers(victim, x), _answers(victim, written)
    found = []
    for place, path in enumerate(images):
        file, picture = out / f"{path.stem}-adversarial.png", out / f"{path.stem}-compared.png"
        pair = x[place].cpu().numpy(), written[place].cpu().numpy()
        write_whole(file, lambda target, pair=pair: as_image(pair[1]).save(target))
        write_whole(picture, lambda target, pair=pair: side_by_side(*pair).save(target))
        (was, was_p), (now, now_p) = before[place], after[place]
        found.append(
            Crafted(
                str(path),
                card.classes[int(y[place])],
                card.classes[was],
                was_p,
                card.classes[now],
                now_p,
                now != int(y[place]),
                float(threat.distance(written[[place]], x[[place]])),
                str(file),
                str(picture),
            )
        )
    return found


def whole_levels(model: Model, x: Images, x_adv: Images, y: Labels, threat: Threat) -> Images:
    """``x_adv`` as a file of 8 bits holds it: rounded towards ``x``, which is itself of whole grey levels, and so still
    inside the threat model. Where that undoes the attack (the answer is ``y``) and rounding to the nearest level stays
    inside, it is the nearest."""
    written = x + ((x_adv - x) * 255).trunc() / 255
    nearest = threat.project((x_adv * 255).round() / 255, x)
    kept = (predictions(model, written) == y) & threat.contains(nearest, x) & _levels(nearest)
    written[kept] = nearest[kept]
    return written


def _chosen(attack: str, steps: int | None, target: int | None) -> tuple[Step, ...]:
    """The steps of an attack or a cascade, the one of an attack tuned."""
    found = entry(attack).steps
    if steps is None and target is None:
        return found
    if attack in CASCADES:
        raise InputError(
            f"attack {attack!r} is a cascade ({', '.join(one.name for one in found)}): steps and a target are for one "
            "attack alone"
        )
    return tuple(replace(one, attack=tuned(attack, steps=steps, target=target)) for one in found)


def _guides(path: Path, card: Card, device: torch.device) -> Batch:
    """All images of the file, or of its training split where it has splits, in their order there."""
    found = npz.read(path).train
    if found.shape != card.input:
        raise InputError(f"{path}: guides are {found.shape}, the model's images {card.input} (channels, height, width)")
    highest = int(found.labels.max())
    if highest >= len(card.classes):
        raise InputError(
            f"{path}: label {highest} is out of range; the model's labels go from 0 to {len(card.classes) - 1}"
        )
    return next(iter(found.to(device).batches([torch.arange(len(found))])))


def _attacked(
    victim: Victim, steps: Sequence[Step], x: Tensor, y: Tensor, threat: Threat, seed: int, **options: Any
) -> Tensor:
    x_adv = x.clone()
    for step in steps:
        left = (predictions(victim.model, x_adv) == y).nonzero().squeeze(1)
        if not len(left):
            break
        model = victim.forward if step.access == "answers" else victim.model
        generator = Streams.of(left, seed, step.name)
        x_adv[left] = step.attack(model, x[left], y[left], threat, generator=generator, **options)
    return x_adv


def _levels(x: Tensor) -> Tensor:
    """Whether every pixel is a whole grey level."""
    return ((x * 255 - (x * 255).round()).abs() < 1e-3).flatten(1).all(1)


def _answers(victim: Victim, x: Tensor) -> list[tuple[int, float]]:
    with inference(victim.model), torch.no_grad():
        best = victim.model(x).softmax(1).max(1)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def as_image(image: np.ndarray) -> Image.Image:
    """A picture (c, h, w) in [0, 1] as an image of Pillow's, of 8 bits."""
    levels = np.rint(image.transpose(1, 2, 0) * 255).astype(np.uint8)
    return Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels)


def side_by_side(clean: np.ndarray, adversarial: np.ndarray, side: int = 256, gap: int = 8) -> Image.Image:
    """Clean, adversarial, and the difference about grey, scaled so that its largest change is black or white."""
    delta = adversarial - clean
    shown = 0.5 + delta / (2 * max(float(np.abs(delta).max()), 1e-6))
    scale = max(1, side // max(clean.shape[1:]))
    tiles = [as_image(tile).convert("RGB") for tile in (clean, adversarial, shown)]
    width, height = tiles[0].width * scale, tiles[0].height * scale
    sheet = Image.new("RGB", (3 * width + 2 * gap, height), "white")
    for place, tile in enumerate(tiles):
        sheet.paste(tile.resize((width, height), Image.Resampling.NEAREST), (place * (width + gap), 0))
    return sheet
