"""The demo from end to end with two steps, and checks that fail when something is wrong."""

import argparse
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

from lycoris_cupy import Engine, FileFormatError, LycorisError, demo
from lycoris_cupy.demo import extra
from lycoris_cupy.demo.ncnn import read_network

installed = all(find_spec(module) for module in extra.PACKAGES)
needs_extra = pytest.mark.skipif(not installed, reason="the extra demo is not installed")


def options(*arguments):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args([str(a) for a in arguments])


@pytest.fixture
def network():
    return read_network(*extra.network_files())


@pytest.fixture
def small(monkeypatch):
    """Squares of 128 pixels instead of 256, and a check on 24 instead of 64."""
    from lycoris_cupy.demo import photographs, run

    monkeypatch.setattr(photographs, "SIZE", 128)
    monkeypatch.setattr(run, "CHECKED", 24)


def noise_adapter(network, path, algorithm, **settings):
    """A file with an adapter of 2 % of the weights or so."""
    from lycoris_cupy.demo.upscaler import build_engine

    engine = build_engine(network, "cpu")
    engine.add("noise", algorithm, **settings)
    rng = np.random.default_rng(0)
    values = {
        layer: {
            name: 0.05 * rng.standard_normal(p.shape).astype(np.float32)
            for name, p in factors.items()
        }
        for layer, factors in engine.parameters("noise").items()
    }
    engine.set_parameters("noise", values)
    engine.save_adapter("noise", path)
    return engine


@needs_extra
def test_the_demo_runs_and_writes_everything(tmp_path, small, capsys, device):
    from PIL import Image

    from lycoris_cupy.demo.photographs import read_picture

    photo = tmp_path / "own.png"
    Image.fromarray(np.arange(30 * 21 * 3, dtype=np.uint8).reshape(30, 21, 3)).save(photo)
    out = tmp_path / "new" / "out"
    done = demo.main(options("--steps", 2, "--device", device[:4], "--out", out, "--photo", photo))
    printed = capsys.readouterr()
    assert done == 0, printed.err
    names = "before-after.png locon.safetensors lokr.safetensors table.md"
    names += " own-network.png own-lokr.png own-locon.png"
    assert sorted(path.name for path in out.iterdir()) == sorted(names.split())
    table = (out / "table.md").read_text(encoding="utf-8")
    assert table in printed.out
    assert table.count("| yes") == 10 and "| NO" not in table
    for word in ("astronaut", "coffee", "cat", "mean", "bicubic", "+ LoKr", "+ LoCon"):
        assert word in table
    assert read_picture(out / "before-after.png").shape == (18 + 3 * 260 - 4, 6 * 260 - 4, 3)
    assert read_picture(out / "own-lokr.png").shape == (60, 42, 3)
    report = Engine(read_network(*extra.network_files()).layers, device="cpu").attach(
        out / "lokr.safetensors"
    )
    assert len(report.layers) == 18


@needs_extra
def test_training_twice_gives_the_same_bits_and_less_loss(network):
    from lycoris_cupy.demo.photographs import training_photographs
    from lycoris_cupy.demo.training import METHODS, train
    from lycoris_cupy.demo.upscaler import build_engine

    found = []
    for _ in range(2):
        engine = build_engine(network, "cpu")
        train(engine, "x", METHODS["LoCon"], training_photographs()[:1], 2, seed=3)
        found.append(engine.parameters("x"))
    assert any((p["up"] != 0).any() for p in found[0].values())
    for layer, p in found[0].items():
        assert all(p[name].tobytes() == found[1][layer][name].tobytes() for name in p)


@needs_extra
def test_a_short_training_gains_three_decibels_on_a_photograph_it_has_not_seen(
    network, small, monkeypatch
):
    from lycoris_cupy.demo import photographs, training
    from lycoris_cupy.demo.upscaler import build_engine, upscale

    monkeypatch.setattr(training, "PATCH", 16)
    engine = build_engine(network, "cpu")
    low, original = photographs.held_out(0)["cat"]
    before = photographs.psnr(upscale(engine, low), original)
    photos = photographs.training_photographs()
    training.train(engine, "x", training.METHODS["LoCon"], photos, 24, seed=0)
    assert photographs.psnr(upscale(engine, low), original) > before + 3


@needs_extra
@pytest.mark.parametrize(
    "algorithm, settings", [("lokr", {"rank": 2}), ("locon", {"rank": 3}), ("loha", {"rank": 2})]
)
def test_merged_is_live_for_large_changes(network, tmp_path, algorithm, settings, device):
    from lycoris_cupy.demo.checks import merged_checks, reloaded_check

    path = tmp_path / "noise.safetensors"
    engine = noise_adapter(network, path, algorithm, **settings)
    assert reloaded_check(engine, "noise", path).holds
    low = np.random.default_rng(1).random((12, 14, 3), np.float32)
    checks = merged_checks(network, "noise", path, low, device)
    assert [str(check) for check in checks if not check.holds] == []
    assert all(check.measured > 0 for check in checks)


