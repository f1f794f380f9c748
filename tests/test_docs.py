"""The documents tell the truth: commands exist and parse, Python blocks run, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

import kindling as kd
from kindling.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def shell_lines(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def kindling_lines() -> list[list[str]]:
    """Every use of the command line in the documents, from the word after `kindling` on."""
    found = []
    for page in PAGES:
        for words in (words for block in blocks(page, "sh") for words in shell_lines(block)):
            if words and words[0] == "kindling":
                found.append(words[1:])
            for place, word in enumerate(words):
                if word.endswith("kindling/__main__.py"):
                    found.append(words[place + 1 :])
    return found


def parse(words: list[str]) -> None:
    COMMANDS[words[0]].make_context(words[0], list(words[1:]))


def test_every_command_has_an_example() -> None:
    text = (ROOT / "docs/COMMANDS.md").read_text(encoding="utf-8")
    used = {
        words[0]
        for block in blocks(ROOT / "docs/COMMANDS.md", "sh")
        for words in map(lambda w: w[1:], shell_lines(block))
        if words
    }
    for name in COMMANDS:
        assert f"\n## {name}\n" in text
        assert name in used


@pytest.mark.parametrize("words", kindling_lines(), ids=" ".join)
def test_documented_command_lines_parse(words: list[str]) -> None:
    parse(words)


def test_a_wrong_command_line_does_not_parse() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(["summary", "vgg16", "--nonsense"])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_that_parses(name: str) -> None:
    examples = re.findall(r"`(kindling [^`]*)`", COMMANDS[name].epilog)
    assert examples
    for example in examples:
        parse(shlex.split(example)[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_and_targets_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z0-9-]+)[` ]", text) + re.findall(r"^make ([a-z0-9-]+)", text, flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    for name in re.findall(r"`((?:src|tests|docs|benchmarks|examples)/[\w./]+)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.spark
@pytest.mark.sessions
def test_the_job_in_the_readme_runs(
    spark: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is printed, but for paths, the net (a small one: VGG16's weights are 500 MB) and the number of classes."""
    block = next(block for block in blocks(ROOT / "README.md", "python") if "Caltech" in block or "caltech" in block)
    assert len(block.splitlines()) < 20
    for old, new in (
        ('"hdfs:///caltech256"', repr(str(photos))),
        ('"hdfs:///models/caltech256"', repr(str(tmp_path / "model"))),
        ('kd.load("vgg16", weights="vgg16.safetensors")', 'kd.load("lenet")'),
        ('"fc2"', '"fc1"'),
        ("nn.Linear(4096, 257)", "nn.Linear(500, 3)"),
        ("epochs=20", "epochs=2"),
    ):
        assert old in block, f"{old} is no longer in the README"
        block = block.replace(old, new)
    monkeypatch.setattr(kd, "spark", lambda: spark, raising=False)
    exec(compile(block, "README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "fc1" in shown
    assert "prediction" in shown


def test_other_python_in_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    others = [block for block in blocks(ROOT / "README.md", "python") if "caltech" not in block]
    assert others
    for block in others:
        exec(compile(block, "README.md", "exec"), {})
    assert "131" in capsys.readouterr().out  # 4 x 16 + 16 + 16 x 3 + 3 parameters


def test_python_in_the_command_reference_runs() -> None:
    (block,) = blocks(ROOT / "docs/COMMANDS.md", "python")
    names: dict[str, Any] = {}
    exec(compile(block, "COMMANDS.md", "exec"), names)
    assert names["small"](("0", "1")).labels == ("0", "1")
