import json
import math
import os
import struct
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdml.card import CARD_LIMIT, FORMAT, HEADER_LIMIT, KEY, NORMS, ROLES, Card, TensorInfo, header, read_card
from fdml.errors import InputError

CARD = Card(
    architecture="small-cnn",
    options={"width": 16, "depths": [2, 2]},
    classes=("cat", "dog", "ship"),
    input=(3, 32, 32),
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.2, 0.2),
    threat={"norm": "linf", "eps": 8 / 255},
    role="student",
    recipe={"epochs": 3, "layers": ["stage3", "stage4"], "lr": 0.1, "ema": None},
    seed=0,
    data={"name": "cifar10", "fingerprint": "sha256:00ff"},
    metrics={"clean": 0.91, "n": 1000, "student": {"pgd20": 0.5}},
    versions={"fdml": "0.1.0"},
)


def save(path: Path, card: str | None) -> Path:
    np = pytest.importorskip("numpy")
    save_file = pytest.importorskip("safetensors.numpy").save_file
    tensors = {
        "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "bias": np.zeros(2, dtype=np.float16),
        "step": np.array(7),
        "none": np.zeros((0, 4), dtype=np.uint8),
    }
    save_file(tensors, path, metadata=None if card is None else {KEY: card})
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(tmp_path / "model.safetensors", CARD.to_json())


def raw(path: Path, head: str | bytes, data: bytes = b"", length: int | None = None) -> Path:
    head = head.encode() if isinstance(head, str) else head
    path.write_bytes(struct.pack("<Q", len(head) if length is None else length) + head + data)
    return path


def fails(path: Path | str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_card(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def card_or_refusal(path: Path) -> Card | str:
    """What may come of any file at all: a valid card, or one line that says why not."""
    try:
        card = read_card(path)
    except InputError as error:
        return str(error) if "\n" not in str(error) else ""
    return card if Card.from_json(card.to_json()) == card else ""


# --- the card and its JSON

names = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=20)
numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63), 2**63 - 1)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=3), max_leaves=8)
tables = st.dictionaries(texts, values, max_size=4)
metrics = st.recursive(
    st.dictionaries(texts, numbers, max_size=3), lambda v: st.dictionaries(texts, numbers | v, max_size=3), max_leaves=6
)
threats = st.none() | st.builds(
    lambda norm, eps: {"norm": norm, "eps": eps}, st.sampled_from(NORMS), st.floats(0, 1) | st.integers(0, 1)
)


@st.composite
def cards(draw: st.DrawFn) -> Card:
    channels = draw(st.integers(1, 64))
    return Card(
        architecture=draw(names),
        options=draw(tables),
        classes=tuple(draw(st.lists(names, min_size=2, max_size=12))),
        input=(channels, draw(st.integers(1, 8192)), draw(st.integers(1, 8192))),
        mean=tuple(draw(st.lists(st.floats(-1e300, 1e300), min_size=channels, max_size=channels))),
        std=tuple(draw(st.lists(st.floats(1e-300, 1e300), min_size=channels, max_size=channels))),
        threat=draw(threats),
        role=draw(st.sampled_from(ROLES)),
        recipe=draw(st.dictionaries(texts, scalars | st.lists(scalars, max_size=3), max_size=4)),
        seed=draw(st.integers(0, 2**63 - 1)),
        data={"name": draw(texts.filter(bool)), "fingerprint": draw(texts.filter(bool))},
        metrics=draw(metrics),
        versions=draw(st.dictionaries(names, names, max_size=4)),
    )


@given(cards())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_round_trip(card: Card) -> None:
    text = card.to_json()
    assert Card.from_json(text) == card
    assert Card.from_json(text).to_json() == text


def test_json_is_sorted_and_complete() -> None:
    found = json.loads(CARD.to_json())
    assert list(found) == sorted(asdict(CARD))
    assert found["format"] == FORMAT


