"""Adapters at a lower rank against the dense SVD in f64; files in their own dialect."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lycoris_cupy import LayerShape, LoCon, LoHa, LoKr, bf16, cli
from lycoris_cupy.errors import FileFormatError, LycorisError
from lycoris_cupy.io.adapter_file import inspect_adapter, read_adapter, write_adapter
from lycoris_cupy.io.resize import resize_file
from lycoris_cupy.io.safetensors import open_file, write
from lycoris_cupy.ops.window import Window
from lycoris_cupy.ranks import RankRule
from lycoris_cupy.resize import cut, resized
from lycoris_cupy.svd import Svd
from tests.cases import KINDS
from tests.test_spectrum import dense, random_params

CONV = LayerShape(Window.of((3, 2)), 12, 18)
LINEAR = LayerShape(Window(), 30, 21)


# -- which rank

# The values of the worked examples of the reference, and what it and its tools choose.
VALUES = np.array([8, 4, 2, 1, 0.5, 0.25, 0.1, 0.05])


@pytest.mark.parametrize(
    "kind, value, rank",
    [
        ("rank", 3, 3),
        ("rank", 99, 8),
        ("threshold", 1.0, 3),
        ("threshold", 0.9, 4),
        ("threshold", 99, 1),
        ("ratio", 0.25, 2),
        ("ratio", 0.2, 3),
        ("ratio", 0, 8),
        ("quantile", 0.5, 1),
        ("quantile", 0.75, 1),
        ("quantile", 0.8, 2),
        ("quantile", 0.9, 3),
        ("energy", 0.8, 2),
        ("energy", 0.75, 1),
        ("energy", 1.0, 8),
        ("error", 0.0, 8),
        ("error", 1.0, 1),
        ("error", 0.3, 2),
        ("error", 0.27, 2),
        ("error", 0.24, 3),
    ],
)
def test_rules(kind, value, rank):
    assert RankRule(kind, value).choose(Svd(VALUES)) == rank
    assert RankRule(kind, value, most=2).choose(Svd(VALUES)) == min(rank, 2)
    assert RankRule(kind, value).choose(Svd(np.zeros(3))) == 1


@given(st.floats(0, 1), st.integers(0, 99))
def test_an_error_bound_holds_and_one_rank_less_breaks_it(bound, seed):
    svd = Svd(np.sort(np.random.default_rng(seed).random(9))[::-1])
    rank = RankRule("error", bound).choose(svd)
    assert svd.error(rank) <= bound + 1e-6
    assert rank == 1 or svd.error(rank - 1) > bound
    assert RankRule("energy", 1 - bound**2).choose(svd) == rank


@pytest.mark.parametrize(
    "kind, value, most, match",
    [
        ("rank", 0, None, "rank is 0, expected a whole number of 1 or more"),
        ("rank", 1.5, None, "rank is 1.5, expected a whole number"),
        ("energy", 1.1, None, "energy is 1.1, expected a share between 0 and 1"),
        ("ratio", float("nan"), None, "ratio is nan, expected a share"),
        ("threshold", -1, None, "threshold is -1, expected 0 or more"),
        ("rank", 1, 0, "the largest rank is 0, expected 1 or more"),
        ("size", 1, None, "rank rule 'size' is none of rank, threshold"),
    ],
)
def test_rules_out_of_place(kind, value, most, match):
    with pytest.raises(LycorisError, match=match):
        RankRule(kind, value, most)


# -- one adapter


def lost(adapter, params, found):
    old = dense(adapter, {n: v.astype(np.float64) for n, v in params.items()})
    new = dense(found.adapter, {n: v.astype(np.float64) for n, v in found.params.items()})
    return np.linalg.norm(new - old) / np.linalg.norm(old), old


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
@pytest.mark.parametrize("alpha", [None, 2.0, -3.0])
def test_a_locon_of_less_rank_is_the_best(kind, alpha):
    adapter = LoCon(kind.shape, 5, alpha)
    params = random_params(adapter)
    for rank in (1, 3, 4):
        found = resized(adapter, params, RankRule("rank", rank))
        assert found.adapter.rank == rank and found.adapter.scale == pytest.approx(adapter.scale)
        error, old = lost(adapter, params, found)
        values = np.linalg.svd(old, compute_uv=False)
        best = np.linalg.norm(values[rank:]) / np.linalg.norm(values)
        assert error == pytest.approx(best, abs=1e-12) and found.error == pytest.approx(best)
    for rank in (5, 9):  # nothing to lower: the same factors
        if kind.shape.taps * kind.shape.inputs < 5:  # of which one is always too many here
            continue
        assert resized(adapter, params, RankRule("rank", rank)).params is params


def test_hidden_rank_comes_out():
    """Rank 6 of which two are others' sums: an error bound of almost 0 finds rank 4, exactly."""
    adapter = LoCon(CONV, 6, 3.0)
    params = random_params(adapter)
    params["up"][..., 4:, :] = params["up"][..., :2, :]
    found = resized(adapter, params, RankRule("error", 1e-9))
    assert found.adapter.rank == 4 and lost(adapter, params, found)[0] < 1e-13


