"""What README.md and the pages of docs/ say is true: every block of code and every command runs, and
tables are those of the code, of the tests or of the measurements.
"""

import argparse
import dataclasses
import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tomllib

import pytest

from benchmarks.table import table
from lycoris_cupy import ALGORITHMS
from lycoris_cupy.cli import COMMANDS, main, make_parser
from lycoris_cupy.cli.train_config import EXAMPLE
from lycoris_cupy.demo.extra import PACKAGES, find_spec
from lycoris_cupy.io.dialects import DIALECTS
from tests import support_table
from tests.pages import PAGES, ROOT, blocks, commands, make_files

README = PAGES["README.md"]
INSTALL = [
    'python -m pip install -e ".[cuda12,demo]" && lycoris-cupy demo',
    'python -m pip install -e ".[cuda12,test]" && python -m pytest',
]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


class _Parsed(Exception):
    """A module has parsed its arguments; what it would do next is not run."""


def run_line(line: str, monkeypatch) -> None:
    """Run a line of a shell block, or check it where running takes minutes. AssertionError if
    nothing here runs it.
    """
    for part in line.split(" && "):
        words = shlex.split(part, comments=True)
        if words == ["lycoris-cupy", "demo"]:
            make_parser().parse_args(words[1:])  # test_demo.py runs it
        elif words[:2] == ["lycoris-cupy", "train"] and "--example" not in words:
            # test_train_cli.py trains, in less time; the example's network needs the extra `demo`.
            if "--dry-run" in words and all(find_spec(name) for name in PACKAGES):
                assert main(words[1:]) == 0, part
            else:
                make_parser().parse_args(words[1:])
        elif words[0] == "lycoris-cupy":
            assert main(words[1:]) == 0, part
        elif words[:5] == ["python", "-m", "pip", "install", "-e"] and len(words) == 6:
            extras = re.fullmatch(r"\.\[([\w,]+)\]", words[5])
            assert extras and set(extras[1].split(",")) <= set(EXTRAS), part
        elif words[:3] == ["python", "-m", "pytest"]:
            collect(words[3:])
        elif words[:2] == ["python", "-m"]:
            parse(words[2], words[3:], monkeypatch)
        else:
            raise AssertionError(f"nothing runs this line: {part}")


def collect(arguments: list[str]) -> None:
    """pytest finds tests with these arguments; without any it is the run that this is part of."""
    if arguments:
        # Without what a worker of this very run is told of its own.
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *arguments, "--collect-only", "-q"],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def parse(module: str, arguments: list[str], monkeypatch) -> None:
    """A module of the project that takes these arguments."""
    assert module.split(".")[0] in ("benchmarks", "tests")
    found = importlib.import_module(module)
    if not hasattr(found, "main"):
        assert not arguments, f"{module} takes no arguments"
        return
    whole = argparse.ArgumentParser.parse_args

    def parsed(self, *given):
        whole(self, *given)
        raise _Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parsed)
        patch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(_Parsed):
            found.main()


def run_page(name: str, page: str, monkeypatch) -> None:
    """Every block of a page in its order, the Python ones in one scope."""
    scope: dict = {"__name__": name}
    for block in blocks(page):
        if block.language == "python":
            code = "\n" * (block.line - 1) + block.text  # errors name the line of the page
            exec(compile(code, name, "exec"), scope)
        elif block.language == "sh":
            for line in commands(block):
                run_line(line, monkeypatch)
        elif block.language == "toml":
            assert block.text.strip() in EXAMPLE.read_text(), f"{name}: not of the example"
        else:
            assert block.language == "text", f"{name}, line {block.line}: nothing runs this block"
            assert "lycoris-cupy" not in block.text, f"{name}, line {block.line}: a command"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    make_files(folder)
    return folder


