"""Adapter files: each rule has its error, what is written is read back bit for bit, and the peer's
files load.
"""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from lycoris_cupy import ALGORITHMS, Full, LayerShape, LoCon, LoHa, LoKr, bf16
from lycoris_cupy.errors import DtypeError, FileFormatError, LycorisError, MatchError, ShapeError
from lycoris_cupy.io.adapter_file import inspect_adapter, read_adapter, write_adapter
from lycoris_cupy.io.safetensors import NUMPY, Stored, open_file, write
from lycoris_cupy.ops.window import Window
from tests.cases import PAIRS, PEER, PEER_CASES, adapters_for

BUILT = [n for n, c in PEER_CASES.items() if (PEER / "adapter" / f"{n}.safetensors").exists()]
RNG = np.random.default_rng(7)


def random(*shape, dtype=np.float32):
    return RNG.standard_normal(shape).astype(dtype)


def lora(module, out=8, inputs=6, rank=2, alpha=1.0, dtype=np.float32):
    tensors = {
        f"{module}.lora_up.weight": random(out, rank, dtype=dtype),
        f"{module}.lora_down.weight": random(rank, inputs, dtype=dtype),
    }
    return tensors if alpha is None else tensors | {f"{module}.alpha": np.array(alpha, np.float32)}


SHAPES = {
    "block.a": LayerShape.of_file((8, 6)),
    "block.b": LayerShape.of_file((8, 6, 3, 3)),
    "c": LayerShape.of_file((5, 8)),
}


def read(folder, tensors, shapes=SHAPES, **options):
    path = folder / "style.safetensors"
    write(path, tensors)
    return read_adapter(path, shapes, **options)


# -- what loads
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["lycoris_", "lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_"]
)
def test_a_module_lands_on_its_layer(tmp_path, prefix):
    tensors = lora(f"{prefix}block_a", alpha=4.0)
    found, report = read(tmp_path, tensors)
    adapter, p = found["block.a"]
    assert adapter == LoCon(SHAPES["block.a"], 2, 4.0)
    assert (p["down"] == tensors[f"{prefix}block_a.lora_down.weight"].T).all()
    assert (p["up"] == tensors[f"{prefix}block_a.lora_up.weight"].T).all()
    (layer,) = report.layers
    assert (layer.module, layer.layer, layer.algorithm, layer.rank) == (
        f"{prefix}block_a",
        "block.a",
        "locon",
        2,
    )
    assert (layer.alpha, layer.scale, layer.scale_from) == (4.0, 2.0, "alpha / rank = 4 / 2")
    assert (layer.dtype, layer.parameters, report.coverage, report.base_layers) == (
        "F32",
        28,
        1.0,
        3,
    )


@pytest.mark.parametrize(
    "dtype, rounded", [("BF16", ""), ("F16", "f32 no"), ("F32", "bf16"), ("F64", "bf16 f32")]
)
def test_factors_keep_the_dtype_of_the_file(tmp_path, dtype, rounded):
    tensors = lora("lycoris_c", 5, 8, dtype=NUMPY[dtype])
    found, report = read(tmp_path, tensors)
    assert {p.dtype for p in found["c"][1].values()} == {NUMPY[dtype]} and report.layers[
        0
    ].dtype == dtype
    to_bf16, to_f32 = (
        read(tmp_path, tensors, dtype=np.dtype(kind))[1].layers[0].rounded
        for kind in (bf16, np.float32)
    )
    assert to_bf16 == (dtype != "BF16") and to_f32 == (dtype == "F64")


@pytest.mark.parametrize(
    "dtype",
    [
        np.float32,
        np.float64,
        np.float16,
        bf16,
        np.int64,
        np.uint8,
        NUMPY["F8_E4M3"],
        NUMPY["F8_E5M2"],
    ],
)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_alpha_of_any_number_type(tmp_path, dtype, shape):
    tensors = lora("lycoris_c", 5, 8, rank=8) | {"lycoris_c.alpha": np.full(shape, 4).astype(dtype)}
    assert read(tmp_path, tensors)[1].layers[0].scale == 0.5


