"""The command line: what it prints, its exit codes, and one line for every error."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lycoris_cupy
from lycoris_cupy import bf16, cli
from lycoris_cupy.cli import convert, demo, merge
from lycoris_cupy.cli.progress import Bar
from lycoris_cupy.io.dialects import DIALECTS
from lycoris_cupy.io.safetensors import open_file, write
from tests.cases import PEER


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A base and two adapters in the working folder."""
    monkeypatch.chdir(tmp_path)
    write(
        "base.safetensors",
        {"a.weight": np.ones((2, 3), np.float32), "b.weight": np.ones((2, 3), np.float32)},
    )
    write("style.safetensors", {"lycoris_a.diff": np.ones((2, 3), np.float32)})
    write("face.safetensors", {"lycoris_b.diff": np.ones((2, 3), np.float32)})
    write(
        "other.safetensors",
        {"lycoris_a.diff": np.ones((2, 3), np.float32), "lycoris_x.diff": np.ones((2, 3))},
    )
    write("dora.safetensors", {"lycoris_a.dora_scale": np.ones((2, 1), np.float32)})
    return tmp_path


COMMAND = [sys.executable, "-m", "lycoris_cupy"]
# The tests change the working folder; the package may lie in it instead of being installed.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(lycoris_cupy.__file__).parent.parent)}


def run(*arguments):
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=60, env=ENVIRONMENT
    )


def values(path):
    with open_file(path) as file:
        return {name: np.unique(file[name]).tolist() for name in file}


def test_inspect_prints_a_table(capsys):
    path = PEER / "adapter" / "locon_tucker-conv3x3.safetensors"
    assert cli.main(["inspect", str(path)]) == 0
    out, err = capsys.readouterr()
    assert err == "" and f"{path}: 1 of 1 modules read (1 locon); 177 parameters" in out
    head, row = out.splitlines()[2:]
    assert head.split() == [
        "module",
        "shape",
        "algorithm",
        "rank",
        "scale",
        "from",
        "dtype",
        "parameters",
        "|dW|",
        "eff.",
        "rank",
    ]
    for part in (
        "lycoris_block_layer",
        "Conv2d(12 -> 20, 3x3)",
        "locon",
        "0.666667",
        "alpha / rank = 2 / 3",
        "BF16",
    ):
        assert part in row
    assert row.index("locon") == head.index("algorithm") and row.index("BF16") == head.index(
        "dtype"
    )


def test_inspect_prints_json(capsys):
    assert (
        cli.main(["inspect", str(PEER / "adapter" / "lokr_w1_w2-linear.safetensors"), "--json"])
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    (layer,) = report["layers"]
    assert layer["algorithm"] == "lokr" and layer["scale"] == 1 and layer["rank"] is None
    assert report["coverage"] == 1 and report["unmatched"] == []


def test_inspect_says_what_is_not_understood(here, capsys):
    assert cli.main(["inspect", "dora.safetensors"]) == 1
    out = capsys.readouterr().out
    assert "0 of 1 modules read" in out and "not read:\n  lycoris_a: no factors beside alpha" in out


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["style.safetensors"], (2, 1)),
        (["style.safetensors", "--strength", "0.5"], (1.5, 1)),
        (["style.safetensors:0.25", "face.safetensors:-2", "--strength", "9"], (1.25, -1)),
        (["style.safetensors", "style.safetensors:3"], (5, 1)),
        (["other.safetensors:2", "--no-strict"], (3, 1)),
        (["style.safetensors", "face.safetensors", "--strength", "b:0.5"], (2, 1.5)),
        (["style.safetensors", "--strength", "3", "--strength", "style=a:0.5"], (1.5, 1)),
    ],
)
def test_merge(here, capsys, arguments, expected):
    assert cli.main(["merge", "base.safetensors", *arguments, "-o", "out.safetensors"]) == 0
    assert values("out.safetensors") == {"a.weight": [expected[0]], "b.weight": [expected[1]]}
    out, err = capsys.readouterr()
    assert "wrote out.safetensors" in out and err == "" and "at strength" in out
    assert ("left out: lycoris_x: no layer has this name" in out) == ("--no-strict" in arguments)