def test_tables_are_copied_and_their_tuples_become_lists() -> None:
    options = {"depths": (2, 2)}
    card = replace(CARD, options=options)
    options["depths"] = (9, 9)
    assert card.options == {"depths": [2, 2]}
    assert Card.from_json(card.to_json()) == card


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("architecture", "", "architecture must be text of 1 to 200 printable"),
        ("architecture", "a\nb", "printable"),
        ("options", [1], "options must be a table"),
        ("options", {1: 2}, "keys are strings"),
        ("options", {"f": len}, "options.f must be a value that JSON can hold"),
        ("options", {"w": math.inf}, "options.w .*finite.* got inf"),
        ("options", {"w": 1 << 64}, "64 bits"),
        ("options", {"w": "\ud800"}, "valid Unicode"),
        ("classes", ["cat", "dog"], "classes must be a tuple"),
        ("classes", ("cat",), "at least two names"),
        ("classes", ("cat", 3), "classes must be text"),
        ("classes", ("cat", "\x1b[31m"), "printable"),
        ("input", (3, 32), "input must be .channels, height, width."),
        ("input", (0, 32, 32), "1 to 64 channels"),
        ("input", (65, 32, 32), "1 to 64 channels"),
        ("input", (3, 32, 9000), "sides of 1 to 8192"),
        ("input", (3, 32, 32.0), "input must be"),
        ("input", (3, True, 32), "input must be"),
        ("mean", (0.5,), "one finite number for each of the 3 channels"),
        ("mean", (0.5, math.nan, 0.5), "finite"),
        ("std", (0.2, 0.0, 0.2), "std must be above 0"),
        ("std", (0.2, math.inf, 0.2), "finite"),
        ("std", ("1", "1", "1"), "finite number"),
        ("threat", {"norm": "linf"}, "table of 'norm' and 'eps'"),
        ("threat", {"norm": "l7", "eps": 1}, "unknown norm .* 'l7'"),
        ("threat", {"norm": "linf", "eps": 8}, "threat.eps must be in pixel units"),
        ("threat", {"norm": "l2", "eps": -1}, "threat.eps"),
        ("threat", {"norm": "l2", "eps": True}, "threat.eps"),
        ("threat", "linf", "threat must be a table"),
        ("role", "studnet", "did you mean 'student'"),
        ("role", None, "unknown role"),
        ("recipe", {"optim": {"lr": 1}}, "recipe.optim must be a scalar"),
        ("recipe", {"layers": [["a"]]}, "recipe.layers must be a scalar"),
        ("seed", -1, "seed must be a whole number"),
        ("seed", 1.0, "seed must be a whole number"),
        ("seed", True, "seed must be a whole number"),
        ("data", {"name": "cifar10"}, "'name' and 'fingerprint'"),
        ("data", {"name": "cifar10", "fingerprint": ""}, "'name' and 'fingerprint'"),
        ("data", {"name": "cifar10", "fingerprint": 3}, "'name' and 'fingerprint'"),
        ("metrics", {"clean": "good"}, "metrics.clean must be a number"),
        ("metrics", {"student": {"clean": True}}, "metrics.student.clean must be a number"),
        ("versions", {"torch": 2}, "versions.torch must be text"),
        ("format", 0, "format must be"),
        ("format", "1", "format must be"),
        ("format", True, "format must be"),
    ],
)
def test_a_wrong_field_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(CARD, **{field: value})


def test_nesting_is_limited() -> None:
    deep: object = 1
    for _ in range(100):
        deep = [deep]
    with pytest.raises(InputError, match="nested too deeply"):
        replace(CARD, options={"deep": deep})


def test_a_card_too_large_to_read_is_not_written() -> None:
    with pytest.raises(InputError, match=f"more than the {CARD_LIMIT} allowed"):
        replace(CARD, options={"text": "x" * CARD_LIMIT}).to_json()