@pytest.mark.parametrize(
    "alpha, scale, why",
    [
        (None, 1, "no alpha in the file: scale 1"),
        (0.0, 1, "alpha 0 is read as rank: scale 1"),
        (-3.0, -1.5, "alpha / rank = -3 / 2"),
    ],
)
def test_where_the_scale_comes_from(tmp_path, alpha, scale, why):
    (layer,) = read(tmp_path, lora("lycoris_c", 5, 8, alpha=alpha))[1].layers
    assert layer.scale == scale and layer.scale_from == why


@pytest.mark.parametrize("alpha", [1e10, math.inf, math.nan])
def test_a_full_lokr_ignores_alpha(tmp_path, alpha):
    tensors = {
        "lycoris_c.lokr_w1": random(1, 2),
        "lycoris_c.lokr_w2": random(5, 4),
        "lycoris_c.alpha": np.array(alpha),
    }
    found, report = read(tmp_path, tensors)
    (layer,) = report.layers
    assert found["c"][0].scale == layer.scale == 1 and layer.rank is None
    assert layer.scale_from == "both sides full: scale 1 whatever alpha says"
    json.dumps(report.as_dict(), allow_nan=False)
    write_adapter(tmp_path / "again.safetensors", found)
    assert read_adapter(tmp_path / "again.safetensors", SHAPES)[1].layers[0].scale == 1


def test_rank_zero_changes_nothing(tmp_path):
    (layer,) = read(tmp_path, lora("lycoris_c", 5, 8, rank=0))[1].layers
    assert (layer.scale, layer.scale_from, layer.rank) == (0, "rank 0: scale 0", 0)


def test_full(tmp_path):
    tensors = {"lycoris_block_b.diff": random(8, 6, 3, 3), "lycoris_block_b.diff_b": random(8)}
    found, report = read(tmp_path, tensors)
    adapter, p = found["block.b"]
    assert (
        adapter.bias
        and p["diff"].shape == (3, 3, 6, 8)
        and (p["diff_b"] == tensors["lycoris_block_b.diff_b"]).all()
    )
    assert (
        report.layers[0].scale_from == "full has no alpha: scale 1"
        and report.layers[0].rank is None
    )


def test_an_open_file_stays_open(tmp_path):
    write(tmp_path / "a.safetensors", lora("lycoris_c", 5, 8))
    with open_file(tmp_path / "a.safetensors") as file:
        read_adapter(file, SHAPES)
        assert inspect_adapter(file).coverage == 1
        assert file["lycoris_c.alpha"] == 1


# -- what is refused
# ----------------------------------------------------------------------------------------------

A = "lycoris_block_a"
UP, DOWN = f"{A}.lora_up.weight", f"{A}.lora_down.weight"


def with_value(key, value, base=None):
    tensors = lora(A) if base is None else dict(base)
    tensors[key] = tensors[key].copy()
    tensors[key].flat[3] = value
    return tensors