def test_a_dry_run_says_what_would_be_done(here, capsys):
    before = sorted(path.name for path in here.iterdir())
    command = ["merge", "base.safetensors", "style.safetensors:0.5", "face.safetensors"]
    assert cli.main([*command, "-o", "out.safetensors", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and before == sorted(path.name for path in here.iterdir())
    for line in (
        "2 tensors would change (2 F32), 0 pass bit for bit",
        "1 layers at strength 0.5, the first is a",
        "1 layers at strength 1, the first is b",
        "out.safetensors: 48 bytes of tensors",
        "nothing was written",
    ):
        assert line in out
    assert cli.main([*command, "-o", "no/out", "--dry-run"]) == 2


def test_a_merge_says_what_rounding_lost(here, capsys):
    write("base.safetensors", {"a.weight": np.ones((2, 3), bf16)})
    write("style.safetensors", {"lycoris_a.diff": np.full((2, 3), 1e-3, np.float32)})
    assert cli.main(["merge", "base.safetensors", "style.safetensors", "-o", "o.safetensors"]) == 0
    out = capsys.readouterr().out
    assert "rounded to BF16: 0.0% of the change survives, with a relative error of 1\n" in out
    assert "  a.weight: 0.0% of the change" in out


def test_shards(here, capsys):
    command = ["merge", "base.safetensors", "style.safetensors", "-o", "out", "--shard-size", "24"]
    assert cli.main(command) == 0 and len(list((here / "out").iterdir())) == 3
    assert cli.main(["merge", "out", "face.safetensors", "-o", "whole", "--shard-size", "0"]) == 0
    assert values("whole") == {"a.weight": [2], "b.weight": [2]}
    with pytest.raises(SystemExit):
        cli.main(["merge", "out", "face.safetensors", "-o", "x", "--shard-size", "big"])
    assert "size 'big' is unknown: write 5GB" in capsys.readouterr().err


def test_a_colon_in_a_name(here, capsys):
    (here / "style.safetensors").rename(here / "a:0.5")
    assert cli.main(["merge", "base.safetensors", "a:0.5", "-o", "out.safetensors"]) == 0
    assert values("out.safetensors")["a.weight"] == [2]
    assert cli.main(["merge", "base.safetensors", "a:0.5:3", "-o", "out.safetensors"]) == 0
    assert values("out.safetensors")["a.weight"] == [4]
    assert cli.main(["merge", "base.safetensors", "a:b", "-o", "out.safetensors"]) == 2
    assert "lycoris-cupy: error: a:b: No such file" in capsys.readouterr().err


ERRORS = {
    "no file": (["inspect", "none.safetensors"], "none.safetensors: No such file or directory"),
    "a folder": (["inspect", "."], ".: is a folder without adapter_model.safetensors"),
    "no adapter": (
        ["merge", "base.safetensors", "none:1", "-o", "out"],
        "none: No such file or directory",
    ),
    "no base": (
        ["merge", "none", "style.safetensors", "-o", "out"],
        "none: No such file or directory",
    ),
    "no folder": (
        ["merge", "base.safetensors", "style.safetensors", "-o", "no/out"],
        "no/out: cannot be written: No such file or directory",
    ),
    "no float": (
        ["merge", "base.safetensors", "style.safetensors:nan", "-o", "out"],
        "strength is nan, expected a finite",
    ),
    "dora": (
        ["merge", "base.safetensors", "dora.safetensors", "-o", "out"],
        "no factors beside alpha",
    ),
    "partly": (
        ["merge", "base.safetensors", "other.safetensors", "-o", "out"],
        "1 of 2 modules match no layer",
    ),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors_are_one_line_and_exit_code_2(here, capsys, what):
    arguments, message = ERRORS[what]
    before = sorted(path.name for path in here.iterdir())
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    first, *rest = err.splitlines()
    assert out == "" and first.startswith("lycoris-cupy: error: ") and message in first
    assert (not rest) == (what != "partly") and "Traceback" not in err  # then the modules follow
    assert before == sorted(path.name for path in here.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["inspect"],
        ["merge", "base"],
        ["merge", "b", "a", "-o", "c", "--strength", "x"],
    ],
)
def test_wrong_arguments(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2 and "error:" in capsys.readouterr().err


def test_interrupted(here, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "merge_files", interrupt)
    assert (
        cli.main(["merge", "base.safetensors", "style.safetensors", "-o", "out.safetensors"]) == 130
    )
    assert capsys.readouterr().err == "lycoris-cupy: interrupted\n"


def test_help_teaches(capsys):
    for arguments, parts in {
        ("--help",): ["inspect", "merge", "demo", "examples:"],
        ("merge", "--help"): [
            "examples:",
            "style.safetensors:0.8 pose.safetensors:-1",
            "BASE",
            "ADAPTER[:STRENGTH]",
        ],
        ("inspect", "--help"): ["--json"],
    }.items():
        with pytest.raises(SystemExit) as caught:
            cli.main(list(arguments))
        out = capsys.readouterr().out
        assert caught.value.code == 0 and all(part in out for part in parts)


def test_the_examples_are_ones_that_parse():
    for command in (None, *cli.COMMANDS):
        text = cli._EXAMPLES if command is None else getattr(command, "_EXAMPLES", "")
        lines = [line for line in text.splitlines() if line.startswith("  lycoris-cupy ")]
        name = None if command is None else command.__name__.rpartition(".")[2]
        assert lines or name == "demo"
        for line in lines:
            done = cli.make_parser().parse_args(shlex.split(line.partition(" | ")[0])[1:])
            assert name is None or done.run is command.run


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert (
        caught.value.code == 0
        and capsys.readouterr().out == f"lycoris-cupy {lycoris_cupy.__version__}\n"
    )


def test_as_a_module(here):
    done = run("inspect", "style.safetensors")
    assert done.returncode == 0 and "1 full" in done.stdout and done.stderr == ""
    done = run("merge", "base.safetensors", "none", "-o", "out")
    assert (done.returncode, done.stderr) == (
        2,
        "lycoris-cupy: error: none: No such file or directory\n",
    )
    done = run("merge", "base.safetensors", "style.safetensors", "-o", "out")
    assert done.returncode == 0 and done.stderr == "" and values("out")["a.weight"] == [2]


def test_a_reader_that_goes_away(here):
    write(
        "long.safetensors", {f"lycoris_{i}.diff": np.ones((1, 1), np.float32) for i in range(5000)}
    )
    command = [*COMMAND, "inspect", "long.safetensors"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    ) as child:
        child.stdout.readline()
        child.stdout.close()
        assert (child.stderr.read(), child.wait(30)) == (b"", 141)


def test_the_demo_gets_its_options(monkeypatch, capsys):
    monkeypatch.setattr(demo, "run_demo", lambda args: print(f"{args.steps} {args.device}") or 7)
    assert cli.main(["demo", "--steps", "5"]) == 7
    assert capsys.readouterr().out == "5 auto\n"


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = (
        "import sys, lycoris_cupy.cli\n"
        "heavy = {'cupy', 'PIL', 'skimage', 'scipy', 'tqdm', 'nvmath'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_progress_bar(monkeypatch, capsys, terminal):
    """On a terminal after half a second, elsewhere after ten; it ends at the whole."""
    import tqdm

    made = []

    def spy(**options):
        made.append((options, bar := tqdm.std.tqdm(**options)))
        return bar

    monkeypatch.setattr(tqdm, "tqdm", spy)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with Bar("merging", "B") as bar:
        bar(10, 30)
        bar(30, 30)
    ((options, shown),) = made
    assert options["total"] == shown.n == 30 and options["delay"] == (0.5 if terminal else 10)
    assert capsys.readouterr().err == ""  # it was quick


def test_convert(here, capsys):
    write(
        "lora.safetensors",
        {
            "lora_unet_a.lora_down.weight": np.ones((1, 3), np.float32),
            "lora_unet_a.lora_up.weight": np.ones((2, 1), np.float32),
        },
    )
    arguments = ["convert", "lora.safetensors", "out.safetensors", "--to"]
    assert cli.main([*arguments, "diffusers"]) == 2
    assert "give the model it is for (--base)" in capsys.readouterr().err
    assert cli.main([*arguments, "diffusers", "--base", "base.safetensors"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "(kohya) -> out.safetensors (diffusers): 1 modules, nothing lost" in out
    assert set(values("out.safetensors")) == {f"transformer.a.lora_{x}.weight" for x in "AB"}
    assert cli.main([*arguments, "lycoris", "--dtype", "f16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["to"] == "lycoris" and report["modules"][0]["loss"] == 0


def test_the_examples_of_convert_parse(capsys):
    lines = [
        line.split() for line in convert._EXAMPLES.splitlines() if "lycoris-cupy convert" in line
    ]
    assert len(lines) >= 5
    for line in lines:
        assert cli.make_parser().parse_args(line[1:]).to in DIALECTS


def test_inspect_on_a_base_and_as_a_page(here, capsys):
    assert cli.main(["inspect", "style.safetensors", "--base", "base.safetensors"]) == 0
    out = capsys.readouterr().out
    assert "|dW|/|W|" in out and "on 1 of 2 layers" in out
    assert (
        cli.main(["inspect", "other.safetensors", "--base", "base.safetensors", "--html", "o.html"])
        == 1
    )
    assert "wrote o.html" in capsys.readouterr().out and "<svg" in (here / "o.html").read_text()
    assert cli.main(["inspect", "style.safetensors", "--html", "no/o.html"]) == 2
    assert "no/o.html: cannot be written" in capsys.readouterr().err


def test_diff(here, capsys):
    assert cli.main(["diff", "style.safetensors", "style.safetensors"]) == 0
    assert capsys.readouterr().out.endswith("style.safetensors: 1 same\n")
    assert cli.main(["diff", "style.safetensors", "face.safetensors", "--json"]) == 1
    assert {one["what"] for one in json.loads(capsys.readouterr().out)["layers"]} == {
        "only in A",
        "only in B",
    }
    assert cli.main(["diff", "style.safetensors", "none"]) == 2