def changed(**updates: object) -> str:
    return json.dumps(json.loads(CARD.to_json()) | updates)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the card is not JSON"),
        ("[]", "not a JSON object"),
        ("{" * 100_000, "not JSON"),
        ('{"a":' * 100_000, "not JSON: a number or the nesting is absurd"),
        ("[" * 100_000, "not JSON"),
        ('{"seed": 1' + "0" * 5000 + "}", "not JSON"),
        ('{"seed": 1, "seed": 2}', "the card has a key twice"),
        ('{"seed": NaN}', "the card has the number NaN"),
        (changed(sead=1), "unknown field in the card: 'sead': did you mean 'seed'"),
        (changed(**{"x" * 1000: 1}), "unknown field in the card"),
        (
            changed(format=2),
            r"made by a newer fdml \(card format 2, this one reads 1\): upgrade with pip install -U fdml",
        ),
        (changed(format=2, fresh="field"), "made by a newer fdml"),
        (changed(classes="cats"), "classes must be a list"),
        (changed(mean={"0": 1}), "mean must be a list"),
        (changed(std=[1e-1, 1, 0]), "std must be above 0"),
        (changed(metrics={"clean": 10**30}), "metrics.clean .*64 bits"),
        (CARD.to_json().replace("0.91", "1e999"), "metrics.clean .*finite"),
        (CARD.to_json().replace('"cat"', '"\\ud800"'), "classes must be text"),
        (CARD.to_json().replace("cat", "\ud800"), "not valid Unicode"),
        (" " * (CARD_LIMIT + 1), "more than the"),
    ],
)
def test_text_that_is_no_card_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Card.from_json(text)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", sorted(asdict(CARD)))
def test_a_missing_field_is_named(field: str) -> None:
    found = json.loads(CARD.to_json())
    del found[field]
    with pytest.raises(InputError, match=f"lacks the field '{field}'"):
        Card.from_json(json.dumps(found))


def test_the_norms_are_those_of_the_threat_model() -> None:
    assert pytest.importorskip("fdml.threat").NORMS == NORMS


# --- the file


def test_reads_what_safetensors_wrote(model: Path) -> None:
    found = header(model)
    assert found.metadata == {KEY: CARD.to_json()}
    assert found.tensors == {
        "weight": TensorInfo("F32", (2, 3)),
        "bias": TensorInfo("F16", (2,)),
        "step": TensorInfo("I64", ()),
        "none": TensorInfo("U8", (0, 4)),
    }
    assert read_card(model) == CARD
    assert read_card(str(model)) == CARD


def test_a_file_without_card(tmp_path: Path) -> None:
    fails(save(tmp_path / "m.safetensors", None), r"has no fdml card; is it a file of `fdml train`\?")


def test_a_file_with_a_broken_or_newer_card(tmp_path: Path) -> None:
    fails(save(tmp_path / "a.safetensors", "{}"), "the card lacks the field")
    fails(save(tmp_path / "b.safetensors", changed(format=7)), "made by a newer fdml")


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    fails(tmp_path / "none.safetensors", "no such file")
    fails(tmp_path, "is a folder")
    fails(tmp_path / ("x" * 5000), "cannot be read")
    fails(f"{tmp_path}/\0", "is not a file name")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    fails(tmp_path / "pipe", "not a regular file")


def tensor(**updates: object) -> str:
    return json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | updates})


def two(first: list[int], second: list[int]) -> str:
    return json.dumps({n: {"dtype": "U8", "shape": [4], "data_offsets": o} for n, o in [("a", first), ("b", second)]})