KRON = {
    f"{A}.lokr_w1": random(2, 3),
    f"{A}.lokr_w2_a": random(4, 2),
    f"{A}.lokr_w2_b": random(2, 2),
}
REFUSED = {
    "dora": (
        lora(A) | {f"{A}.dora_scale": random(5, 1)},
        ShapeError,
        r"dora_scale has shape \(5, 1\), expected \(8, 1\) per output or \(1, 6\) per input",
    ),
    "dora on full": (
        {f"{A}.diff": random(8, 6), f"{A}.dora_scale": random(8, 1)},
        FileFormatError,
        "dora_scale stands beside full, expected one of locon, loha, lokr",
    ),
    "dora alone": ({f"{A}.dora_scale": random(8, 1)}, FileFormatError, "no factors beside alpha"),
    "oft axes": ({f"{A}.oft_blocks": random(2, 4)}, ShapeError, r"oft_blocks has shape \(2, 4\), expected \(blocks, B, B"),
    "oft count": ({f"{A}.oft_blocks": random(3, 4, 4)}, ShapeError, r"shape \(3, 4, 4\), expected \(2, 4, 4\)"),
    "oft size": (
        {f"{A}.oft_blocks": random(2, 3, 3)},
        ShapeError,
        r"block size 3 does not divide the 8 outputs of Linear\(6 -> 8\): use one of 2, 4, 8",
    ),
    "oft constraint": (
        {f"{A}.oft_blocks": random(2, 4, 4), f"{A}.alpha": np.array(-1.0)},
        FileFormatError,
        "constraint is -1.0, expected 0 or more",
    ),
    "rescale alone": ({f"{A}.rescale": random(8, 1)}, FileFormatError, "oft_blocks is missing beside rescale"),
    "boft stages": ({f"{A}.oft_blocks": random(1, 2, 4, 4)}, ShapeError, r"expected \(2, 2, 4, 4\)"),
    "boft size": ({f"{A}.oft_blocks": random(1, 8, 1, 1)}, ShapeError, "8 blocks of 1: boft needs a power of two"),
    "ia3 flag": (
        {f"{A}.on_input": np.array(2), f"{A}.weight": random(6)},
        FileFormatError,
        "on_input is 2, expected 0 or 1",
    ),
    "ia3 flags": ({f"{A}.on_input": np.ones(2), f"{A}.weight": random(6)}, ShapeError, "on_input has shape"),
    "ia3 alone": ({f"{A}.on_input": np.array(1)}, FileFormatError, "weight is missing beside on_input"),
    "ia3 size": (
        {f"{A}.on_input": np.array(1), f"{A}.weight": random(8)},
        ShapeError,
        r"weight has shape \(8,\), expected \(6,\)",
    ),
    "norm": ({f"{A}.w_norm": random(8)}, ShapeError, r"norm does not sit on Linear\(6 -> 8\)"),
    "glora": ({f"{A}.a1.weight": random(6, 2)}, FileFormatError, "a2.weight is missing beside a1.weight"),
    "glora core": ({f"{A}.bm.weight": random(2, 2)}, FileFormatError, "bm.weight is a Tucker core of GLoRA"),
    "tlora": ({f"{A}.lambda_layer": random(1, 2)}, FileFormatError, "q_layer.weight is missing beside lambda_layer"),
    "scalar": (lora(A) | {f"{A}.scalar": random()}, FileFormatError, "scalar is a trained scalar that was not folded"),
    "half of PEFT's": ({f"{A}.lora_A.weight": random(2, 6)}, FileFormatError, "lora_up.weight is missing beside lora_down"),
    "embedding": ({f"{A}.lora_embedding_A": random(2, 6)}, FileFormatError, "lora_embedding_A is a LoRA of an embedding"),
    "replacement": (lora(A) | {f"{A}.set_weight": random(8)}, FileFormatError, "set_weight is a tensor that replaces"),
    "several": (
        lora(A) | {f"{A}.hada_w1_a": random(8, 2)},
        FileFormatError,
        r"several algorithms, expected one: locon \(lora_down.weight, lora_up.weight\); loha \(hada_w1_a\)",
    ),
    "bias of a lora": (lora(A) | {f"{A}.diff_b": random(7)}, ShapeError, r"diff_b has shape \(7,\), expected \(8,\)"),
    "bias of a rotation": ({f"{A}.oft_blocks": random(2, 4, 4), f"{A}.alpha": random(), f"{A}.diff_b": random(8)}, FileFormatError, "diff_b stands beside diag-oft, which it does not change"),
    "unknown": (lora(A) | {f"{A}.lora_middle": random(2)}, FileFormatError, "unknown key 'lora_middle', expected"),
    "unknown alone": ({f"{A}.what": random(2)}, FileFormatError, "unknown key 'what', expected keys among"),
    "alpha alone": ({f"{A}.alpha": random()}, FileFormatError, "no factors beside alpha, expected keys among"),
    "no up": ({DOWN: random(2, 6)}, FileFormatError, "lora_up.weight is missing beside lora_down.weight"),
    "no w1_b": ({f"{A}.lokr_w1_a": random(2, 1), f"{A}.lokr_w2": random(4, 2)}, FileFormatError, "lokr_w1_b is mis"),
    "no w2": ({f"{A}.lokr_w1": random(2, 3)}, FileFormatError, "lokr_w2_a is missing beside lokr_w1"),
    "w1 twice": (KRON | {f"{A}.lokr_w1_a": random(2, 1)}, FileFormatError, "lokr_w1_a has no place beside lokr_w1"),
    "one core": (
        {f"{A}.hada_{k}": random(2, 2) for k in ("w1_a", "w1_b", "w2_a", "w2_b", "t1")},
        FileFormatError,
        "hada_t1 and hada_t2 come together",
    ),
    "bias alone": ({f"{A}.diff_b": random(8)}, FileFormatError, "diff is missing beside diff_b"),
    "inputs": (lora(A, inputs=7), ShapeError, r"has shape \(2, 7\), expected \(2, 6\) on Linear\(6 -> 8\)"),
    "ranks": ({UP: random(8, 3), DOWN: random(2, 6)}, ShapeError, r"lora_down.weight has shape \(2, 6\), exp"),
    "one axis": ({UP: random(8, 2), DOWN: random(12)}, ShapeError, "expected at least two axes"),
    "blocks": (KRON | {f"{A}.lokr_w1": random(2, 2)}, ShapeError, r"expected \(8, 6\) on Linear\(6 -> 8\)"),
    "diff": ({f"{A}.diff": random(6, 8)}, ShapeError, r"diff has shape \(6, 8\), expected \(8, 6\)"),
    "integers": (lora(A) | {UP: np.ones((8, 2), np.int8)}, DtypeError, "has dtype I8, expected one of BF16, F16"),
    "booleans": (lora(A) | {UP: np.ones((8, 2), bool)}, DtypeError, "lora_up.weight has dtype BOOL"),
    "fp8": (lora(A) | {UP: np.ones((8, 2), NUMPY["F8_E4M3"])}, DtypeError, "lora_up.weight has dtype F8_E4M3"),
    "packed": (lora(A) | {UP: Stored("F4", (8, 2), lambda: np.zeros(8, np.uint8))}, DtypeError, "has dtype F4, "),
    "NaN": (with_value(UP, math.nan), FileFormatError, "lora_up.weight has 1 values of 16 that are NaN or infinite"),
    "inf": (with_value(DOWN, -math.inf, lora(A, dtype=bf16)), FileFormatError, "lora_down.weight has 1 values of 12"),
    "alpha NaN": (lora(A, alpha=math.nan), FileFormatError, "alpha is nan, expected a finite number"),
    "alpha inf": (lora(A, alpha=math.inf), FileFormatError, "alpha is inf, expected a finite number"),
    "alpha NaN, rank 0": (lora(A, rank=0, alpha=math.nan), FileFormatError, "alpha is nan, expected a finite number"),
    "alpha NaN, full": ({f"{A}.diff": random(8, 6), f"{A}.alpha": np.array(math.nan)}, FileFormatError, "alpha is nan"),
    "alpha NaN, half a lokr": (KRON | {f"{A}.alpha": np.array(math.nan)}, FileFormatError, "alpha is nan"),
    "alpha of two": (lora(A) | {f"{A}.alpha": random(2)}, ShapeError, r"alpha has shape \(2,\), expected one number"),
    "alpha bool": (lora(A) | {f"{A}.alpha": np.array(True)}, DtypeError, "alpha has dtype BOOL, expected a float"),
    "alpha huge": (lora(A) | {f"{A}.alpha": np.array(1e300)}, FileFormatError, r"1e\+300 / 2 is more than f32 holds"),
}  # fmt: skip


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("what", REFUSED)
def test_each_rule_has_its_error(tmp_path, what, strict):
    """Strict or not, a module that is not understood is never left out. The error names file,
    module, layer.
    """
    tensors, kind, match = REFUSED[what]
    where = rf"style\.safetensors: module '{A}' on layer 'block\.a': .*"
    with pytest.raises(kind, match=where + match):
        read(tmp_path, tensors | lora("lycoris_c", 5, 8), strict=strict)


