"""Extraction against dense f64: low rank, Tucker-2, the nearest Kronecker product, and files."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lycoris_cupy import Full, LayerShape, LoCon, LoKr, bf16, cli
from lycoris_cupy.adapters import SparseLoCon
from lycoris_cupy.adapters.sparse import dense as sparse_dense
from lycoris_cupy.arrays import to_device
from lycoris_cupy.errors import DtypeError, FileFormatError, LycorisError, MatchError, ShapeError
from lycoris_cupy.extraction import Form, extract, relative_error
from lycoris_cupy.io.adapter_file import read_adapter
from lycoris_cupy.io.extract import extract_files
from lycoris_cupy.io.header import NUMPY
from lycoris_cupy.io.merge import merge_files
from lycoris_cupy.io.safetensors import open_file, write
from lycoris_cupy.nearest_kron import nearest_kron
from lycoris_cupy.norms import NormShape
from lycoris_cupy.ops.window import Window
from lycoris_cupy.randomised import truncated_svd
from lycoris_cupy.ranks import RankRule
from lycoris_cupy.tucker import tucker2, tucker_rank
from tests.test_spectrum import dense

UNET = "model.diffusion_model."
LINEAR = LayerShape(Window(), 30, 21)
CONV = LayerShape(Window.of((3, 2)), 12, 18)
DTYPE = {"cpu": np.float64, "cuda:0": np.float32}
CLOSE = {"cpu": 1e-10, "cuda:0": 2e-3}  # f32, and a difference of squares


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def on(device, array):
    return to_device(array.astype(DTYPE[device]), device)


def relative(got, expected):
    got = to_device(got, "cpu").astype(np.float64)
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


# -- random projections


def spectrum(kind, n):
    return {
        "low rank": np.where(np.arange(n) < 12, 1.0, 0),
        "decay": np.exp(-np.arange(n) / 6),
        "noise": np.where(np.arange(n) < 12, 1.0, 1e-2),
        "flat": np.linspace(1, 0.9, n),
    }[kind]


@pytest.mark.parametrize("kind", ["low rank", "decay", "noise", "flat"])
@pytest.mark.parametrize("shape", [(140, 190), (190, 140)])
def test_random_projections_are_as_good_as_they_claim(device, kind, shape):
    values = spectrum(kind, 140)
    left, right = (np.linalg.qr(normal(n, 140, seed=n))[0] for n in shape)
    matrix = (left * values) @ right.T
    for rule in (RankRule("rank", 12), RankRule("error", 0.3), RankRule("ratio", 0.5, 20)):
        found = truncated_svd(on(device, matrix), rule)
        best = np.linalg.norm(values[found.rank :]) / np.linalg.norm(values)
        product = (found.svd.left * found.svd.values) @ found.svd.right
        assert relative(product, matrix) == pytest.approx(found.error, abs=CLOSE[device])
        assert found.error <= 1.02 * best + CLOSE[device]
        if kind in ("low rank", "noise") and rule.kind == "rank":
            assert found.rank == 12 and not found.exact
        if kind == "flat":
            assert found.exact
        if rule.kind == "error":
            assert found.error <= 0.3 + CLOSE[device]


def test_the_rank_by_projections_is_that_of_all_values():
    matrix = normal(200, 12) @ np.diag(np.arange(12, 0, -1.0)) @ normal(12, 180, seed=1)
    values = np.linalg.svd(matrix, compute_uv=False)
    for kind, value in (("energy", 0.9), ("error", 0.2), ("ratio", 0.3), ("threshold", 500.0)):
        rule = RankRule(kind, value)
        found = truncated_svd(matrix, rule)
        left_out = [np.linalg.norm(values[n:]) for n in range(13)]
        expected = {
            "energy": next(n for n, x in enumerate(left_out) if x**2 <= 0.1 * left_out[0] ** 2),
            "error": next(n for n, x in enumerate(left_out) if x <= 0.2 * left_out[0]),
            "ratio": (values > 0.3 * values[0]).sum(),
            "threshold": (values > 500).sum(),
        }[kind]
        assert not found.exact and found.rank == expected
    assert truncated_svd(matrix, RankRule("quantile", 0.9)).exact


def test_nothing_is_of_rank_one():
    found = truncated_svd(np.zeros((90, 80)), RankRule("error", 0.1))
    assert found.rank == 1 and found.error == 0


# -- Tucker-2 and Kronecker


@given(st.integers(1, 4), st.integers(0, 99))
def test_tucker_2_of_a_tucker_product_is_exact(rank, seed):
    rng = np.random.default_rng(seed)
    change = rng.standard_normal((10, rank)) @ rng.standard_normal((6, rank, rank))
    change = change @ rng.standard_normal((rank, 13))
    down, mid, up, error = tucker2(change, rank)
    assert error < 1e-12 and relative(down @ mid @ up, change) < 1e-12
    assert np.allclose(down.T @ down, np.eye(rank)) and np.allclose(up @ up.T, np.eye(rank))
    assert tucker_rank(change, RankRule("error", 1e-6)) == rank


def test_tucker_2_of_anything(device):
    change = normal(6, 20, 30)
    errors = []
    for rank in (2, 5, 9, 20):
        down, mid, up, error = tucker2(on(device, change), rank)
        assert relative(down @ mid @ up, change) == pytest.approx(error, abs=1e-5)
        # Not below what either side alone must leave out; at or below the higher-order SVD's.
        sides = [
            np.linalg.svd(change.transpose(axes).reshape(n, -1))
            for n, axes in ((20, (1, 0, 2)), (30, (2, 0, 1)))
        ]
        least = max(np.linalg.norm(s[rank:]) for _, s, _ in sides) / np.linalg.norm(change)
        (u, _, _), (v, _, _) = sides
        u, v = u[:, :rank], v[:, :rank]
        start = relative(u @ (u.T @ change @ v) @ v.T, change)
        assert least - 1e-6 <= error <= start + 1e-6
        errors.append(error)
    assert errors == sorted(errors, reverse=True)


@given(st.integers(0, 99), st.sampled_from([(3, 6, 5, 4), (6, 3, 4, 5), (1, 18, 20, 1)]))
def test_the_nearest_of_a_kronecker_product_is_itself(seed, split):
    rows, columns, blocks, width = split
    rng = np.random.default_rng(seed)
    w1, w2 = rng.standard_normal((rows, blocks)), rng.standard_normal((4, width, columns))
    change = np.stack([np.kron(w1.T, tap) for tap in w2])
    found = nearest_kron(change, split)
    assert found.error < 1e-12
    again = np.stack([np.kron(found.w1.T, tap) for tap in found.w2])
    assert relative(again, change) < 1e-12
    assert np.linalg.norm(found.w1) == pytest.approx(np.linalg.norm(found.w2))


def test_the_nearest_kronecker_product_of_anything(device):
    """The best rank one of the rearranged weight, written out with loops."""
    split = rows, columns, blocks, width = 3, 6, 5, 4
    change = normal(2, 20, 18)
    found = nearest_kron(on(device, change), split)
    flat = np.stack(
        [
            change[:, m * width : (m + 1) * width, r * columns : (r + 1) * columns].ravel()
            for r in range(rows)
            for m in range(blocks)
        ]
    )
    values = np.linalg.svd(flat, compute_uv=False)
    best = np.linalg.norm(values[1:]) / np.linalg.norm(values)
    assert found.error == pytest.approx(best, abs=1e-5)
    w1, w2 = (to_device(w, "cpu") for w in (found.w1, found.w2))
    again = np.stack([np.kron(w1.T, tap) for tap in w2])
    assert relative(again, change) == pytest.approx(best, abs=1e-5)
    assert nearest_kron(on(device, np.zeros((2, 20, 18))), split).error == 0


# -- one layer

FORMS = {
    "locon": Form("locon", RankRule("rank", 4)),
    "tucker": Form("tucker", RankRule("rank", 4)),
    "lokr": Form("lokr", factor=3),
    "lokr factored": Form("lokr", RankRule("rank", 2), factor=3),
    "full": Form("full"),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("shape", [LINEAR, CONV], ids=["linear", "conv"])
def test_a_layer_of_the_form_comes_back(device, name, shape):
    form = FORMS[name]
    if name.startswith("lokr"):
        rows, blocks = (3, 3)
        made = LoKr(shape, 2, 2.0, (rows, shape.outputs // rows, blocks, shape.inputs // blocks))
        if "factored" in name:
            made = LoKr(shape, 2, 2.0, made.split, None, 2)
    elif name == "full":
        made = Full(shape)
    else:
        made = LoCon(shape, 4, 4.0, tucker=name == "tucker" and shape.taps > 1)
    rng = np.random.default_rng(1)
    params = {n: rng.standard_normal(made.flame_shape(f)) for n, f in made.factors().items()}
    change = dense(made, params).reshape(shape.taps, shape.inputs, shape.outputs)
    adapter, found = extract(shape, on(device, change), form)
    assert type(adapter) is type(made) and getattr(adapter, "tucker", 0) == getattr(
        made, "tucker", 0
    )
    assert relative(dense(adapter, found).reshape(change.shape), change) < max(CLOSE[device], 1e-12)
    if name == "lokr factored":
        assert adapter.w2_rank == 2


@pytest.mark.parametrize("name", FORMS)
def test_the_error_is_that_of_what_is_written(device, name):
    change = normal(CONV.taps, CONV.inputs, CONV.outputs)
    adapter, wide = extract(CONV, on(device, change), FORMS[name])
    params = {n: v.astype(bf16) for n, v in wide.items()}
    error = relative_error(on(device, change), adapter, params)
    now = dense(adapter, {n: v.astype(np.float64) for n, v in params.items()})
    expected = relative(now.reshape(change.shape), change)
    assert error == pytest.approx(expected, rel=1e-3) and (error > 0.1 or name == "full")


def test_a_low_rank_that_saves_nothing_becomes_full():
    change = normal(1, 30, 21)
    for rank, kind in ((12, LoCon), (13, Full)):  # 12 * 51 < 630 < 13 * 51
        adapter, params = extract(LINEAR, change, Form("locon", RankRule("rank", rank)))
        assert type(adapter) is kind
    assert (params["diff"] == change[0]).all()
    shape = LayerShape(Window.of((3, 2)), 12, 13)
    adapter, _ = extract(shape, normal(6, 12, 13), Form("tucker", RankRule("rank", 12)))
    assert type(adapter) is Full


def test_forms_out_of_place():
    with pytest.raises(LycorisError, match="form 'loha' is none of locon, tucker, lokr, full"):
        Form("loha")
    with pytest.raises(LycorisError, match="form 'tucker' needs a rule for the rank"):
        Form("tucker")
    with pytest.raises(LycorisError, match="sparsity is 98, expected a share between 0 and 1"):
        Form("locon", RankRule("rank", 1), sparsity=98)
    with pytest.raises(LycorisError, match="sparsity goes with locon and tucker, not with lokr"):
        Form("lokr", sparsity=0.9)


@given(st.integers(1, 5), st.integers(0, 99))
def test_what_was_added_at_rank_r_is_found(rank, seed):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((21, 30))
    change = rng.standard_normal((21, rank)) @ rng.standard_normal((rank, 30))
    got = (weight + change) - weight
    adapter, params = extract(LINEAR, got.T[None], Form("locon", RankRule("error", 1e-6)))
    assert adapter.rank == rank and relative(dense(adapter, params), change.T) < 1e-10


# -- files


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A base; a tuned one with changes of rank 2, a bias, a norm, and names of its own."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(4)
    unet = "model.diffusion_model."
    base = {
        f"{unet}a.weight": rng.standard_normal((21, 30)),
        f"{unet}a.bias": rng.standard_normal(21),
        f"{unet}b.conv.weight": rng.standard_normal((18, 12, 3, 2)),
        f"{unet}same.weight": rng.standard_normal((8, 9)),
        f"{unet}norm.weight": np.ones(8),
        f"{unet}norm.bias": np.zeros(8),
        f"{unet}gone.weight": rng.standard_normal((4, 4)),
        f"{unet}other.weight": rng.standard_normal((4, 4)),
        f"{unet}quantised.weight": np.ones((4, 4), np.int8),
        "steps": np.array(7),
    }
    tuned = {name: value.copy() for name, value in base.items()}
    tuned[f"{unet}a.weight"] += rng.standard_normal((21, 2)) @ rng.standard_normal((2, 30))
    change = rng.standard_normal((18, 2)) @ rng.standard_normal((2, 72))
    tuned[f"{unet}b.conv.weight"] += change.reshape(18, 12, 3, 2)
    tuned[f"{unet}a.bias"] += 1
    tuned[f"{unet}norm.weight"] *= 1.5
    tuned[f"{unet}norm.bias"] += 0.25
    tuned[f"{unet}quantised.weight"] *= 2
    del tuned[f"{unet}gone.weight"]
    tuned[f"{unet}other.weight"] = np.ones((4, 5))
    tuned[f"{unet}new.weight"] = np.ones((2, 2))
    write("base.safetensors", base)
    write("tuned.safetensors", tuned)
    return base, tuned


def extracted(form, **more):
    report = extract_files("base.safetensors", "tuned.safetensors", "out.safetensors", form, **more)
    return report, {one.layer.rpartition("model.")[2]: one for one in report.layers}


def test_files(here):
    base, tuned = here
    seen = []
    report, layers = extracted(
        Form("locon", RankRule("rank", 2)),
        dtype=np.dtype(np.float32),
        progress=lambda *at: seen.append(at),
    )
    assert set(layers) == {"a", "b.conv", "norm"} and seen[-1] == (4, 4)
    assert all(one.error < 1e-6 for one in layers.values())
    assert [one.form for one in report.layers] == ["locon rank 2", "locon rank 2", "norm"]
    assert report.error < 1e-6 and layers["a"].size > 1
    left = {name.rpartition("model.")[2]: why for name, why in report.left_out}
    assert layers["a"].notes == ("with its bias",) and "a.bias" not in left
    assert (
        left["gone.weight"] == "only in the base" and left["new.weight"] == "only in the tuned one"
    )
    assert left["other.weight"] == "has shape (4, 5), in the base (4, 4)"
    assert left["quantised.weight"] == "differs, and is I8, not a float"
    merge_files("base.safetensors", [("out.safetensors", 1.0)], "again.safetensors")
    with open_file("again.safetensors") as file:
        for name in ("a.weight", "a.bias", "b.conv.weight", "norm.weight", "norm.bias"):
            name = f"model.diffusion_model.{name}"
            assert np.allclose(file[name], tuned[name], atol=1e-5)
    with open_file("out.safetensors") as file:
        assert json.loads(file.metadata["lycoris_cupy.extracted"])["form"] == "locon"


@pytest.mark.parametrize("form", ["locon", "tucker"])
@pytest.mark.parametrize("shape", [LINEAR, CONV], ids=["linear", "conv"])
def test_a_sparse_residual_keeps_the_largest_entries(device, form, shape):
    change = normal(shape.taps, shape.inputs, shape.outputs)
    rule = RankRule("rank", 3)
    plain, factors = extract(shape, on(device, change), Form(form, rule))
    sparse, more = extract(shape, on(device, change), Form(form, rule, sparsity=0.9))
    assert type(sparse) is SparseLoCon and sparse.tucker == plain.tucker
    rest = change - dense(plain, factors).reshape(change.shape)
    limit = np.quantile(np.abs(rest), 0.9)
    expected = np.where(np.abs(rest) >= limit, rest, 0).reshape(more["residual"].shape)
    assert np.allclose(more["residual"], expected, atol=1e-4)
    assert (more["residual"] != 0).mean() == pytest.approx(0.1, abs=0.01)
    both = [
        relative(dense(a, p).reshape(change.shape), change)
        for a, p in ((plain, factors), (sparse, more))
    ]
    assert both[1] < 0.9 * both[0]


def test_sparse_files(here):
    report, layers = extracted(
        Form("locon", RankRule("rank", 1), sparsity=0.95), dtype=np.dtype(np.float32)
    )
    shapes = {"a": LINEAR, "b.conv": CONV, "norm": NormShape.of_channels(8)}
    shapes = {f"model.diffusion_model.{name}": shape for name, shape in shapes.items()}
    loaded, _ = read_adapter("out.safetensors", shapes)
    adapter, params = loaded["model.diffusion_model.b.conv"]
    assert type(adapter) is SparseLoCon
    change = (
        (here[1][f"{UNET}b.conv.weight"] - here[0][f"{UNET}b.conv.weight"]).reshape(18, 12, 6).T
    )
    got = dense(adapter, {n: v.astype(np.float64) for n, v in params.items()})
    assert relative(got.reshape(change.shape), change) == pytest.approx(
        layers["b.conv"].error, rel=1e-4
    )
    with open_file("out.safetensors") as file:
        name = "lycoris_b_conv.bias_"
        assert file.dtype(f"{name}indices") == "I32" and file[f"{name}size"].tolist() == [18, 72]
        rows, columns = file[f"{name}indices"]
        matrix = np.zeros((18, 72))
        matrix[rows, columns] = file[f"{name}values"]
        residual = params["residual"].reshape(6, 12, 18).transpose(2, 1, 0).reshape(18, 72)
        assert (matrix == residual).all() and rows.size == pytest.approx(0.05 * 18 * 72, abs=2)
        tensors = {key: file[key] for key in file}
    merge_files("base.safetensors", [("out.safetensors", 1.0)], "again.safetensors")
    with open_file("again.safetensors") as file:
        after = file[f"{UNET}b.conv.weight"] - here[0][f"{UNET}b.conv.weight"]
    assert np.allclose(
        after.reshape(18, 72), got.reshape(6, 12, 18).transpose(2, 1, 0).reshape(18, 72), atol=1e-5
    )
    # Places that the reference's int16 lost, and places that are none.
    for change, match in (
        ({"indices": tensors[f"{name}indices"] * 9}, "names the place .* expected one within"),
        (
            {"indices": np.ones((2, 3), np.int32)},
            r"bias_indices has shape \(2, 3\) and bias_values",
        ),
        (
            {"indices": tensors[f"{name}indices"].astype(np.float32)},
            "bias_indices is float32, expec",
        ),
    ):
        broken = tensors | {f"{name}{key}": value for key, value in change.items()}
        write("broken.safetensors", broken)
        with pytest.raises((ShapeError, DtypeError), match=match):
            read_adapter("broken.safetensors", shapes)
    del tensors[f"{name}size"]
    write("broken.safetensors", tensors)
    with pytest.raises(
        FileFormatError, match="a sparse residual bias_size is missing beside locon"
    ):
        read_adapter("broken.safetensors", shapes)


def test_indices_that_ran_over_int16():
    """40000 columns: the reference wrote -25536."""
    shape = LayerShape(Window(), 40000, 2)
    tensors = {
        "bias_indices": np.array([[0, 1], [-25536 + 1, 3]], np.int16),
        "bias_values": np.array([5.0, 7.0], np.float32),
    }
    tensors["bias_indices"][1, 0] = np.array(39999).astype(np.int16)
    found = sparse_dense(tensors, shape)
    assert found[39999, 0] == 5 and found[3, 1] == 7 and found.sum() == 12


def test_full_takes_the_bias_too(here):
    report, _ = extracted(Form("full"), dtype=np.dtype(np.float32))
    assert "model.diffusion_model.a.bias" not in dict(report.left_out)
    merge_files("base.safetensors", [("out.safetensors", 1.0)], "again.safetensors")
    with open_file("again.safetensors") as file:
        assert np.allclose(
            file["model.diffusion_model.a.bias"], here[1]["model.diffusion_model.a.bias"]
        )


@pytest.mark.parametrize("form", ["tucker", "lokr"])
def test_other_forms(here, form):
    rule = RankRule("rank", 3) if form == "tucker" else None
    report, layers = extracted(Form(form, rule, factor=3))
    expected = {
        "tucker": ["locon rank 3", "locon rank 3 tucker", "norm"],
        "lokr": ["lokr", "lokr", "norm"],
    }[form]
    assert [one.form for one in report.layers] == expected
    shapes = {"a": LINEAR, "b.conv": CONV, "norm": NormShape.of_channels(8)}
    shapes = {f"model.diffusion_model.{name}": shape for name, shape in shapes.items()}
    loaded, _ = read_adapter("out.safetensors", shapes)
    assert {adapter.algorithm for adapter, _ in loaded.values()} == {expected[0].split()[0], "norm"}
    assert 0 < layers["b.conv"].error < 1


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3"])
def test_narrow_bases(tmp_path, dtype):
    """What was added before rounding comes back within the rounding."""
    weight, change = normal(60, 50), normal(60, 2) @ normal(2, 50, seed=1)
    kind = NUMPY[dtype]
    write(tmp_path / "a.safetensors", {"l.weight": weight.astype(kind)})
    write(
        tmp_path / "b.safetensors",
        {"l.weight": (weight.astype(kind).astype(float) + change).astype(kind)},
    )
    report = extract_files(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "o.safetensors",
        Form("locon", RankRule("rank", 2)),
    )  # fmt: skip
    adapter, params = read_adapter(tmp_path / "o.safetensors", {"l": LayerShape(Window(), 50, 60)})[
        0
    ]["l"]
    got = dense(adapter, {n: v.astype(np.float64) for n, v in params.items()})
    assert relative(got, change.T) < {"BF16": 5e-3, "F16": 2e-3, "F8_E4M3": 0.1}[dtype]
    assert report.layers[0].error < 0.15


def test_shards_names_and_exclusions(here, tmp_path):
    merge_files("base.safetensors", [], "base", shard_size=2000)
    form = Form("locon", RankRule("rank", 1), RankRule("rank", 3))
    report = extract_files(
        "base", "tuned.safetensors", "out.safetensors", form, to="kohya", exclude=("*.a", "*norm")
    )
    assert [one.form for one in report.layers] == ["locon rank 3"]
    assert not any("norm" in name for name, _ in report.left_out)
    with open_file("out.safetensors") as file:
        assert set(file) == {
            f"lora_unet_b_conv.{k}" for k in ("lora_down.weight", "lora_up.weight", "alpha")
        }
        assert file.dtype("lora_unet_b_conv.lora_up.weight") == "F16"


def test_what_is_refused(here):
    form = Form("locon", RankRule("rank", 1))
    write("same.safetensors", here[1])
    with pytest.raises(MatchError, match="none of its 6 layers differs from those of tuned.safet"):
        extract_files("tuned.safetensors", "same.safetensors", "out.safetensors", form)
    with pytest.raises(MatchError, match="none of its 2 layers differs"):
        extracted(form, tolerance=10.0, exclude=("*norm", "*.a"))
    write("x.safetensors", {"y.weight": np.ones((2, 2))})
    with pytest.raises(
        MatchError, match="x.safetensors: shares no layer with base.safetensors, by"
    ):
        extract_files("base.safetensors", "x.safetensors", "out.safetensors", form)
    with pytest.raises(FileFormatError, match="diffusers has no alpha: extract first, and convert"):
        extracted(form, to="diffusers")
    here[1]["model.diffusion_model.a.weight"][0, 0] = np.nan
    write("tuned.safetensors", here[1])
    with pytest.raises(
        FileFormatError, match="a.weight' differs by values that are NaN or infinite"
    ):
        extracted(form)


def test_the_command(here, capsys):
    command = ["extract", "base.safetensors", "tuned.safetensors", "out.safetensors"]
    assert cli.main([*command, "--error", "0.01", "--max-rank", "8"]) == 0
    said = capsys.readouterr().out
    assert "locon rank 2" in said and "left out: model.diffusion_model.gone.weight: only in" in said
    assert "wrote out.safetensors: 3 layers, 4 left out" in said
    assert cli.main([*command, "--rank", "1", "--conv", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [one["form"] for one in report["layers"]] == ["locon rank 1", "locon rank 2", "norm"]
    assert cli.main([*command]) == 2
    assert "form 'locon' needs a rule for the rank" in capsys.readouterr().err
    assert cli.main([*command, "--form", "lokr", "--factor", "3", "--conv", "2"]) == 2
    assert "--conv and --max-rank go with one of --rank, --threshold" in capsys.readouterr().err


def test_on_a_device(here, device):
    form = Form("locon", RankRule("rank", 2))
    report, _ = extracted(form, device=device, dtype=np.dtype(np.float32))
    assert all(one.error < 1e-4 for one in report.layers)
