"""Who may import whom, read from the sources, and what an import brings along, seen in a fresh interpreter."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A unit is a module of fdml or a whole sub-package of it. It may import the units of the layers before its own, and
# those of its own layer, but never in a circle.
LAYERS = [
    {"errors"},
    {"card", "files", "recipe", "recipes", "threat", "losses", "inference", "world", "randomness"}
    | {"beta", "sequence", "grid", "smoothed", "pictures", "pixels", "bundle", "session", "boxed", "suspicion"},
    {"models", "attacks", "data"},
    {"checkpoint", "run", "runtime"},
    {"guidance", "interval", "bases", "objective", "adversary", "train_batch", "learner", "train", "progress"}
    | {"evaluate", "certify", "report", "showing", "drawing", "curves", "dots", "gallery", "tables"}
    | {"surrogates", "judge", "craft", "reproduce", "outcomes"},
    {"export", "serve", "demo"},
    {"cli"},
    {"__main__"},
]
LAYER = {unit: level for level, layer in enumerate(LAYERS) for unit in layer}

# What the layers alone would allow.
NEVER = {
    "attacks": {"models", "data"},
    "models": {"attacks", "data"},
    "data": {"attacks", "models"},
}
# These run where torch is not installed, so nothing that they import may need it, not even inside a function.
NO_TORCH = {"errors", "card", "files", "recipe", "recipes", "run", "bundle", "pictures"}
NO_TORCH |= {"boxed", "suspicion", "runtime", "serve"}
# These may use torch, but only inside the function that needs it.
LAZY = {"cli", "__main__"}

FOLDERS = {"fdml": ROOT / "fdml", "export": ROOT / "export", "serve": ROOT / "serve", "demo": ROOT / "demo"}


def unit_files() -> dict[str, list[Path]]:
    units: dict[str, list[Path]] = {}
    for folder, root in FOLDERS.items():
        for path in sorted(root.rglob("*.py")):
            unit = folder if folder != "fdml" else path.relative_to(root).with_suffix("").parts[0]
            units.setdefault(unit, []).append(path)
    return units


UNITS = unit_files()


def imports(path: Path, *, nested: bool = True) -> Iterator[str]:
    """The absolute names of the modules that a file imports; ``nested``: inside functions as well.

    What stands under ``if TYPE_CHECKING:`` is never run, and not given.
    """

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not nested:
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for other in child.orelse:
                    yield from [other, *walk(other)]
                continue
            yield child
            yield from walk(child)

    for node in walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            assert node.module is not None
            if node.module == "fdml":
                yield from (f"fdml.{alias.name}" for alias in node.names)
            else:
                yield node.module


def units_of(names: Iterator[str]) -> set[str]:
    """The units among ``names``. Ours import from the modules, never a public name from fdml itself."""
    return {name.split(".")[1] for name in names if name.startswith("fdml.")}


def graph(*, nested: bool) -> dict[str, set[str]]:
    return {
        unit: ({other for path in paths for other in units_of(imports(path, nested=nested))} - {unit}) & set(LAYER)
        for unit, paths in UNITS.items()
        if unit in LAYER
    }


def test_every_module_has_its_layer() -> None:
    unknown = set(UNITS) - set(LAYER) - {"__init__"}
    assert not unknown, (
        f"enter {sorted(unknown)} in LAYERS of {Path(__file__).name}: which layer, and who may import it?"
    )


def test_every_import_from_fdml_is_of_a_module() -> None:
    for path in [path for paths in UNITS.values() for path in paths]:
        unknown = units_of(imports(path)) - set(LAYER)
        assert not unknown, f"{path.relative_to(ROOT)} imports {sorted(unknown)} from fdml, no module of LAYERS"


def test_imports_point_down() -> None:
    for unit, others in graph(nested=True).items():
        for other in others:
            assert LAYER[other] <= LAYER[unit], f"{unit} imports {other}, which is above it"
            assert other not in NEVER.get(unit, set()), f"{unit} must not import {other}"
            assert other != "cli" or unit == "__main__", f"{unit} imports the command line"


def test_no_circles() -> None:
    others = graph(nested=True)
    done: set[str] = set()

    def visit(unit: str, trail: tuple[str, ...]) -> None:
        assert unit not in trail, f"a circle: {' → '.join([*trail, unit])}"
        if unit not in done:
            for other in sorted(others.get(unit, ())):
                visit(other, (*trail, unit))
            done.add(unit)

    for unit in others:
        visit(unit, ())


@pytest.mark.parametrize("unit", sorted((NO_TORCH | LAZY) & set(UNITS)))
def test_runs_without_torch(unit: str) -> None:
    nested = unit in NO_TORCH
    links = graph(nested=nested)
    reached, ahead = set(), [unit]
    while ahead:
        current = ahead.pop()
        if current not in reached:
            reached.add(current)
            ahead.extend(links.get(current, ()))
    for current in reached:
        for path in UNITS.get(current, []):
            heavy = {name for name in imports(path, nested=nested) if name.split(".")[0] in {"torch", "safetensors"}}
            assert not heavy, f"{unit} reaches {path.relative_to(ROOT)}, which imports {sorted(heavy)}"


def test_nothing_is_unpickled() -> None:
    filtered = ROOT / "fdml" / "data" / "cifar.py"  # CIFAR is published as pickles; it lets only plain data through
    for path in [path for paths in UNITS.values() for path in paths if path != filtered]:
        found = {name.split(".")[0] for name in imports(path)} & {"pickle", "dill", "cloudpickle", "joblib", "shelve"}
        assert not found, f"{path.relative_to(ROOT)} imports {found}"
        source = ast.unparse(ast.parse(path.read_text(encoding="utf-8")))
        for call in ("torch.load(", "allow_pickle=True", "weights_only=False"):
            assert call not in source, f"{path.relative_to(ROOT)} calls {call}"


HEAVY = ["torch", "numpy", "scipy", "sklearn", "matplotlib", "pydantic", "onnxruntime", "PIL"]
REPORT = f"print('heavy:', sorted(set(sys.modules) & set({HEAVY})))"


def fresh(code: str) -> str:
    """What ``code`` prints in an interpreter that has imported nothing yet."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_fdml_is_light() -> None:
    assert fresh(f"import sys, fdml; {REPORT}") == "heavy: []\n"