# What only a base can contradict.
NEEDS_A_BASE = ("diff", "inputs", "blocks", "norm", "ia3 size", "oft count", "oft size")


@pytest.mark.parametrize("what", [w for w in REFUSED if w not in NEEDS_A_BASE])
def test_inspect_lists_what_is_refused(tmp_path, what):
    tensors, _, match = REFUSED[what]
    write(tmp_path / "a.safetensors", tensors | lora("lycoris_c", 5, 8))
    report = inspect_adapter(tmp_path / "a.safetensors")
    assert len(report.layers) == len(report.unmatched) == 1 and report.coverage == 0.5
    (entry,) = report.unmatched
    assert entry.name == A
    with pytest.raises(FileFormatError, match=match.split(" on Linear")[0]):
        raise FileFormatError(entry.reason)


def test_a_file_that_matches_nothing(tmp_path):
    tensors = lora("lora_unet_block_aa") | {"a.processor.q_lora1.up.weight": random(2, 6)}
    for strict in (True, False):
        with pytest.raises(
            MatchError, match="nothing in the file matches any of the 3 layers"
        ) as caught:
            read(tmp_path, tensors, strict=strict)
        assert "lora_unet_block_aa: no layer has this name; nearest layer: 'block.a'" in str(
            caught.value
        )
        assert "a.processor.q_lora1.up.weight: is named as by x-labs, which" in str(caught.value)
    with pytest.raises(MatchError, match="nothing in the file"):
        read(tmp_path, {}, strict=False)


