"""Files of models and of training states: every bit comes back, and what does not fit is refused by name."""

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_files import files_of_at_most
from torch import nn

import fdml
from fdml import checkpoint
from fdml.card import KEY, Card
from fdml.errors import InputError
from fdml.models import RobustModel, build

CARD = Card(
    architecture="cnn",
    options={"width": 2},
    classes=("0", "1", "2"),
    input=(1, 8, 8),
    mean=(0.3,),
    std=(0.4,),
    threat={"norm": "linf", "eps": 0.2},
    role="student",
    recipe={"name": "fdml"},
    seed=3,
    data={"name": "digits", "fingerprint": "00ff"},
    metrics={"validation": {"clean": 0.1}},
    versions={"fdml": "0.1.0"},
)
X = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def network(card: Card = CARD) -> RobustModel:
    model = build(
        card.architecture, input=card.input, classes=3, mean=card.mean, std=card.std, options=card.options
    ).train()
    model(X)  # moves the statistics off their initial values
    return model


def own() -> RobustModel:
    return fdml.wrap(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), ["0"], mean=(0.3,), std=(0.4,))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    fdml.save(network(), CARD, path)
    return path


def altered(path: Path, card: Card = CARD, **changes: torch.Tensor | None) -> Path:
    """The file with some tensors replaced, added or (None) removed."""
    tensors = safetensors.torch.load_file(path)
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    safetensors.torch.save_file(tensors, path, {KEY: card.to_json()})
    return path


def fails(path: Path, message: str, model: RobustModel | None = None) -> None:
    with pytest.raises(InputError, match=message) as caught:
        fdml.load(path, model=model)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# Models


def test_a_model_comes_back_bit_by_bit(tmp_path: Path) -> None:
    model, path = network(), tmp_path / "new" / "model.safetensors"
    fdml.save(model, CARD, path)
    loaded = fdml.load(path)
    assert fdml.read_card(path) == CARD
    assert not any(module.training for module in loaded.modules())
    saved, found = model.state_dict(), loaded.state_dict()
    assert list(saved) == list(found)
    assert all(torch.equal(saved[name], found[name]) for name in saved)
    assert all(saved[name].dtype == found[name].dtype for name in saved)
    torch.testing.assert_close(loaded(X), model.eval()(X))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_saving_leaves_the_model_alone(tmp_path: Path) -> None:
    model = network().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fdml.save(model, CARD, tmp_path / "a.safetensors")
    assert model.training
    assert model.backbone.stage1.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    # The memory layout is not in the file.
    fdml.save(model.to(memory_format=torch.contiguous_format), CARD, tmp_path / "b.safetensors")  # pyright: ignore[reportCallIssue]
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_loading_leaves_the_random_numbers_alone(file: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    fdml.load(file)
    assert torch.equal(before, torch.get_rng_state())


def test_a_wrapped_model_needs_its_code(tmp_path: Path) -> None:
    model, path = own(), tmp_path / "own.safetensors"
    fdml.save(model, replace(CARD, architecture=checkpoint.CUSTOM, options={}), path)
    fails(path, r"load\(…, model=\)")
    loaded = fdml.load(path, model=own().train())
    assert not loaded.training
    torch.testing.assert_close(loaded(X), model(X))
    fails(path, "the tensor 'backbone.stem.conv.weight' is missing", network())


def test_weights_that_do_not_fit_the_card(file: Path) -> None:
    head = "backbone.head.weight"
    fails(altered(file, backbone__head__weight=torch.zeros(3, 17)), rf"{head}' has shape \[3, 17\].*\[3, 16\]")
    fails(altered(file, backbone__head__weight=torch.zeros(48)), rf"{head}' has shape \[48\]")
    fails(altered(file, backbone__head__weight=None), f"the tensor '{head}' is missing")
    good = torch.zeros(3, 16)
    fails(altered(file, backbone__head__weight=good, extra=torch.zeros(1)), "the tensor 'extra' is not part of")
    fails(altered(file, replace(CARD, classes=("a", "b")), extra=None), "'backbone.head.weight' has shape")
    fails(altered(file, replace(CARD, options={"width": 3})), "has shape")
    fails(altered(file, replace(CARD, architecture="resnet18")), "missing")


def test_a_model_that_did_not_fit_is_as_it_was(file: Path) -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fails(altered(file, backbone__head__bias=torch.zeros(4)), "'backbone.head.bias' has shape", model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("cnn", {"width": 10**5}),
        ("cnn", {"width": 10**9}),
        ("cnn", {"width": 10**18}),
        ("cnn", {"width": -1}),
        ("cnn", {"width": 1.5}),
        ("cnn", {"width": "2"}),
        ("cnn", {"width": [2]}),
        ("cnn", {"width": None}),
        ("cnn", {"widht": 2}),
        ("cnn", {"self": 2}),
        ("cnn", {"channels": 2}),
        ("resnet18", {"width": 10**5}),
        ("resnet18", {"preact": "yes"}),
        ("wrn-994-99", {}),
        ("wrn-5-1", {}),
        ("vgg", {}),
    ],
    ids=str,
)
def test_a_card_that_asks_for_the_absurd(
    architecture: str, options: dict, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small file cannot hold such weights, and no memory is asked for before that is seen."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("memory was asked for")

    altered(file, replace(CARD, architecture=architecture, options=options))
    monkeypatch.setattr(nn.Module, "to_empty", never)
    monkeypatch.setattr(safetensors.torch, "load_file", never)
    fails(file, ".")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9, 0.9999])