def test_per_tap_becomes_plain():
    adapter = LoCon(CONV, 2, 2.0, per_tap=True)
    params = random_params(adapter)
    found = resized(adapter, params, RankRule("rank", 1))
    assert not found.adapter.per_tap and lost(adapter, params, found)[0] == pytest.approx(
        found.error
    )


@pytest.mark.parametrize("ranks", [(5, 5), (5, 3), (3, 5)])
def test_tucker(ranks):
    rank, mid_rank = ranks
    adapter = LoCon(CONV, rank, 2.0, tucker=True, mid_rank=mid_rank)
    params = random_params(adapter)
    errors = []
    for n in (1, 2, 3, 4):
        found = resized(adapter, params, RankRule("rank", n))
        assert found.adapter.tucker and found.adapter.rank == min(n, rank)
        assert found.adapter.scale == pytest.approx(adapter.scale)
        error, _ = lost(adapter, params, found)
        assert error == pytest.approx(found.error, abs=1e-12)
        errors.append(error)
    assert errors == sorted(errors, reverse=True) and (errors[-1] > 0.01 or rank != mid_rank)
    assert resized(adapter, params, RankRule("rank", 5)).params is params


@pytest.mark.parametrize("form", ["full", "factored", "tucker"])
def test_lokr_is_resized_on_its_side(form):
    ranks = {"full": None, "factored": 3, "tucker": 3}[form]
    adapter = LoKr(CONV, 3, 1.5, (3, 6, 2, 6), None, ranks, form == "tucker")
    params = random_params(adapter)
    found = resized(adapter, params, RankRule("rank", 2))
    assert found.adapter.w2_rank == 2 and found.adapter.scale == pytest.approx(adapter.scale)
    error, _ = lost(adapter, params, found)
    assert 0 < error == pytest.approx(found.error, abs=1e-12)
    assert resized(adapter, params, RankRule("rank", 6)).params is params


def test_dylora_is_cut():
    adapter = LoCon(CONV, 8, 4.0)
    params = random_params(adapter)
    found = cut(adapter, params, 2)
    assert found.adapter.rank == 2 and found.adapter.alpha == 4 and found.adapter.scale == 2
    assert (found.params["down"] == params["down"][..., :2]).all()
    assert (found.params["up"] == params["up"][..., :2, :]).all()
    whole, part = (
        a.delta_weight(None, a.canonical(p), np.ones(1))
        for a, p in ((adapter, params), (found.adapter, found.params))
    )
    assert found.error == pytest.approx(np.linalg.norm(whole - part) / np.linalg.norm(whole))
    assert cut(adapter, params, 8).params is params
    with pytest.raises(
        LycorisError, match="locon cannot be cut to a rank: only plain locon and dylora"
    ):
        cut(LoCon(CONV, 2, tucker=True), {}, 1)


@pytest.mark.parametrize(
    "adapter", [LoHa(LINEAR, 2), LoKr(LINEAR, 1, None, (3, 7, 5, 6), 1, 2)], ids=["loha", "w1"]
)
def test_what_has_no_rank_to_lower(adapter):
    with pytest.raises(LycorisError, match="has no rank that can be lowered: make it plain LoRA"):
        resized(adapter, random_params(adapter), RankRule("rank", 1))


@given(st.integers(1, 6), st.integers(0, 50))
def test_full_rank_is_exact_and_the_error_is_true(rank, seed):
    adapter = LoCon(LINEAR, 6, 2.0)
    params = random_params(adapter, seed)
    found = resized(adapter, params, RankRule("rank", rank))
    error, _ = lost(adapter, params, found)
    assert error == pytest.approx(found.error, abs=1e-12) and (rank < 6 or error == 0)


# -- files


@pytest.fixture
def style(tmp_path):
    """A linear LoCon, a Tucker LoCon, a LoCon of little rank."""
    layers = {
        "a": LoCon(LINEAR, 6, 3.0),
        "b": LoCon(CONV, 6, 6.0, tucker=True),
        "c": LoCon(CONV, 1, 1.0),
    }
    adapters = {
        name: (adapter, {n: v.astype(bf16) for n, v in random_params(adapter).items()})
        for name, adapter in layers.items()
    }
    metadata = {"ss_network_dim": "6", "ss_tag": "kept", "sshs_model_hash": "0x0"}
    write_adapter(tmp_path / "style.safetensors", adapters, metadata=metadata)
    return tmp_path / "style.safetensors"


SHAPES = {"a": LINEAR, "b": CONV, "c": CONV}