def test_a_partial_match(tmp_path):
    tensors = lora(A) | lora("lycoris_block_aa") | {"loose": random()}
    with pytest.raises(
        MatchError,
        match=r"(?s)2 of 3 modules match no layer.*block_aa.*strict=False loads the others",
    ):
        read(tmp_path, tensors)
    found, report = read(tmp_path, tensors, strict=False)
    assert list(found) == ["block.a"] and [u.name for u in report.unmatched] == [
        "loose",
        "lycoris_block_aa",
    ]
    assert report.coverage == pytest.approx(1 / 3)
    assert "1 of 3 modules read (1 locon), on 1 of 3 layers" in report.text()
    assert "lycoris_block_aa: no layer has this name; nearest layer: 'block.a'" in str(report)


def test_a_long_list_is_cut_in_the_error(tmp_path):
    tensors = {f"loose{i}": random() for i in range(30)}
    with pytest.raises(MatchError, match="and 10 more"):
        read(tmp_path, tensors)


def test_two_modules_of_one_layer(tmp_path):
    with pytest.raises(
        MatchError,
        match=f"duplicate layer after name folding: modules 'lora_unet_block_a' and '{A}' both mean",
    ):
        read(tmp_path, lora(A) | lora("lora_unet_block_a"), strict=False)


def test_two_layers_of_one_module(tmp_path):
    shapes = {"block.a": SHAPES["block.a"], "block_a": SHAPES["block.a"]}
    with pytest.raises(
        MatchError,
        match=r"style.safetensors: module 'lycoris_block_a' could mean any of 'block.a', 'block_a'",
    ):
        read(tmp_path, lora(A), shapes, strict=False)


@given(st.data())
def test_any_tensors_under_known_keys_load_or_are_refused(tmp_path_factory, data):
    keys = sorted(
        {key for kind in ALGORITHMS.values() for key in kind.keys} | {"alpha", "dora_scale"}
    )
    kind = data.draw(st.sampled_from([kind.keys for kind in ALGORITHMS.values()] + [keys]))
    chosen = data.draw(st.sets(st.sampled_from(kind), min_size=1))
    extents = st.sampled_from([0, 1, 2, 2, 3, 4, 6, 8])
    shapes = {key: data.draw(st.lists(extents, max_size=5)) for key in sorted(chosen)}
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    write(path, {f"{A}.{key}": np.ones(shape, np.float32) for key, shape in shapes.items()})
    report = inspect_adapter(path)
    json.dumps(report.as_dict(), allow_nan=False)
    assert len(report.layers) + len(report.unmatched) == 1
    for shape in SHAPES.values():
        try:
            read_adapter(path, {"block.a": shape})
        except LycorisError as error:
            assert str(path) in str(error)


# -- writing
# --------------------------------------------------------------------------------------------------


def factors_of(adapter, rng, dtype=bf16):
    forms = {name: adapter.flame_shape(factor) for name, factor in adapter.factors().items()}
    return {name: rng.standard_normal(form).astype(dtype) for name, form in forms.items()}