@pytest.mark.parametrize(
    ("head", "data", "message"),
    [
        ("", b"", "is not a safetensors file"),
        ("PK\x03\x04", b"", "is not a safetensors file"),
        (b"{\xff}", b"", "not UTF-8"),
        ("{", b"", "its header is not JSON"),
        ('{"a":' * 100_000, b"", "its header is not JSON"),
        ('{"__metadata__": 1}', b"", "not a table of strings"),
        ('{"__metadata__": {"fdml.card": 1}}', b"", "not a table of strings"),
        ('{"w": 1, "w": 1}', b"", "its header has a key twice"),
        ('{"w": []}', b"", "'w' is not dtype, shape and data_offsets"),
        (tensor(extra=1), b"", "'w' is not dtype, shape and data_offsets"),
        (tensor(dtype="F31"), bytes(8), "unknown dtype F31|unknown dtype 'F31'"),
        (tensor(dtype=["F32"]), bytes(8), "unknown dtype"),
        (tensor(shape=[-2]), bytes(8), "impossible shape"),
        (tensor(shape=[2.0]), bytes(8), "impossible shape"),
        (tensor(shape=[True, 2]), bytes(8), "impossible shape"),
        (tensor(shape=[1] * 100), bytes(8), "impossible shape"),
        (tensor(shape=[10**18] * 60), bytes(8), "gives 8 bytes to"),
        (tensor(data_offsets=[8, 0]), bytes(8), "gives -8 bytes to"),
        (tensor(data_offsets=[-8, 0]), bytes(8), "impossible data_offsets"),
        (tensor(data_offsets=[0]), bytes(8), "impossible data_offsets"),
        (tensor(dtype="F4", shape=[3], data_offsets=[0, 2]), bytes(2), "gives 2 bytes to"),
        (tensor(), bytes(7), "is cut off: its weights should have 8 bytes, the file has 7"),
        (tensor(), bytes(9), "has 1 bytes after its last tensor"),
        (two([0, 4], [3, 7]), bytes(7), "overlap at byte 3"),
        (two([0, 4], [5, 9]), bytes(9), "leave a hole at byte 4"),
        (two([4, 8], [0, 4]), bytes(8), "has no fdml card"),
        (tensor(dtype="F4", shape=[4], data_offsets=[0, 2]) + "   ", bytes(2), "has no fdml card"),
        ('{"w\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}', b"", "cannot be printed"),
    ],
)
def test_a_header_against_the_format(tmp_path: Path, head: str | bytes, data: bytes, message: str) -> None:
    fails(raw(tmp_path / "m.safetensors", head, data), message)


def test_lengths_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    fails(
        raw(path, "{}", length=2**64 - 1), f"claims a header of {2**64 - 1} bytes, more than the {HEADER_LIMIT} allowed"
    )
    fails(raw(path, "{}", length=HEADER_LIMIT), "is cut off: its header should have")
    fails(raw(path, "{}", length=0), "its header is not JSON")


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100])
def test_a_file_cut_off(model: Path, keep: int) -> None:
    model.write_bytes(model.read_bytes()[:keep])
    fails(model, "cut off|not a safetensors file")


def test_every_truncation_is_refused(model: Path, tmp_path: Path) -> None:
    whole = model.read_bytes()
    for keep in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:keep])
        fails(tmp_path / "cut", "cut off|not a safetensors file")


def test_no_flipped_bit_brings_anything_but_a_card_or_an_input_error(model: Path, tmp_path: Path) -> None:
    whole = model.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    for at in range(len(whole)):
        for bit in (0, 3, 7) if at >= 8 else range(8):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            (tmp_path / "flipped").write_bytes(damaged)
            outcome = card_or_refusal(tmp_path / "flipped")
            assert outcome == CARD if at >= start else outcome, "damaged weights are not the header's matter"


@given(st.data())
@settings(max_examples=300)
def test_random_damage(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp()
    if not (folder / "sound").exists():
        save(folder / "sound", CARD.to_json())
    damaged = bytearray((folder / "sound").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        with_ = data.draw(
            st.binary(max_size=6) | st.sampled_from([b"[" * 50, b'{"":', b"1e999", b"NaN", b"\\ud800", b'"'])
        )
        damaged[at : at + data.draw(st.integers(0, 6))] = with_
        if data.draw(st.booleans()):  # a length that fits again lets the damage reach the parser
            damaged[:8] = struct.pack("<Q", max(0, damaged.rfind(b"}") - 7))
    (folder / "damaged").write_bytes(damaged)
    assert card_or_refusal(folder / "damaged")
