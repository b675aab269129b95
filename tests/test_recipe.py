"""Recipes: what can be written down, overridden and read back; the numbers in them are not tested here."""

import dataclasses
import json
import math
import typing
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdml.data import CATALOGUE
from fdml.errors import InputError
from fdml.recipe import Recipe, from_dict, override
from fdml.recipes import RECIPES, SETTINGS, recipe
from fdml.threat import Threat

FIELDS = {field.name for field in dataclasses.fields(Recipe)}
HINTS = typing.get_type_hints(Recipe)
DATA = sorted({*CATALOGUE, *SETTINGS, "npz:mine.npz"})
BASE = Recipe(name="mine")

every_recipe = pytest.mark.parametrize("name", RECIPES)


def changed(before: Recipe, after: Recipe) -> dict[str, object]:
    return {key: value for key, value in after.to_dict().items() if before.to_dict()[key] != value}


def is_of_its_kind(key: str, value: object) -> bool:
    kind = HINTS[key]
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) in (typing.get_args(kind) or (kind,))


# Overrides


@pytest.mark.parametrize(
    ("assignment", "key", "value"),
    [
        ("eps=8/255", "eps", 8 / 255),
        ("eps=0.25", "eps", 0.25),
        ("eps = 1e-3", "eps", 1e-3),
        ("eps=0", "eps", 0.0),
        ("lr=1", "lr", 1.0),
        ("seed=7", "seed", 7),
        ("epochs= 123 ", "epochs", 123),
        ("batch-size=77", "batch_size", 77),
        ("preact=true", "preact", True),
        ("preact=Yes", "preact", True),
        ("preact=1", "preact", True),
        ("compile=on", "compile", True),
        ("preact=false", "preact", False),
        ("preact=NO", "preact", False),
        ("compile=off", "compile", False),
        ("compile=0", "compile", False),
        ("width=24", "width", 24),
        ("width=none", "width", None),
        ("teacher_width=None", "teacher_width", None),
        ("norm=l2", "norm", "l2"),
        ("base=trades", "base", "trades"),
        ("fd_layers=stage2,stage3", "fd_layers", "stage2,stage3"),
        ("augment=none", "augment", "none"),
        ("architecture=a=b", "architecture", "a=b"),
    ],
)
def test_an_override_is_read_as_the_type_of_its_field(assignment: str, key: str, value: object) -> None:
    # From both ends, so that no default can stand in for the answer.
    for before in (
        BASE,
        dataclasses.replace(BASE, preact=True, compile=True, width=5, teacher_width=5, augment="flip"),
    ):
        after = override(before, [assignment])
        assert getattr(after, key) == value
        assert type(getattr(after, key)) is type(value)
        assert set(changed(before, after)) <= {key}


@pytest.mark.parametrize("change", ["norm=l2", "sigma=0.25", "compile=true"])
def test_interval_bounds_are_for_linf_alone(change: str) -> None:
    with pytest.raises(InputError, match=r"ibp=1\.0 needs norm=linf, sigma=0 and compile=false"):
        override(recipe("ibp"), [change])


