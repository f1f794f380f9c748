"""The built wheel, in a fresh environment: what is in it, that it imports, and that its command runs."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import kindling

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    """Run outside the checkout, with nothing of this process's Python settings."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYSPARK", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "--wheel-dir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scripts folder of a new environment with the wheel; its dependencies are seen, the checkout is not."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    site = Path(
        run(scripts / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    # A path in a .pth file is searched for modules, but the .pth files in it (an editable kindling's) are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--force-reinstall", wheel, cwd=folder)
    return scripts


def test_the_wheel_holds_the_package_and_its_licence(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    package = ROOT / "src/kindling"
    files = (path.relative_to(package) for path in package.rglob("*") if path.is_file())
    sources = {f"kindling/{path.as_posix()}" for path in files if "__pycache__" not in path.parts}
    assert sources <= set(names)
    assert "kindling/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith("tests/") or "/work/" in name]
    assert wheel.name.startswith(f"kindling_spark-{kindling.__version__}-")


def test_it_imports_from_where_it_was_installed(fresh: Path, tmp_path: Path) -> None:
    code = "import kindling; print(kindling.__file__); [getattr(kindling, name) for name in kindling.__all__]"
    home = Path(run(fresh / "python", "-c", code, cwd=tmp_path).strip())
    assert home.is_relative_to(fresh.parent)


def test_the_command_runs(fresh: Path, tmp_path: Path) -> None:
    assert run(fresh / "kindling", "--version", cwd=tmp_path) == f"kindling {kindling.__version__}\n"
    assert run(fresh / "python", "-m", "kindling", "--version", cwd=tmp_path) == f"kindling {kindling.__version__}\n"
    assert "predictions" in run(fresh / "kindling", "summary", "lenet", cwd=tmp_path)


def test_constraints_pin_every_requirement() -> None:
    import re
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]

    def wanted(requirements: list[str]) -> set[str]:
        names: set[str] = set()
        for requirement in requirements:
            name = re.split(r"[\[<>=; ]", requirement)[0].lower()
            if name != "kindling-spark":
                names.add(name)
                continue
            for extra in re.findall(r"[\w-]+", requirement.partition("[")[2]):
                names |= wanted(extras[extra])
        return names

    # As `make setup` and `make setup-spark35` install it.
    for file, extra in (("constraints.txt", "dev"), ("constraints-spark35.txt", "test")):
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        pinned = {line.partition("==")[0].lower() for line in lines if line and not line.startswith("#")}
        assert wanted([*project["dependencies"], *extras[extra]]) - pinned == set(), file