@needs_extra
def test_a_merge_at_the_wrong_strength_fails(network, tmp_path, monkeypatch):
    from lycoris_cupy.demo.checks import merged_checks

    path = tmp_path / "noise.safetensors"
    noise_adapter(network, path, "lokr")
    right = Engine.merged

    def wrong(engine):
        for name in engine.strength:
            engine.strength[name] = 1.001
        return right(engine)

    monkeypatch.setattr(Engine, "merged", wrong)
    low = np.random.default_rng(1).random((12, 14, 3), np.float32)
    checks = merged_checks(network, "noise", path, low, "cpu")
    assert [c.what for c in checks if not c.holds and "f32: difference of a layer" in c.what]


@needs_extra
def test_a_file_that_lost_a_bit_fails(network, tmp_path):
    from lycoris_cupy.demo.checks import reloaded_check

    path = tmp_path / "noise.safetensors"
    engine = noise_adapter(network, path, "locon")
    engine.parameters("noise")["Conv_2"]["up"].view(np.uint16)[0, 0, 0, 0] ^= 1
    check = reloaded_check(engine, "noise", path)
    assert not check.holds and check.measured == 1
    assert str(check).endswith("is 1, expected at most 0")


@needs_extra
def test_a_failed_check_is_exit_code_1(tmp_path, monkeypatch, capsys):
    from lycoris_cupy.demo import run
    from lycoris_cupy.demo.checks import Check

    monkeypatch.setattr(run, "run", lambda *_: [Check("x against y", 2.0, 1.0)])
    assert demo.main(options("--out", tmp_path)) == 1
    assert "error: x against y is 2, expected at most 1" in capsys.readouterr().err
    assert not replace(Check("", 0.0, 0.0), measured=float("nan")).holds


@pytest.mark.parametrize("module, name", extra.PACKAGES.items())
def test_a_missing_package_is_named(monkeypatch, tmp_path, module, name):
    monkeypatch.setattr(extra, "find_spec", lambda m: None if m == module else find_spec("numpy"))
    with pytest.raises(LycorisError, match=rf'needs {name}: .* install "lycoris_cupy\[demo\]"'):
        demo.main(options("--out", tmp_path))
    with pytest.raises(LycorisError, match=f"needs {name}"):
        extra.network_files()


def test_a_package_without_the_file_is_named(monkeypatch):
    monkeypatch.setattr(extra, "find_spec", lambda module: find_spec("numpy"))
    with pytest.raises(LycorisError, match="scikit-image is installed but has no data/no.png"):
        extra.file_of("skimage", "data", "no.png")


@needs_extra
def test_wrong_options_are_refused(tmp_path):
    with pytest.raises(LycorisError, match="--steps 0 must be at least 1"):
        demo.main(options("--out", tmp_path, "--steps", 0))
    with pytest.raises(LycorisError, match="--seed -1 at least 0"):
        demo.main(options("--out", tmp_path, "--seed", -1))
    (tmp_path / "no.png").write_bytes(b"no")
    with pytest.raises(FileFormatError, match="cannot read .*no.png as a picture"):
        demo.main(options("--out", tmp_path, "--photo", tmp_path / "no.png"))


@needs_extra
def test_damage_and_psnr():
    from lycoris_cupy.demo import photographs

    rng = np.random.default_rng(0)
    low = photographs.damaged(np.full((200, 400, 3), 0.8, np.float32), rng)
    assert low.shape == (100, 200, 3)
    pixels = low.reshape(-1, 3)
    assert (pixels == pixels[:, :1]).all()  # a spot has lost all channels
    lost = (pixels[:, 0] == 0) | (pixels[:, 0] == 1)
    for found, share in ((lost.mean(), 0.06), ((pixels[:, 0] == 1).mean(), 0.03)):
        assert abs(found - share) < 5 * np.sqrt(share / len(pixels))
    kept = np.where((low == 0) | (low == 1), np.nan, low)
    rows = np.sort([np.nanmean(kept[0::2]), np.nanmean(kept[1::2])])
    np.testing.assert_allclose(rows, [0.6, 0.8], rtol=1e-6)
    a = np.zeros((20, 20, 3))
    b = a + 0.1
    b[:4] = 9  # the border does not count
    assert photographs.psnr(b, a) == pytest.approx(20.0)
