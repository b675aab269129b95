"""Adversarial images of a user's own pictures, and the pictures that show them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fdml.card import read_card
from fdml.errors import InputError, unknown
from fdml.evaluate import predictions
from fdml.evaluate.suites import entry
from fdml.evaluate.victim import Victim
from fdml.files import write_whole
from fdml.inference import inference
from fdml.pictures import read
from fdml.randomness import Streams
from fdml.threat import Threat
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
    label: str | None = None,
    seed: int = 0,
    device: str | None = None,
) -> list[Crafted]:
    """Attacks pictures and writes, for each, ``NAME-adversarial.png`` (what a camera or a file would hold: 8 bits,
    inside the threat model) and ``NAME-compared.png`` (clean, adversarial, and their difference magnified).

    ``label`` is the true class of all images; without it the model's own answer is what is to be changed. Raises
    ``InputError`` for an unknown attack or class, an attack that needs a training set, and an unreadable image.
    """
    card = read_card(model)
    one = entry(attack)
    if any(step.access == "features" for step in one.steps):
        raise InputError(f"attack {attack!r} needs images of other classes: use it in fdml evaluate")
    if label is not None and label not in card.classes:
        raise unknown("class", label, card.classes)
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
    x_adv = _attacked(victim, one.steps, x, y, threat, seed)
    written = x + ((x_adv - x) * 255).trunc() / 255  # towards the clean image: whole grey levels, still inside
    # Rounding may undo an attack; whichever of the two ways to round fools the model is kept.
    nearest = threat.project((x_adv * 255).round() / 255, x)
    kept = (predictions(victim.model, written) == y) & threat.contains(nearest, x) & _levels(nearest)
    written[kept] = nearest[kept]
    before, after = _answers(victim, x), _answers(victim, written)
    found = []
    for place, path in enumerate(images):
        file, picture = out / f"{path.stem}-adversarial.png", out / f"{path.stem}-compared.png"
        pair = x[place].cpu().numpy(), written[place].cpu().numpy()
        write_whole(file, lambda target, pair=pair: _picture(pair[1]).save(target))
        write_whole(picture, lambda target, pair=pair: _compared(*pair).save(target))
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


def _attacked(victim: Victim, steps: Sequence, x: Tensor, y: Tensor, threat: Threat, seed: int) -> Tensor:
    x_adv = x.clone()
    for step in steps:
        left = (predictions(victim.model, x_adv) == y).nonzero().squeeze(1)
        if not len(left):
            break
        model = victim.forward if step.access == "answers" else victim.model
        generator = Streams.of(left, seed, step.name)
        x_adv[left] = step.attack(model, x[left], y[left], threat, generator=generator)
    return x_adv


def _levels(x: Tensor) -> Tensor:
    """Whether every pixel is a whole grey level."""
    return ((x * 255 - (x * 255).round()).abs() < 1e-3).flatten(1).all(1)


def _answers(victim: Victim, x: Tensor) -> list[tuple[int, float]]:
    with inference(victim.model), torch.no_grad():
        best = victim.model(x).softmax(1).max(1)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def _picture(image: np.ndarray) -> Image.Image:
    levels = np.rint(image.transpose(1, 2, 0) * 255).astype(np.uint8)
    return Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels)


def _compared(clean: np.ndarray, adversarial: np.ndarray, side: int = 256, gap: int = 8) -> Image.Image:
    """Clean, adversarial, and the difference about grey, scaled so that its largest change is black or white."""
    delta = adversarial - clean
    shown = 0.5 + delta / (2 * max(float(np.abs(delta).max()), 1e-6))
    scale = max(1, side // max(clean.shape[1:]))
    tiles = [_picture(tile).convert("RGB") for tile in (clean, adversarial, shown)]
    width, height = tiles[0].width * scale, tiles[0].height * scale
    sheet = Image.new("RGB", (3 * width + 2 * gap, height), "white")
    for place, tile in enumerate(tiles):
        sheet.paste(tile.resize((width, height), Image.Resampling.NEAREST), (place * (width + gap), 0))
    return sheet
