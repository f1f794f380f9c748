"""Who may import whom, what the public names are, and how light `import kindling` is."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import kindling

ROOT = Path(kindling.__file__).parent
MODULES = sorted(
    ".".join(("kindling", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
)

NO_SPARK = (
    "errors",
    "randomness",
    "signature",
    "threads",
    "evaluate",
    "many_labels",
    "graph",
    "picture",
    "surgery",
    "bundle",
    "storage",
    "nets",
    "prepare",
    "formats",
    "train.strategies",
    "train.order",
    "train.callbacks",
    "train.line",
    "train.table",
    "train.meeting",
    "train.remote",
    "predict.engine",
    "predict.stages",
    "model",
)
"""Rooms that work where pyspark is not installed."""
ON_WORKERS = ("predict.batch", "train.worker", "read", "ship")
"""Rooms with functions that Spark unpickles on workers: torch may come only after the thread settings."""
SKINS = ("cli", "options", "console", "transfer", "demo", "__main__")
"""Written in public names: `kindling`, `kindling.errors`, and each other."""
SPARK = ("pyspark", "py4j")


def _in(module: str, rooms: tuple[str, ...]) -> bool:
    name = module.removeprefix("kindling.")
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def imports_of(module: str, *, inside_functions: bool) -> set[str]:
    """Full names of what a module imports; those for type checkers only are left out."""
    path = ROOT.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if not inside_functions and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def roots(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def fresh(code: str) -> str:
    """What `code` prints in a new Python."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_list_of_rooms_is_the_truth() -> None:
    for room in (*NO_SPARK, *ON_WORKERS, *SKINS):
        assert any(_in(module, (room,)) for module in MODULES), f"{room} is gone"


@pytest.mark.parametrize("module", [m for m in MODULES if _in(m, NO_SPARK)])
def test_rooms_without_spark_do_not_import_it(module: str) -> None:
    inside = not _in(module, ("storage", "model", "bundle"))  # these ask for a session's file systems in a function
    assert not roots(imports_of(module, inside_functions=inside)) & set(SPARK)


@pytest.mark.parametrize("module", [m for m in MODULES if _in(m, NO_SPARK)])
def test_rooms_without_spark_do_not_open_rooms_with_it(module: str) -> None:
    allowed = {"kindling", *(f"kindling.{room}" for room in (*NO_SPARK, "predict", "train"))}
    for name in imports_of(module, inside_functions=False):
        if name.startswith("kindling.") and name != "kindling.__version__":
            assert any(name == room or name.startswith(f"{room}.") for room in allowed - {"kindling"}), name
            assert not name.startswith(("kindling.predict.batch", "kindling.train.fit", "kindling.train.worker"))


@pytest.mark.parametrize("module", [m for m in MODULES if _in(m, ON_WORKERS)])
def test_what_workers_unpickle_does_not_load_torch(module: str) -> None:
    assert "torch" not in roots(imports_of(module, inside_functions=False))


def test_what_workers_unpickle_does_not_load_torch_by_detour() -> None:
    rooms = [m for m in MODULES if _in(m, ON_WORKERS)]
    assert fresh(f"import sys, {', '.join(rooms)}\nprint('torch' in sys.modules)") == "False"


@pytest.mark.parametrize("module", [m for m in MODULES if _in(m, SKINS)])
def test_skins_use_public_names_only(module: str) -> None:
    for name in imports_of(module, inside_functions=True):
        if name.startswith("kindling."):
            parts = name.split(".")[1:]
            assert _in(f"kindling.{parts[0]}", (*SKINS, "errors")), f"{module} reaches into {name}"


def test_nobody_imports_the_skins() -> None:
    for module in MODULES:
        if not _in(module, SKINS):
            for name in imports_of(module, inside_functions=True):
                assert not any(name.startswith(f"kindling.{skin}") for skin in SKINS), f"{module} imports {name}"


def test_strategies_know_no_spark_and_no_rooms_but_errors() -> None:
    for module in MODULES:
        if _in(module, ("train.strategies",)):
            for name in imports_of(module, inside_functions=True):
                if name.startswith("kindling."):
                    assert name.startswith(("kindling.errors", "kindling.train.strategies")), f"{module} imports {name}"


def test_import_kindling_is_light() -> None:
    heavy = "'torch', 'pyspark', 'pyarrow', 'numpy', 'pandas', 'PIL', 'typer', 'rich'"
    assert fresh(f"import sys, kindling\nprint([m for m in ({heavy},) if m in sys.modules])") == "[]"


def test_the_command_line_opens_without_torch_and_spark() -> None:
    code = "import sys, kindling.cli\nprint([m for m in ('torch', 'pyspark', 'pyarrow') if m in sys.modules])"
    assert fresh(code) == "[]"


def test_prediction_without_pyspark() -> None:
    blocked = "import sys\nsys.modules['pyspark'] = None\n"
    code = """
import numpy as np, kindling as kd
net = kd.load("lenet")
(answer,) = net.predict([np.zeros((28, 28), np.uint8)])
print(sorted(answer))
"""
    assert "prediction" in fresh(blocked + code)


def test_public_names_are_the_truth() -> None:
    assert list(kindling.__all__) == sorted(kindling.__all__)
    assert set(kindling.__all__) == {"__version__", *kindling._HOME}
    for name, home in kindling._HOME.items():
        value = getattr(kindling, name)
        module = importlib.import_module(home)
        assert value is (module if home == f"kindling.{name}" else getattr(module, name))
    assert dir(kindling) == sorted(kindling.__all__)
    with pytest.raises(AttributeError, match="'kindling' has no attribute 'nonsense'"):
        _ = kindling.nonsense  # type: ignore[attr-defined]


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: f"{node.module}" for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == {n: ("kindling" if home == f"kindling.{n}" else home) for n, home in kindling._HOME.items()}


def test_every_module_says_what_it_holds() -> None:
    for module in MODULES:
        path = ROOT.joinpath(*module.split(".")[1:])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert doc, f"{module} has no docstring"


def test_version_is_the_package_s() -> None:
    import tomllib

    project = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert kindling.__version__ == project["version"]