def test_reading_a_card_is_light() -> None:
    assert fresh(f"import sys, fdml; fdml.read_card, fdml.Card, fdml.InputError; {REPORT}") == "heavy: []\n"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]], ids=" ".join)
def test_help_is_light(arguments: list[str]) -> None:
    code = f"""
import sys
import fdml
from fdml.cli import main
sys.argv = ["fdml", *{arguments}]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
{REPORT}
"""
    out = fresh(code)
    assert "Usage" in out
    # For a command's own help typer itself brings pydantic.
    assert out.splitlines()[-1] in ["heavy: []", "heavy: ['pydantic']" if "train" in arguments else ""]


def test_a_missing_torch_is_said_with_what_to_install() -> None:
    code = """
import sys
sys.modules["torch"] = None  # what an import system without torch answers
import fdml
fdml.Card, fdml.read_card
try:
    fdml.Threat
except ImportError as error:
    print(error)
"""
    assert fresh(code) == "fdml.Threat needs torch, of the training extra: pip install 'fdml[train]'\n"


def test_public_names_are_found() -> None:
    import fdml

    assert set(fdml.__all__) <= set(dir(fdml))
    assert fdml.Card.__module__ == "fdml.card"
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = fdml.lod  # pyright: ignore[reportAttributeAccessIssue]


def test_the_typed_names_are_the_lazy_ones() -> None:
    """The block that editors read and the table that runs say the same."""
    import fdml

    tree = ast.parse((ROOT / "fdml" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert typed == fdml._HOME