def test_a_file(style, tmp_path):
    out = tmp_path / "out.safetensors"
    seen = []
    report = resize_file(style, out, RankRule("rank", 2), progress=lambda *at: seen.append(at))
    old, new = (read_adapter(path, SHAPES)[0] for path in (style, out))
    assert [new[n][0].rank for n in "abc"] == [2, 2, 1] and seen[-1] == (3, 3)
    errors = {one.layer: one.error for one in report.layers}
    for name in "abc":
        (adapter, params), found = old[name], new[name]
        assert found[0].scale == pytest.approx(adapter.scale)
        was = dense(adapter, {n: v.astype(np.float64) for n, v in params.items()})
        now = dense(found[0], {n: v.astype(np.float64) for n, v in found[1].items()})
        error = np.linalg.norm(now - was) / np.linalg.norm(was)
        assert error == pytest.approx(errors[f"lycoris_{name}"], abs=2e-3)  # bf16 factors
    with open_file(style) as before, open_file(out) as after:
        assert after.metadata["ss_tag"] == "kept"
        assert not {"ss_network_dim", "sshs_model_hash"} & set(after.metadata)
        assert json.loads(after.metadata["lycoris_cupy.resized"]) == {"rank": 2}
        for key in before:
            if "_c." in key:
                assert before.raw(key).tobytes() == after.raw(key).tobytes()
            elif "alpha" not in key:
                assert after.dtype(key) == "BF16"


def test_conv_rank_apart_and_dtype(style, tmp_path):
    out = tmp_path / "out.safetensors"
    rule, conv = RankRule("energy", 0.9, 5), RankRule("rank", 1)
    resize_file(style, out, rule, conv_rule=conv, dtype=np.dtype(np.float32))
    new, report = read_adapter(out, SHAPES)
    assert new["b"][0].rank == 1 and 1 < new["a"][0].rank <= 5
    assert [one.dtype for one in report.layers] == ["F32", "F32", "BF16"]


def test_dialects_keep_their_words(tmp_path):
    """diffusers has no alpha: the scale goes into a factor, and nothing else appears."""
    rng = np.random.default_rng(0)
    down, up = rng.standard_normal((6, 30)), rng.standard_normal((21, 6))
    names = [f"unet.mid_block.attentions.0.to_q.lora_{x}.weight" for x in "AB"]
    source, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write(source, dict(zip(names, (down, up), strict=True)))
    resize_file(source, out, RankRule("rank", 3))
    with open_file(out) as file:
        assert sorted(file) == names
        new = file[names[1]] @ file[names[0]]
    left, values, right = np.linalg.svd(up @ down)
    assert np.allclose(new, (left[:, :3] * values[:3]) @ right[:3])


def test_peft_folders(tmp_path):
    rng = np.random.default_rng(0)
    folder, out = tmp_path / "peft", tmp_path / "out"
    folder.mkdir()
    names = [f"base_model.model.a.q.lora_{x}.weight" for x in "AB"]
    tensors = (rng.standard_normal((6, 30)), rng.standard_normal((21, 6)))
    write(folder / "adapter_model.safetensors", dict(zip(names, tensors, strict=True)))
    configuration = {"peft_type": "LORA", "r": 6, "lora_alpha": 12, "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(configuration))
    resize_file(folder, out, RankRule("rank", 2))
    (layer,) = inspect_adapter(out).layers
    assert layer.rank == 2 and layer.scale == 2


def test_what_is_refused(style, tmp_path):
    loha = LoHa(LINEAR, 2)
    adapters = {
        "a": (loha, random_params(loha)),
        "b": (LoCon(LINEAR, 3), random_params(LoCon(LINEAR, 3))),
    }
    write_adapter(style, adapters)
    out = tmp_path / "out.safetensors"
    with pytest.raises(
        FileFormatError, match="'lycoris_a': loha has no rank .*; --keep-others pas"
    ):
        resize_file(style, out, RankRule("rank", 1))
    assert not out.exists()
    report = resize_file(style, out, RankRule("rank", 1), keep_others=True)
    assert report.layers[0].notes == ("passed on as it is",) and report.layers[1].error > 0
    write(style, {"lycoris_a.lora_down.weight": np.ones((2, 3)), "what.is.this": np.ones(1)})
    with pytest.raises(FileFormatError, match="style.safetensors: what.is.this: "):
        resize_file(style, out, RankRule("rank", 1))
    write(style, {"lycoris_a.lora_down.weight": np.ones((2, 3))})
    with pytest.raises(FileFormatError, match="module 'lycoris_a': lora_up.weight is missing"):
        resize_file(style, out, RankRule("rank", 1))


def test_the_command(style, tmp_path, capsys):
    out = str(tmp_path / "out.safetensors")
    assert cli.main(["resize", str(style), out, "--error", "0.4", "--max-rank", "4"]) == 0
    said = capsys.readouterr().out
    assert "locon rank 6 -> " in said and "locon rank 1, as before" in said
    assert f"wrote {out}: 3 layers" in said
    assert cli.main(["resize", str(style), out, "--rank", "2", "--conv", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"][1]["form"] == "locon rank 6 -> 1"
    assert cli.main(["resize", str(style), out, "--cut", "2", "--keep-others"]) == 0
    (one, *_) = read_adapter(out, SHAPES)[0].values()
    assert one[0].rank == 2 and one[0].alpha == 3
    assert cli.main(["resize", str(style), out, "--energy", "2"]) == 2
    assert "energy is 2, expected a share between 0 and 1" in capsys.readouterr().err
    assert cli.main(["resize", str(style), out]) == 2
    assert (
        "say which rank: one of --rank, --energy, --ratio, --error, --cut"
        in capsys.readouterr().err
    )