def test_a_file_that_was_cut(share: float, file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    fails(file, "cut off|not a safetensors file")


def test_a_disk_that_is_full_leaves_the_previous_model(file: Path) -> None:
    before = file.read_bytes()
    with files_of_at_most(1000), pytest.raises(InputError, match="the previous file is intact") as caught:
        fdml.save(network(), replace(CARD, seed=4), file)
    assert str(file) in str(caught.value)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


# States


def test_a_state_comes_back_bit_by_bit(tmp_path: Path) -> None:
    path = tmp_path / "state" / "student.safetensors"
    tensors = {
        "momentum.0": torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last),
        "half": torch.tensor([1e-40, 1 / 3], dtype=torch.bfloat16),
        "steps": torch.tensor(7),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "none": torch.zeros(0, 2),
    }
    values = {"epoch": 3, "step": 0, "best": 0.1 + 0.2, "tiny": 5e-324, "counts": {"loss": 2}}
    checkpoint.save_state(path, tensors, values)
    state = checkpoint.load_state(path)
    assert state.values == values
    assert state.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = state.tensors[name]
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        assert found.contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))


def test_a_file_that_is_no_state(tmp_path: Path, file: Path) -> None:
    path = tmp_path / "state.safetensors"
    for metadata in ({"fdml.state": "0", "values": "{}"}, {"fdml.state": "2", "values": "{}"}, None):
        safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata)
        with pytest.raises(InputError, match=rf"{path} is not a training state of this version.*--overwrite"):
            checkpoint.load_state(path)
    with pytest.raises(InputError, match="is not a training state"):
        checkpoint.load_state(file)
    for values in ("{", "3", "[" * 100_000):
        safetensors.torch.save_file({}, path, {"fdml.state": checkpoint.STATE_FORMAT, "values": values})
        with pytest.raises(InputError, match=r"state cannot be read.*--overwrite"):
            checkpoint.load_state(path)
    safetensors.torch.save_file({}, path, {"fdml.state": checkpoint.STATE_FORMAT})
    with pytest.raises(InputError, match="state cannot be read"):
        checkpoint.load_state(path)


def test_a_state_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    checkpoint.save_state(path, {"a": torch.zeros(100)}, {})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="cut off"):
        checkpoint.load_state(path)


def test_a_state_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    checkpoint.save_state(path, {"a": torch.zeros(100)}, {})
    fails(path, "has no fdml card")
