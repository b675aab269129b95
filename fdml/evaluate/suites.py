"""What an evaluation runs: steps, which are attacks with their budgets; entries, which are what a report lists;
suites."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial

from fdml.attacks import ATTACKS, FEATURES, QUERIES
from fdml.errors import InputError, unknown

CONTROLS = ("noise", "spatial")
HELPED = ("fab-t",)
OUTSIDE = ("spatial",)
PROTOCOLS = ("white", "gray", "black", "control")
SUITES = ("quick", "standard", "full")


@dataclass(frozen=True)
class Step:
    """One attack with its budget. Steps of the same name are the same, and are run once on an image."""

    name: str
    label: str
    attack: Callable
    source: str | None = None

    @property
    def access(self) -> str:
        """What it uses of the model: its gradient, its answers alone, or its features too."""
        base = self.name.partition("@")[0]
        return "answers" if base in (*QUERIES, *CONTROLS) else "features" if base in FEATURES else "gradient"

    @property
    def counted(self) -> bool:
        """Whether it says how often it asked for each image."""
        return self.name in QUERIES

    @property
    def helped(self) -> bool:
        """Whether it takes a faster way to the answers beside the model."""
        return self.name in HELPED

    @property
    def settings(self) -> dict[str, object]:
        """The scalars that it was configured with."""
        found: dict[str, object] = {}
        attack = getattr(self.attack, "minimal", self.attack)
        while isinstance(attack, partial):
            plain = {k: v for k, v in attack.keywords.items() if v is None or isinstance(v, str | int | float)}
            found = plain | found
            attack = attack.func
        return found


@dataclass(frozen=True)
class Entry:
    """A line of the report. Its steps run one after the other, each on the images that still stand."""

    name: str
    label: str
    protocol: str
    kind: str
    steps: tuple[Step, ...]
    source: str | None = None

    @property
    def cost(self) -> float:
        """Roughly how many forward passes an image takes, for the time that is left."""
        return sum(COSTS.get(each.name.partition("@")[0], 100.0) for each in self.steps)

    @property
    def counts(self) -> bool:
        """Whether it stays inside the threat model, so that what it fools is lost in the worst case."""
        return self.name not in OUTSIDE


LABELS: dict[str, str] = {
    "fgsm": "FGSM",
    "r-fgsm": "R-FGSM",
    "pgd20": "PGD-20",
    "pgd-best": "PGD-20, largest margin",
    "pgd100x5": "PGD-100x5",
    "cw": "CW-50",
    "cw-l2": "CW",
    "apgd-ce": "APGD-CE",
    "apgd-dlr": "APGD-DLR",
    "apgd-t": "APGD-T",
    "apgd-t3": "APGD-T, 3 targets",
    "apgd-ce-x5": "APGD-CE, 5 restarts",
    "apgd-t5": "APGD-T, 5 targets",
    "fab-t": "FAB-T",
    "square": "Square, 5,000",
    "square1000": "Square, 1,000",
    "nes": "NES",
    "spsa": "SPSA",
    "hopskipjump": "HopSkipJump",
    "mi-fgsm": "MI-FGSM",
    "di-ti": "DI-TI",
    "pgd50-transfer": "PGD-50",
    "noise": "random noise",
    "spatial": "shifts and turns",
    "deepfool": "DeepFool",
}
"""What the report calls an attack; one that is not here goes by its own name."""

COSTS: dict[str, float] = {
    "fgsm": 3, "r-fgsm": 3, "pgd20": 50, "pgd100x5": 1200, "cw": 120, "apgd-ce": 250, "apgd-t": 1800, "apgd-t3": 600,
    "fab-t": 2700, "square": 4000, "square1000": 800, "nes": 4000, "spsa": 4000, "hopskipjump": 4000,
}  # fmt: skip

CASCADES: dict[str, tuple[str, tuple[str, ...]]] = {
    # Croce and Hein 2020: the standard version, at its published budgets.
    "autoattack": ("AutoAttack", ("apgd-ce", "apgd-t", "fab-t", "square")),
    # Never to be reported as AutoAttack.
    "fast": ("fast cascade", ("apgd-ce", "apgd-t3", "square1000")),
}

AUTOATTACK_L1 = ("apgd-ce-x5", "apgd-t5", "fab-t", "square")
"""The steps of the standard version in l1 (Croce and Hein 2021)."""

NOT_L1 = ("mi-fgsm", "di-ti", "nes", "spsa", "hopskipjump", "deepfool")
"""What a suite leaves out in l1, for which it is not defined."""

_KINDS = (
    {"fgsm": "one-step", "r-fgsm": "one-step"} | dict.fromkeys(CONTROLS, "control") | dict.fromkeys(QUERIES, "query")
)

_TRANSFER = ("mi-fgsm", "di-ti", "pgd50-transfer")

# By suite: what each protocol runs. White-box and query attacks by their names; the gray and transfer protocols run
# their attacks on every surrogate.
_WHITE = {
    "quick": ("fgsm", "pgd20", "fast"),
    "standard": ("fgsm", "pgd20", "pgd100x5", "cw", "feature+ce", "feature+dlr", "metric+dlr", "autoattack"),
}
_WHITE["full"] = (*_WHITE["standard"][:-1], "r-fgsm", "feature-all", "metric", "metric+ce", "deepfool", "autoattack")
_QUERY = {"quick": ("square1000",), "standard": ("square",), "full": ("square", "nes", "spsa", "hopskipjump")}
_CONTROL = {"quick": ("noise",), "standard": ("noise", "spatial"), "full": ("noise", "spatial")}

DEFAULT_PROTOCOLS = {
    "quick": ("white", "control"),
    "standard": ("white", "query", "control"),
    "full": ("white", "gray", "transfer", "query", "control"),
}
"""The protocols of a suite, unless others are asked for; gray and transfer may have to train surrogates first."""

CHOICES = ("white", "gray", "black", "transfer", "query", "control")
"""The protocols by name; black is transfer and query."""


def step(name: str, source: str | None = None) -> Step:
    """The step of an attack, by its name; raises ``InputError`` for an unknown one."""
    if name not in ATTACKS:
        raise unknown("attack", name, [*ATTACKS, *CASCADES])
    return Step(f"{name}@{source}" if source else name, LABELS.get(name, name), ATTACKS[name], source)


def entry(name: str, protocol: str | None = None, norm: str = "linf") -> Entry:
    """The entry of an attack or a cascade, by its name; raises ``InputError`` for an unknown one."""
    kind = _KINDS.get(name, "white")
    protocol = protocol or {"query": "black", "control": "control"}.get(kind, "white")
    if name in CASCADES:
        label, steps = CASCADES[name]
        if name == "autoattack" and norm == "l1":
            steps = AUTOATTACK_L1
        return Entry(name, label, protocol, "white", tuple(step(each) for each in steps))
    only = step(name)
    return Entry(name, only.label, protocol, "iterative" if name.startswith("pgd") else kind, (only,))


def transferred(source: str, protocol: str) -> Entry:
    """The entry of what is crafted on a surrogate: the worst of three attacks."""
    return Entry(source, source, protocol, "transfer", tuple(step(name, source) for name in _TRANSFER), source)


def entries(
    suite: str,
    protocols: Collection[str],
    attacks: Collection[str],
    surrogates: Mapping[str, str],
    *,
    norm: str = "linf",
    gradients: bool = True,
    features: bool = True,
) -> list[Entry]:
    """What is run on one model: the protocols of the suite, or the named attacks alone.

    ``surrogates`` are the names of the attacker's models with their protocol. Without ``gradients`` only queries,
    transfer and controls are left.

    Raises ``InputError`` for an unknown suite, protocol or attack, and for an attack that the model cannot be given.
    """
    if suite not in SUITES:
        raise unknown("suite", suite, SUITES)
    for protocol in protocols:
        if protocol not in CHOICES:
            raise unknown("protocol", protocol, CHOICES)
    found: list[Entry] = []
    if attacks:
        found = [entry(name, norm=norm) for name in attacks]
        for one in found:
            if not gradients and any(s.access != "answers" for s in one.steps):
                raise InputError(
                    f"attack {one.name!r} needs gradients, which the model has not: take {', '.join(QUERIES)}"
                )
        return found
    wanted = set(protocols) | ({"transfer", "query"} if "black" in protocols else set())
    if "white" in wanted and gradients:
        found += [entry(name, norm=norm) for name in _WHITE[suite] if features or name not in FEATURES]
    if "gray" in wanted:
        found += [transferred(name, "gray") for name, protocol in surrogates.items() if protocol == "gray"]
    if "transfer" in wanted:
        found += [transferred(name, "black") for name, protocol in surrogates.items() if protocol == "black"]
    if "query" in wanted or not gradients:
        found += [entry(name) for name in _QUERY[suite]]
    if "control" in wanted:
        found += [entry(name) for name in _CONTROL[suite]]
    if norm != "l1":
        return found
    found = [
        replace(one, steps=tuple(each for each in one.steps if each.name.partition("@")[0] not in NOT_L1))
        for one in found
    ]
    return [one for one in found if one.steps]


def describe() -> dict[str, str]:
    """Every attack by name, in a few words."""
    found = {name: f"{label}: {' + '.join(steps)}" for name, (label, steps) in CASCADES.items()}
    for name, attack in ATTACKS.items():
        one = Step(name, name, attack)
        words = ", ".join(f"{key}={value}" for key, value in one.settings.items())
        found[name] = f"{LABELS.get(name, name)}, uses the {one.access}" + (f"; {words}" if words else "")
    return found