def assert_round_trip(path, shape, adapter, params, **options):
    write_adapter(path, {"x.y": (adapter, params)}, **options)
    found, report = read_adapter(path, {"x.y": shape})
    again, loaded = found["x.y"]
    assert type(again) is type(adapter) and again.scale == pytest.approx(adapter.scale, rel=1e-7)
    assert again.factors() == adapter.factors() and loaded.keys() == params.keys()
    for name in params:
        assert loaded[name].dtype == params[name].dtype and loaded[name].shape == params[name].shape
        assert loaded[name].tobytes() == params[name].tobytes()
    assert report.parameters == sum(p.size for p in params.values())
    assert inspect_adapter(path).coverage == 1


@pytest.mark.parametrize("kind, name", PAIRS, ids=lambda v: getattr(v, "name", v))
def test_written_and_read_is_the_same(tmp_path, kind, name):
    # The file does not say the stride; the layer does.
    adapter = adapters_for(kind.shape)[name]
    assert_round_trip(tmp_path / "a.safetensors", kind.shape, adapter, factors_of(adapter, RNG))


@given(st.data())
def test_any_geometry_is_written_and_read_the_same(tmp_path_factory, data):
    size, kernel = st.integers(1, 12), st.lists(st.integers(1, 3), max_size=3)
    shape = LayerShape(Window.of(data.draw(kernel)), data.draw(size), data.draw(size))
    rank, alpha = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([None, 0.5, 3.0, -2.0]))
    flag = st.booleans()
    tucker = shape.taps > 1 and data.draw(flag)
    made = data.draw(
        st.sampled_from(
            [
                LoCon(shape, rank, alpha, tucker, mid_rank=data.draw(st.integers(1, 4)) if tucker else None),
                LoHa(shape, rank, alpha, tucker),
                LoKr.create(
                    shape, rank, alpha, factor=data.draw(st.integers(-1, 4)), tucker=data.draw(flag),
                    decompose_both=data.draw(flag), full_matrix=data.draw(flag),
                    unbalanced_factorization=data.draw(flag),
                ),
                Full(shape, bias=data.draw(flag)),
            ]
        )
    )  # fmt: skip
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    params = factors_of(
        made, rng, data.draw(st.sampled_from([bf16, np.float16, np.float32, np.float64]))
    )
    path = tmp_path_factory.getbasetemp() / "geometry.safetensors"
    assert_round_trip(
        path, shape, made, params, prefix=data.draw(st.sampled_from(["lycoris_", "lora_unet_"]))
    )


def test_what_a_written_file_says(tmp_path):
    path, shape = tmp_path / "a.safetensors", SHAPES["c"]
    locon, full = LoCon(shape, 2, 3.0), Full(shape)
    both = {"b.x": (locon, factors_of(locon, RNG)), "a": (full, factors_of(full, RNG))}
    extra = {"ss_output_name": "mine", "sshs_model_hash": "0xdead"}
    write_adapter(path, both, prefix="lora_unet_", dtype=np.float16, metadata=extra)
    with open_file(path) as file:
        forms = {key: (file.dtype(key), file.shape(key)) for key in file}
        assert forms == {
            "lora_unet_b_x.lora_up.weight": ("F16", (5, 2)),
            "lora_unet_b_x.lora_down.weight": ("F16", (2, 8)),
            "lora_unet_b_x.alpha": ("F32", ()),
            "lora_unet_a.diff": ("F16", (5, 8)),
        }
        assert file["lora_unet_b_x.alpha"] == 3
        assert json.loads(file.metadata["ss_network_args"]) == {"algo": "full+locon"}
        assert (
            file.metadata["ss_network_module"] == "lycoris.kohya"
            and file.metadata["ss_output_name"] == "mine"
        )
        assert "sshs_model_hash" not in file.metadata  # it was another file's


