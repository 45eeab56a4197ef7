"""Pictures of logs, and the command that draws them."""

import json

import numpy as np
import pytest

from lycoris_cupy.cli import main
from lycoris_cupy.train.plot import plot_runs, smoothed


def write_log(folder, steps=(10, 20, 30), torn=b""):
    folder.mkdir()
    lines = [
        {"step": s, "seconds": s / 7, "loss": 1 / s, "grad_norm": 2 / s, "lr": 0.1} for s in steps
    ]
    lines += [{"step": steps[-1], "seconds": 9, "validation": 0.04}]
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    (folder / "log.jsonl").write_bytes(text + torn)


def text_of(svg):
    return svg.read_text()


def test_a_run_still_going_on(tmp_path, capsys):
    """A last line that is not whole is left alone; the picture is a PNG of the size that it says."""
    write_log(tmp_path / "run", torn=b'{"step": 40, "lo')
    assert main(["plot", str(tmp_path / "run")]) == 0
    png = (tmp_path / "run/loss.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert [int.from_bytes(png[i : i + 4]) for i in (16, 20)] == [9 * 120, 7 * 120]
    assert f"wrote {tmp_path / 'run' / 'loss.png'}" in capsys.readouterr().out


def test_several_runs_in_one(tmp_path):
    """Each with its own name in the legend, and curves where the values are."""
    from matplotlib.image import imread

    write_log(tmp_path / "first")
    write_log(tmp_path / "second", (10, 20, 60))
    out = tmp_path / "both.svg"
    args = ["plot", str(tmp_path / "first"), str(tmp_path / "second/log.jsonl"), "-o", str(out)]
    assert main(args) == 0
    comments = text_of(out)
    assert all(
        f"<!-- {name} -->" in comments for name in ("first", "second", "gradient norm", "step")
    )
    assert main([*args[:2], "-o", str(tmp_path / "one.png")]) == 0
    assert main([*args[:3], "-o", str(tmp_path / "two.png")]) == 0
    one, two = (imread(tmp_path / f"{name}.png")[..., :3] for name in ("one", "two"))
    orange = np.array([1.0, 127 / 255, 14 / 255])  # the second colour
    assert (
        not (abs(one - orange).max(-1) < 0.02).any()
        and (abs(two - orange).max(-1) < 0.02).sum() > 100
    )


def test_smoothing_is_a_mean_within_the_window():
    values = np.random.default_rng(0).standard_normal(100)
    found = smoothed(values)
    np.testing.assert_allclose(found[50], values[48:53].mean())
    np.testing.assert_allclose(found[[0, 1, 99]], [values[0], values[:3].mean(), values[99]])
    assert (smoothed(values[:3]) == values[:3]).all()


def test_one_line_and_losses_of_zero_are_drawn(tmp_path):
    plot_runs({"a": [{"step": 1, "loss": 0.0, "grad_norm": 0.0}]}, tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes()[:4] == b"%PDF"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing"], "nothing: No such file or directory"),
        (["empty"], "empty: its log has no line with a loss yet"),
        (["broken"], r"log.jsonl, line 2: is no line of a log"),
        (["run", "run/../run", "-o", "x.png"], "a run was given twice"),
        (["run", "other"], "several runs: say with -o which file to write"),
        (["run", "-o", "x.jpg"], "x.jpg: expected a name that ends in .png, .svg, .pdf"),
        (["run", "-o", "no/x.png"], "no/x.png: cannot be written"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path / "run")
    write_log(tmp_path / "other")
    for name, text in (("empty", ""), ("broken", '{"step": 1}\n[]\n{"step": 2}\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text(text)
    assert main(["plot", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not list(tmp_path.rglob("*.png"))


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    from lycoris_cupy.train import plot

    write_log(tmp_path / "run")
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    assert main(["plot", str(tmp_path / "run")]) == 2
    assert 'python -m pip install "lycoris_cupy[plot]"' in capsys.readouterr().err