@pytest.fixture
def here(files, tmp_path, monkeypatch):
    """A folder of its own for each page, with the files."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", PAGES)
def test_all_blocks_run(name, here, monkeypatch, capsys):
    run_page(name, PAGES[name], monkeypatch)


@pytest.mark.parametrize(
    "page, error",
    [
        ("```python\n1 / 0\n```\n", ZeroDivisionError),
        ("```python\na = 1\n```\n\n```python\nassert a == 2\n```\n", AssertionError),
        ("```sh\nlycoris-cupy inspect nothing.safetensors\n```\n", AssertionError),
        ("  ```sh\n  lycoris-cupy inspect style.safetensors --bases x\n  ```\n", SystemExit),
        ("~~~sh\nrm x\n~~~\n", AssertionError),
        ("```bash\nlycoris-cupy demo\n```\n", AssertionError),
        ("```text\nlycoris-cupy demo\n```\n", AssertionError),
        ("```\nx\n```\n", AssertionError),
        ("```python\n1\n", AssertionError),
        ('```sh\npython -m pip install -e ".[nothing]"\n```\n', AssertionError),
        ("```sh\npython -m benchmarks.nothing\n```\n", ModuleNotFoundError),
        ("```sh\npython -m benchmarks.floors --more\n```\n", AssertionError),
        ("```sh\npython -m benchmarks.table --more\n```\n", SystemExit),
    ],
)
def test_a_block_that_does_not_hold_is_found(page, error, here, monkeypatch, capsys):
    with pytest.raises(error):
        run_page("page", page, monkeypatch)


def test_the_two_commands_are_what_ci_runs():
    lines = [line for b in blocks(README) if b.language == "sh" for line in commands(b)]
    assert [line for line in lines if "pip install" in line] == INSTALL


def test_the_support_table_is_the_generated_one():
    assert support_table.placed(README) == README, "run python -m tests.support_table --write"
    assert not support_table.untested()


def test_the_support_table_follows_the_tests(monkeypatch):
    """A case that is taken out of a table of the tests is taken out of the README's."""
    assert "| `locon` | LFTMS | LFTMS | LFTMS | LFTMS | LFTMS | LFTMS | - |" in README
    fewer = [pair for pair in support_table.PAIRS if pair[0].name != "conv1x1"]
    monkeypatch.setattr(support_table, "PAIRS", fewer)
    assert "| `locon` | LFTMS | - | LFTMS" in support_table.table()
    with pytest.raises(SystemExit, match="expected one"):
        support_table.placed("no markers")


def test_the_speed_table_is_a_measured_one():
    results = [
        json.loads(p.read_text()) for p in (ROOT / "benchmarks/results").glob("layers-*.json")
    ]
    assert any(table(data) in README for data in results)


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the table whose head begins with these cells, marks of code left out."""
    _, found, rest = page.partition(f"{heading}")
    assert found, f"no table begins with {heading!r}"
    lines = rest.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line[1:-1].split("|")] for line in lines]


def test_tables_list_what_there_is():
    names = [command.__name__.rpartition(".")[2] for command in COMMANDS]
    assert [row[0].split()[1] for row in rows(README, "| command | ")] == names
    listed = rows(PAGES["docs/files.md"], "| dialect | ")
    assert [row[0] for row in listed] == list(DIALECTS)
    for row in listed:
        known = DIALECTS[row[0]].algorithms
        titles = {"locon": "LoRA", "loha": "LoHa", "lokr": "LoKr"}
        assert row[-1] == ("all" if known is None else ", ".join(titles[k] for k in known))
    listed = rows(PAGES["docs/algorithms.md"], "| `add` | ")
    assert [row[0] for row in listed] == list(ALGORITHMS)
    for name, options, _ in listed:
        kind, told = ALGORITHMS[name], set(re.findall(r"`(\w+)`", f"`{options}`"))
        assert ("dora" in told) == kind.decomposable
        fields = {field.name for field in dataclasses.fields(kind)}
        assert told - {"dora"} <= fields | set(inspect.signature(kind.create).parameters), name


def test_the_merge_table_is_the_measured_one():
    """Medians of all runs; `of the copy` is the median over the copies of the same turns."""
    data = json.loads((ROOT / "benchmarks/results/merge-large-bf16.json").read_text())
    took: dict = {}
    for row in data["rows"]:
        took.setdefault((row["command"], row["cache"]), []).append(row)
    found = rows(PAGES["docs/checkpoints.md"], "| | cold, s | ")
    for name, shown in zip(("copy", "merge", "lycoris-lora"), found, strict=True):
        cells = []
        for cache in ("cold", "warm"):
            seconds = [row["s"] for row in took[name, cache]]
            ratios = [s / c["s"] for s, c in zip(seconds, took["copy", cache], strict=False)]
            cells += [f"{statistics.median(seconds):.1f}", f"{statistics.median(ratios):.2f}"]
        cells.append(f"{statistics.median(row['cpu_s'] for row in took[name, 'warm']):.1f}")
        most = max(row["rss"] for cache in ("cold", "warm") for row in took[name, cache])
        cells.append("" if name == "copy" else f"{most / 2**20:.0f}")
        assert shown[1:] == cells, name


@pytest.mark.parametrize("name", PAGES)
def test_paths_and_links_exist(name):
    page, folder = PAGES[name], (ROOT / name).parent
    for path in re.findall(r"`((?:lycoris_cupy|tests|cuda_src|benchmarks|docs)/[\w/.-]*)`", page):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\(([^)]+)\)", page):
        path, _, anchor = target.partition("#")
        assert not path or (folder / path).exists(), target
        there = str((folder / path).resolve().relative_to(ROOT)) if path else name
        assert not anchor or anchor in anchors(PAGES[there]), target


def anchors(page: str) -> set[str]:
    """Of its headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
