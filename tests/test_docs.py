"""The examples in the documents run, and the commands in them have the flags that they use."""

import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: pathlib.Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.S)


def commands() -> list[str]:
    joined = (b.replace("\\\n", " ") for d in DOCUMENTS for b in blocks(d, "bash"))
    lines = (line.strip() for block in joined for line in block.splitlines())
    return sorted({line.split("|")[0] for line in lines if line.startswith("python -m sinkjax.")})


def test_the_example_of_an_own_model_runs(capsys):
    (example,) = blocks(ROOT / "docs" / "own_model.md", "python")
    exec(compile(example, "own_model.md", "exec"), {})
    assert capsys.readouterr().out == "2\n"


def test_the_example_of_the_readme_runs(capsys):
    (example,) = blocks(ROOT / "README.md", "python")
    exec(compile(example, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) > 80


@pytest.mark.parametrize("command", commands())
def test_the_commands_of_the_documents_have_valid_flags(command):
    arguments = shlex.split(command, comments=True)[1:]
    run = subprocess.run(
        [sys.executable, *arguments, "--only_check_args"], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr


def test_no_link_in_the_documents_is_dead():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