LOCON = LoCon(SHAPES["c"], 2)
GOOD = {"down": random(8, 2), "up": random(2, 5)}
NOT_WRITTEN = {
    "prefix": ({"a": (LOCON, GOOD)}, {"prefix": "mine_"}, MatchError, "prefix 'mine_' is none that a reader knows"),
    "nothing": ({}, {}, MatchError, "there is no adapter to write"),
    "twins": (
        {"a.b": (LOCON, GOOD), "a_b": (LOCON, GOOD)},
        {},
        MatchError,
        "layers 'a.b' and 'a_b' would both be saved as 'lycoris_a_b'",
    ),
    "missing": ({"a": (LOCON, {"up": GOOD["up"]})}, {}, ShapeError, "layer 'a': has the factors up, expected down, up"),
    "shape": (
        {"a": (LOCON, GOOD | {"up": random(5, 2)})},
        {},
        ShapeError,
        r"layer 'a': up has shape \(5, 2\), expected \(2, 5\) on Linear\(8 -> 5\)",
    ),
    "dtype": ({"a": (LOCON, GOOD)}, {"dtype": np.int8}, DtypeError, "lora_down.weight would be saved as int8"),
    "overflow": (
        {"a": (LOCON, GOOD | {"up": np.full((2, 5), 1e5, np.float32)})},
        {"dtype": np.float16},
        FileFormatError,
        "layer 'a': lora_up.weight has values that are more than float16 holds",
    ),
    "NaN": (
        {"a": (LOCON, GOOD | {"up": np.full((2, 5), np.nan)})},
        {},
        FileFormatError,
        "layer 'a': lora_up.weight has values that are NaN or infinite",
    ),
    "alpha": ({"a": (LoCon(SHAPES["c"], 2, 1e300), GOOD)}, {}, FileFormatError, "alpha has values that are more"),
}  # fmt: skip


@pytest.mark.parametrize("what", NOT_WRITTEN)
def test_what_is_not_written(tmp_path, what):
    adapters, options, kind, match = NOT_WRITTEN[what]
    with pytest.raises(kind, match=match):
        write_adapter(tmp_path / "a.safetensors", adapters, **options)
    assert list(tmp_path.iterdir()) == []


# -- the peer's files
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT)
def test_the_peers_files(tmp_path, name):
    """Each loads onto its layer, is inspected without one, and is saved again as it was."""
    path, case = PEER / "adapter" / f"{name}.safetensors", PEER_CASES[name]
    with open_file(PEER / "base" / f"{name}.safetensors") as base:
        shapes = {"block.layer": LayerShape.of_file(base.shape("block.layer.weight"))}
    found, report = read_adapter(path, shapes)
    (layer,), (alone,) = report.layers, inspect_adapter(path).layers
    dora = " with dora per " + ("input" if "dora_in" in name else "output")
    algorithm = case["algo"]
    if name.startswith("dylora") and "conv" not in name:
        algorithm = "locon"  # no key or shape tells them apart, and they compute the same
    title = algorithm + dora * ("dora_scale" in case["keys"])
    assert layer.algorithm == alone.algorithm == title
    assert (alone.rank, alone.scale) == (layer.rank, layer.scale)
    assert (alone.alpha, alone.scale_from, alone.parameters) == (
        layer.alpha,
        layer.scale_from,
        layer.parameters,
    )
    if "->" in alone.shape and "taps included" not in alone.shape:
        assert alone.shape == layer.shape
    write_adapter(tmp_path / "again.safetensors", found)
    saved, again = load_file(path), load_file(tmp_path / "again.safetensors")
    assert saved.keys() == again.keys() and set(case["keys"]) == {
        key.split(".", 1)[1] for key in again
    }
    for key, tensor in saved.items():
        if key.endswith(".alpha"):
            full = layer.rank is None  # then it only has to be a number
            assert again[key].dtype == np.float32 and (full or again[key] == tensor)
        elif key.endswith(".on_input"):
            assert again[key].dtype == np.int64 and again[key] == tensor
        else:
            assert (again[key].dtype, again[key].shape) == (tensor.dtype, tensor.shape)
            assert again[key].tobytes() == tensor.tobytes()


def test_the_peers_files_are_all_there():
    built = {name for name, case in PEER_CASES.items() if case["algo"] in ALGORITHMS}
    assert built == set(BUILT) and len(built) == 177
