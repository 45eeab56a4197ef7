"""Strengths of layers by pattern: what they mean, and what is refused."""

import numpy as np
import pytest

from lycoris_cupy.errors import FileFormatError, MatchError
from lycoris_cupy.io.merge import NOTE, merge_files
from lycoris_cupy.io.safetensors import open_file, write
from lycoris_cupy.io.strength import LayerStrength, parse_strength, strength_on


def test_the_forms():
    assert parse_strength("0.8") == 0.8 and parse_strength("-1e-3") == -0.001
    assert parse_strength("*attn*:0.5") == LayerStrength("*attn*", 0.5)
    assert parse_strength("style=*attn*:-2") == LayerStrength("*attn*", -2, "style")
    # Of several separators the last ones count: names may hold them.
    assert parse_strength("a=b=c:d:1") == LayerStrength("c:d", 1, "a=b")
    assert str(parse_strength("style=*attn*:-2")) == "style=*attn*:-2"


@pytest.mark.parametrize("text", ["", "x", "*attn*", ":1", "=x:1", "a=:1", "x:y"])
def test_unknown_forms(text):
    with pytest.raises(FileFormatError, match="is unknown: write 0.8, PATTERN:0.5 or ADAPTER="):
        parse_strength(text)


@pytest.mark.parametrize("text", ["nan", "*:inf", "a=*:-inf"])
def test_strengths_are_finite(text):
    with pytest.raises(FileFormatError, match="is not finite, expected a number"):
        parse_strength(text)


def test_the_last_that_fits_counts():
    rules = [
        LayerStrength("down.*", 0.5),
        LayerStrength("*.attn", 2, "style"),
        LayerStrength("x", 9),
    ]
    assert strength_on("down.attn", "dir/style.safetensors", 1, rules) == 2
    assert strength_on("down.attn", "other.safetensors", 1, rules) == 0.5
    assert strength_on("up.attn", "other.safetensors", 0.7, rules) == 0.7
    assert strength_on("DOWN.attn", "other", 0.7, rules) == 0.7  # capitals count
    assert strength_on("xx", "other", 0.7, rules) == 0.7  # the whole name
    for name in ("dir/style.safetensors", "style.safetensors", "style"):
        assert strength_on("a", "dir/style.safetensors", 1, [LayerStrength("*", 3, name)]) == 3


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = np.ones((2, 3), np.float32)
    write("base.safetensors", {f"{n}.weight": one for n in ("down.attn", "down.ff", "up.attn")})
    for name in ("style", "pose"):
        layers = ("down_attn", "down_ff", "up_attn")
        write(f"{name}.safetensors", {f"lycoris_{n}.diff": one for n in layers})
    return tmp_path


def merged(rules, adapters=(("style.safetensors", 1.0), ("pose.safetensors", 10.0))):
    rules = [parse_strength(rule) for rule in rules]
    report = merge_files("base.safetensors", adapters, "out.safetensors", rules=rules)
    with open_file("out.safetensors") as file:
        values = {n.removesuffix(".weight"): np.unique(file[n]).tolist() for n in sorted(file)}
        return values, file.metadata[NOTE], report


def test_merged_strengths(here):
    values, note, report = merged(["*attn:0.5", "style=down*:0"])
    assert values == {"down.attn": [1.5], "down.ff": [11], "up.attn": [2]}
    assert report.layers == {"down.attn": (0.5,), "down.ff": (10.0,), "up.attn": (0.5, 0.5)}
    assert '"layers": {"*attn": 0.5, "down*": 0.0}' in note
    assert '"file": "pose.safetensors", "strength": 10.0, "layers": {"*attn": 0.5}}' in note


def test_zero_leaves_a_layer_alone(here):
    values, _, report = merged(["*:0"])
    assert set(map(tuple, values.values())) == {(1.0,)} and report.changed == ()


def test_a_rule_that_fits_nothing_is_an_error(here):
    with pytest.raises(
        MatchError, match=r"strength '\*mid\*:1' fits none of the 6 layers that are"
    ):
        merged(["*mid*:1"])
    with pytest.raises(MatchError, match="is of the adapter 'face', expected one of 'pose.safete"):
        merged(["face=*:1"])
    assert not (here / "out.safetensors").exists()