def test_of_two_overrides_the_last_holds_and_the_recipe_stays() -> None:
    after = override(BASE, ["epochs=3", "lr=0.5", "epochs=4"])
    assert (after.epochs, after.lr) == (4, 0.5)
    assert Recipe(name="mine") == BASE
    assert override(BASE, []) == BASE


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("epochs", "'epochs' is not an override.*key=value"),
        ("", "'' is not an override"),
        ("epoch=3", "'epoch'.*'epochs'"),
        ("lr_=3", "'lr_'.*'lr'"),
        ("batchsize=3", "'batchsize'.*'batch_size'"),
        ("=3", "''"),
        ("name=other", "'name'"),
        ("needs_teacher=true", "'needs_teacher'"),
        ("__class__=3", "'__class__'"),
        ("epochs=many", "epochs='many'.*whole number"),
        ("epochs=2.5", "epochs='2.5'.*whole number"),
        ("epochs=8/2", "epochs='8/2'.*whole number"),
        ("epochs=none", "epochs='none'"),
        ("epochs=", "epochs=''"),
        ("epochs=0", "epochs=0.*between 1"),
        ("eps=8/0", "eps='8/0'.*8/255"),
        ("eps=a/b", "eps='a/b'.*8/255"),
        ("eps=1/2/3", "eps='1/2/3'"),
        ("eps=nan", "eps='nan'.*finite"),
        ("eps=inf", "eps='inf'.*finite"),
        ("lr=-inf", "lr='-inf'.*finite"),
        ("lr=1e999", "lr='1e999'.*finite"),
        ("eps=-1/255", "eps=-0.0039.*at least 0"),
        ("val_fraction=0", "val_fraction=0.0"),
        ("val_fraction=0.9", "val_fraction=0.9"),
        ("width=0", "width=0"),
        ("width=wide", "width='wide'.*whole number"),
        ("preact=maybe", "preact='maybe'.*true or false"),
        ("preact=2", "preact='2'.*true or false"),
        ("base=tradse", "'tradse'.*'trades'"),
        ("guidance=hodl", "'hodl'.*'hold'"),
        ("schedule=one_cycle", "'one_cycle'.*'one-cycle'"),
        ("precision=fp16", "'fp16'.*'bf16'|'fp16'.*'fp32'"),
        ("seed=" + "9" * 5000, "seed="),
        ("sigma=-0.1", "sigma=-0.1.*between 0 and 4"),
        ("sigma=64", "sigma=64.0.*between 0 and 4"),
        ("noise_copies=0", "noise_copies=0"),
        ("ibp=2", "ibp=2.0.*between 0 and 1"),
    ],
)
def test_a_wrong_override_says_what_would_be_right(assignment: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        override(BASE, [assignment])
    assert "\n" not in str(caught.value)


@settings(max_examples=150)
@given(key=st.sampled_from(sorted(FIELDS)), text=st.text(max_size=12) | st.floats().map(str) | st.integers().map(str))
def test_any_override_is_taken_or_refused(key: str, text: str) -> None:
    try:
        after = override(BASE, [f"{key}={text}"])
    except InputError:
        return
    assert is_of_its_kind(key, getattr(after, key))


# What stands in a file


@every_recipe
@pytest.mark.parametrize("dataset", DATA)
def test_every_recipe_of_every_data_set_survives_its_file(name: str, dataset: str) -> None:
    found = recipe(name, dataset)
    assert found.name == name
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert from_dict(json.loads(text)) == found
    assert set(json.loads(text)) == FIELDS
    assert Threat(found.norm, found.eps).eps > 0
    assert all(is_of_its_kind(key, value) for key, value in found.to_dict().items())


@every_recipe
@pytest.mark.parametrize("dataset", DATA)
def test_a_teacher_is_clean_or_robust_and_needs_no_teacher(name: str, dataset: str) -> None:
    student = recipe(name, dataset)
    for guided in (student, dataclasses.replace(student, fd=1.0, ml=1.0, answer=0.5, awp=0.1, start="teacher")):
        teacher = guided.teacher()
        assert not teacher.needs_teacher
        assert teacher.attack == ("pgd" if student.teacher_kind == "robust" else "none")
        assert teacher.base == "ce"
        assert (teacher.awp, teacher.sigma, teacher.ibp) == (0, 0, 0)
        assert (teacher.epochs, teacher.lr) == (student.teacher_epochs, student.teacher_lr)
        same = ("seed", "norm", "eps", "architecture", "preact", "augment", "precision", "val_fraction")
        assert all(getattr(teacher, key) == getattr(student, key) for key in same)


@pytest.mark.parametrize(
    ("width", "teacher_width", "expected"), [(8, None, 8), (8, 24, 24), (None, 24, 24), (None, None, None)]
)
def test_the_teachers_width(width: int | None, teacher_width: int | None, expected: int | None) -> None:
    assert dataclasses.replace(BASE, width=width, teacher_width=teacher_width).teacher().width == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": 3}, "'name'.*3"),
        ({"name": None}, "'name'.*None"),
        ({"epoch": 3}, "'epoch'.*'epochs'"),
        ({"__class__": "Recipe"}, "'__class__'"),
        ({"epochs": "30"}, "'epochs'.*'30'"),
        ({"epochs": 2.0}, r"'epochs'.*2\.0"),
        ({"epochs": True}, "'epochs'.*True"),
        ({"epochs": None}, "'epochs'.*None"),
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": -(10**30)}, "epochs=-1000"),
        ({"eps": "8/255"}, "'eps'.*'8/255'"),
        ({"eps": False}, "'eps'.*False"),
        ({"eps": [0.1]}, "'eps'"),
        ({"eps": math.nan}, "eps=nan.*finite"),
        ({"eps": math.inf}, "eps=inf.*finite"),
        ({"lr": math.nan}, "lr=nan"),
        ({"beta": 10**400}, "beta=1000.*finite"),
        ({"clip": -math.inf}, "clip=-inf"),
        ({"preact": 1}, "'preact'.*1"),
        ({"preact": "true"}, "'preact'.*'true'"),
        ({"width": 8.0}, r"'width'.*8\.0"),
        ({"width": True}, "'width'.*True"),
        ({"width": {}}, "'width'"),
        ({"norm": None}, "'norm'.*None"),
        ({"fd_layers": ["stage3"]}, "'fd_layers'"),
        ({"base": ["ce"]}, "'base'"),
        ({"base": "CE"}, "'CE'.*'ce'"),
        ({"base": 0}, "'base'.*0"),
        ({"schedule": "\ud800"}, "schedule"),
    ],
)
def test_a_hostile_file_is_refused_by_name(values: Mapping[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        from_dict({"name": "mine", **values})
    assert "\n" not in str(caught.value)


def test_a_file_without_a_name_is_refused() -> None:
    with pytest.raises(InputError, match="needs a name"):
        from_dict({"epochs": 3})


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["ce", "8/255", "none"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=200)
@given(key=st.sampled_from(sorted(FIELDS)), value=JSON)
def test_any_value_of_a_file_is_taken_or_refused(key: str, value: object) -> None:
    try:
        found = from_dict({**BASE.to_dict(), key: value})
    except InputError:
        return
    assert getattr(found, key) == value
    assert is_of_its_kind(key, value)


# The named recipes


@pytest.mark.parametrize("wrong", ["fmdl", "PGD-AT", "pgdat", "trade"])
def test_an_unknown_recipe_is_named_with_the_nearest(wrong: str) -> None:
    with pytest.raises(InputError, match=f"{wrong!r}.*did you mean"):
        recipe(wrong)


def test_data_sets_without_settings_are_taken_for_small_colour_images() -> None:
    assert recipe("fdml", "cifar10") == recipe("fdml", "folder:somewhere")
    assert recipe("fdml", "cifar10") != recipe("fdml", "digits")


@every_recipe
def test_a_recipe_keeps_the_settings_of_its_data_set(name: str) -> None:
    # Methods are compared on one threat, network and split, or the comparison means nothing.
    # What is to be certified by one method is compared among itself.
    rival = {"smooth-adv": "smooth", "fdml-smooth": "smooth", "smooth": "smooth", "fdml-ibp": "ibp", "ibp": "ibp"}
    for dataset in DATA:
        ours, others = recipe(name, dataset), recipe(rival.get(name, "pgd-at"), dataset)
        same = ("norm", "eps", "sigma", "architecture", "seed", "val_fraction", "test_limit")
        assert all(getattr(ours, key) == getattr(others, key) for key in same)


def test_what_each_recipe_is() -> None:
    found = {name: recipe(name) for name in RECIPES}
    guided = {name: (r.fd > 0, r.ml > 0) for name, r in found.items()}
    assert guided["fdml"] == (True, True)
    assert guided["fd"] == (True, False)
    assert guided["ml"] == (False, True)
    taught = {"fdml", "fd", "ml", "fdml-smooth", "fdml-ibp", "hat", "rslad", "agkd-bml"}
    assert {name for name, r in found.items() if r.needs_teacher} == taught
    assert {name for name, r in found.items() if r.teacher_kind == "robust"} == {"rslad"}
    assert {name for name, r in found.items() if r.attack == "none"} == {"standard", "smooth", "ibp"}
    assert {name for name, r in found.items() if not r.is_defended} == {"standard", "smooth"}
    assert {name for name, r in found.items() if r.sigma} == {"smooth", "smooth-adv", "fdml-smooth"}
    assert {name for name, r in found.items() if r.ibp} == {"ibp", "fdml-ibp"}
    assert {name for name, r in found.items() if r.attack == "n-fgsm"} == {"fast-at"}
    assert found["pgd-at"].base == "ce"
    assert all(found[name].base == name for name in ("trades", "mart", "alp", "hat", "rslad"))


@pytest.mark.parametrize(
    ("change", "needs"),
    [({}, False), ({"fd": 0.1}, True), ({"ml": 0.1}, True), ({"answer": 0.1}, True), ({"start": "teacher"}, True)],
)
def test_what_needs_a_teacher(change: dict[str, typing.Any], needs: bool) -> None:
    bare = dataclasses.replace(BASE, fd=0.0, ml=0.0, answer=0.0, start="random")
    assert dataclasses.replace(bare, **change).needs_teacher is needs


@pytest.mark.parametrize(
    ("text", "names"),
    [("none", ()), ("flip", ("flip",)), ("flip, crop", ("flip", "crop"))],
)
def test_lists_in_a_field(text: str, names: tuple[str, ...]) -> None:
    assert dataclasses.replace(BASE, augment=text).augmentations == names
    assert dataclasses.replace(BASE, fd_layers=" stage2 ,stage3,").layers == ("stage2", "stage3")


@pytest.mark.parametrize("change", [{"attack": "none"}, {"attack": "n-fgsm"}, {"sigma": 0.25}])
def test_what_the_inner_attack_of_rslad_would_ignore_is_refused(change: dict[str, typing.Any]) -> None:
    with pytest.raises(InputError, match="base=rslad needs attack=pgd and sigma=0"):
        dataclasses.replace(recipe("rslad"), **change)
