"""Conversion: every pair of dialects there and back, plain LoRA from every algorithm, and what is
refused.
"""

import json
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lycoris_cupy import LayerShape, LoCon, LoHa, LoKr, bf16
from lycoris_cupy.adapters import Adapter
from lycoris_cupy.errors import FileFormatError, MatchError, ShapeError
from lycoris_cupy.io.adapter_file import inspect_adapter, read_adapter, write_adapter
from lycoris_cupy.io.convert import convert_file
from lycoris_cupy.io.dialects import DIALECTS
from lycoris_cupy.io.peft_config import peft_config
from lycoris_cupy.io.safetensors import open_file, write
from lycoris_cupy.io.target import Name, magnitude, module_names
from tests.cases import PEER, PEER_CASES, adapters_for
from tests.test_spectrum import dense, random_params

LAYERS = {
    "unet.blocks.0.attn_1.to_q": (8, 12),
    "unet.blocks.0.conv": (6, 4, 3, 3),
    "unet.blocks.10.proj_in": (6, 4, 1, 1),
}
SHAPES = {name: LayerShape.of_file(shape) for name, shape in LAYERS.items()}


def base(folder):
    path = folder / "model.safetensors"
    write(path, {f"{name}.weight": np.ones(shape, np.float32) for name, shape in LAYERS.items()})
    return path


def changes(path, shapes=SHAPES):
    found, _ = read_adapter(path, shapes)
    return {
        layer: dense(a, {n: v.astype(np.float64) for n, v in p.items()})
        for layer, (a, p) in found.items()
    }


def assert_same(old, new, bound=1e-6):
    assert old.keys() == new.keys()
    for layer in old:
        assert np.linalg.norm(old[layer] - new[layer]) <= bound * np.linalg.norm(old[layer]), layer


def place_for(folder, name, dialect):
    return folder / (name if dialect == "peft" else f"{name}.safetensors")


@st.composite
def adapters(draw, algorithms):
    out = {}
    kind = draw(st.sampled_from(algorithms or ("locon", "loha", "lokr", "full", "locon tucker")))
    for name, shape in SHAPES.items():
        table = {
            k: a
            for k, a in adapters_for(shape).items()
            if k.startswith(kind) and "per tap" not in k
        }
        if algorithms:  # PEFT builds all modules by one set of options
            table = {"locon": LoCon(shape, 2, draw(st.sampled_from([1.0, 2.0, 3.0, -0.5]))),
                     "loha": LoHa(shape, 2, 3.0), "lokr": LoKr.create(shape, 1, 2.0, factor=2)}  # fmt: skip
            table = {kind: table[kind]}
        if not table:
            continue
        adapter = table[draw(st.sampled_from(sorted(table)))]
        dtype = draw(st.sampled_from([np.float32, bf16, np.float16]))
        params = random_params(adapter, draw(st.integers(0, 99)))
        out[name] = adapter, {n: v.astype(dtype) for n, v in params.items()}
    return out


# kohya's OFT says nothing that the others can.
SHARED = [name for name, one in DIALECTS.items() if one.algorithms != ("diag-oft",)]
PAIRS = [(a, b) for a in SHARED for b in SHARED]


@pytest.mark.parametrize("first, second", PAIRS, ids=[f"{a}-{b}" for a, b in PAIRS])
@settings(max_examples=2)
@given(data=st.data())
def test_there_and_back(tmp_path_factory, first, second, data):
    """What both dialects can say means the same on the base's layers, whichever way it went."""
    known = [DIALECTS[name].algorithms for name in (first, second)]
    both = [k for k in ("locon", "loha", "lokr") if all(own is None or k in own for own in known)]
    exact = all(own is None for own in known)
    given_ = data.draw(adapters(None if exact else both))
    folder = tmp_path_factory.mktemp("pair")
    model = base(folder)
    write_adapter(folder / "start.safetensors", given_)
    old = changes(folder / "start.safetensors")
    path, steps = folder / "start.safetensors", [first, second, first]
    for i, dialect in enumerate(steps):
        out = place_for(folder, f"step{i}", dialect)
        done = convert_file(path, out, dialect, base=model)
        assert done.loss <= 1e-6 and len(done.modules) == len(given_)
        assert_same(old, changes(out))
        assert dialect in inspect_adapter(out).dialects or (
            dialect == "comfyui" and inspect_adapter(out).dialects == ("bfl",)
        )
        path = out


@pytest.mark.parametrize(
    "dialect",
    [d for d, one in DIALECTS.items() if one.alpha == "tensor" and one.algorithms is None],
)
def test_factors_pass_bit_for_bit(tmp_path, dialect):
    """Renaming moves bytes, dtypes and alphas as they are, and keeps the metadata."""
    tensors = {
        "lora_unet_blocks_0_attn_1_to_q.lora_down.weight": np.ones((2, 12), bf16),
        "lora_unet_blocks_0_attn_1_to_q.lora_up.weight": np.full((8, 2), 0.3, np.float16),
        "lora_unet_blocks_0_attn_1_to_q.alpha": np.array(1.5, np.float16),
    }
    write(
        tmp_path / "a.safetensors",
        tensors,
        {
            "ss_tag": "x",
            "sshs_model_hash": "stale",
            "ss_network_dim": "2",
            "ss_network_alpha": "1.5",
        },
    )
    convert_file(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", dialect, base=base(tmp_path)
    )
    with open_file(tmp_path / "b.safetensors") as file:
        assert len(file) == 3
        words = {
            name: next(w for w in ("lora_down", "lora_up", "alpha") if w in name) for name in file
        }
        assert set(words.values()) == {"lora_down", "lora_up", "alpha"}
        for name, word in words.items():
            (old,) = [tensor for key, tensor in tensors.items() if word in key]
            assert file[name].dtype == old.dtype and (file[name] == old).all()
        meta = dict(file.metadata)
        assert json.loads(meta.pop("lycoris_cupy.converted")) == {"from": "kohya", "to": dialect}
        assert meta == {"ss_tag": "x", "ss_network_dim": "2", "ss_network_alpha": "1.5"}


# Those whose change stands in their factors alone, whatever the weight.
SUMS = [
    name
    for name, a in adapters_for(SHAPES["unet.blocks.0.conv"]).items()
    if type(a).svd is not Adapter.svd
]


@pytest.mark.parametrize("name", SUMS)
def test_every_algorithm_becomes_lora(tmp_path, name):
    given_ = {
        layer: (a := adapters_for(shape).get(name) or LoHa(shape, 2), random_params(a))
        for layer, shape in SHAPES.items()
    }
    write_adapter(tmp_path / "a.safetensors", given_, dtype=np.dtype(np.float32))
    old, model = changes(tmp_path / "a.safetensors"), base(tmp_path)
    done = convert_file(
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        "kohya",
        base=model,
        algorithm="lora",
    )
    assert done.loss < 1e-6 and {m.to_algorithm for m in done.modules} == {"locon"}
    found, _ = read_adapter(tmp_path / "b.safetensors", SHAPES)
    assert all(
        type(a) is LoCon and not a.tucker and not a.per_tap
        for a in (getattr(b, "on", b) for b, _ in found.values())
    )
    assert_same(old, changes(tmp_path / "b.safetensors"))
    for layer, (adapter, _) in found.items():
        if (
            type(given_[layer][0]) is not LoCon
            or given_[layer][0].tucker
            or given_[layer][0].per_tap
        ):
            assert adapter.rank == np.linalg.matrix_rank(old[layer], rtol=1e-6)


def test_a_rank_that_is_too_small(tmp_path):
    given_ = {
        layer: (LoHa(shape, 2, 3.0), random_params(LoHa(shape, 2, 3.0)))
        for layer, shape in SHAPES.items()
    }
    write_adapter(tmp_path / "a.safetensors", given_)
    old, options = (
        changes(tmp_path / "a.safetensors"),
        {"base": base(tmp_path), "algorithm": "lora", "rank": 3},
    )
    with pytest.raises(
        FileFormatError,
        match=r"a.safetensors: 3 of 3 modules would lose something; module 'lycoris_unet_blocks.*' loses 0\.\d+ of its change at rank 3 \(exact for all is 4\): --lossy accepts that",
    ):
        convert_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", **options)
    assert not (tmp_path / "b.safetensors").exists()
    done = convert_file(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", lossy=True, **options
    )
    new = changes(tmp_path / "b.safetensors")
    for module, layer in zip(done.modules, old, strict=True):
        values = np.linalg.svd(old[layer], compute_uv=False)
        best = np.linalg.norm(values[3:]) / np.linalg.norm(values)
        assert module.loss == pytest.approx(best, rel=1e-5)
        assert np.linalg.norm(new[layer] - old[layer]) / np.linalg.norm(
            old[layer]
        ) == pytest.approx(best, rel=1e-5)
    assert (
        "3 modules lose up to" in done.summary()
        and "loha rank 2 -> locon rank 3, loses" in done.text()
    )


@pytest.mark.parametrize("algorithm", ["locon", "loha", "lokr", "full"])
def test_a_narrower_dtype_is_a_loss(tmp_path, algorithm):
    given_ = {
        layer: (
            a := adapters_for(shape)[{"lokr": "lokr w1 w2ab"}.get(algorithm, algorithm)],
            random_params(a),
        )
        for layer, shape in SHAPES.items()
    }
    write_adapter(tmp_path / "a.safetensors", given_, dtype=np.dtype(np.float32))
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    with pytest.raises(FileFormatError, match="would lose something"):
        convert_file(*paths, "kohya", dtype=np.dtype(bf16), part="unet")
    done = convert_file(*paths, "kohya", dtype=np.dtype(bf16), lossy=True, base=base(tmp_path))
    old, new = changes(paths[0]), changes(paths[1])
    for module, layer in zip(done.modules, old, strict=True):
        off = np.linalg.norm(new[layer] - old[layer]) / np.linalg.norm(old[layer])
        assert 1e-4 < module.loss < 1e-2 and module.loss == pytest.approx(off, rel=1e-4)
    wide = tmp_path / "c.safetensors"
    assert convert_file(paths[1], wide, "kohya", dtype=np.dtype(np.float32)).loss == 0


@pytest.mark.parametrize("alpha, dtype", [(4.0, "BF16"), (1.0, "BF16"), (3.0, "F32"), (1.1, "F32")])
def test_a_scale_goes_into_a_factor(tmp_path, alpha, dtype):
    """In the factor's own dtype for powers of 2, else in f32, which mostly is exact too."""
    a = LoCon(SHAPES["unet.blocks.0.attn_1.to_q"], 2, alpha)
    params = {n: v.astype(bf16) for n, v in random_params(a).items()}
    write_adapter(tmp_path / "a.safetensors", {"unet.blocks.0.attn_1.to_q": (a, params)})
    done = convert_file(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", "bfl", base=base(tmp_path)
    )
    with open_file(tmp_path / "b.safetensors") as file:
        assert set(file) == {f"diffusion_model.blocks.0.attn_1.to_q.lora_{x}.weight" for x in "AB"}
        assert file.dtype("diffusion_model.blocks.0.attn_1.to_q.lora_B.weight") == dtype
        assert not {"ss_network_args", "ss_network_alpha"} & set(file.metadata)
    assert done.loss <= 1e-6 and (done.loss == 0) == (alpha != 1.1)
    assert_same(changes(tmp_path / "a.safetensors"), changes(tmp_path / "b.safetensors"))


D = 6
FUSED = {"double_blocks.0.img_attn.qkv": (3 * D, D), "double_blocks.0.img_attn.proj": (D, D)}
SPLIT = {f"transformer_blocks.0.attn.{n}": (D, D) for n in ("to_q", "to_k", "to_v", "to_out.0")}


def named(names):
    return {name: LayerShape.of_file(shape) for name, shape in names.items()}


def checkpoint(path, names):
    write(path, {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in names.items()})
    return path


@pytest.mark.parametrize("kind, needs", [("locon", None), ("loha", "lora"), ("full", "lora")])
def test_split_to_fused_and_back(tmp_path, kind, needs):
    """Flux of diffusers to the names of Black Forest Labs: q, k, v become one; and apart again."""
    given_ = {}
    for i, name in enumerate(SPLIT):
        adapter = adapters_for(LayerShape.of_file((D, D)))[kind]
        given_[name] = adapter, random_params(adapter, i)
    write_adapter(
        tmp_path / "a.safetensors", given_, dtype=np.dtype(np.float32), prefix="lora_unet_"
    )
    fused = checkpoint(tmp_path / "fused.safetensors", FUSED)
    split = checkpoint(tmp_path / "split.safetensors", SPLIT)
    paths = [tmp_path / f"{x}.safetensors" for x in "abc"]
    refused = pytest.raises(FileFormatError, match=rf"is one of several \({kind}\).*one plain LoRA")
    with refused if needs else nullcontext():
        convert_file(paths[0], paths[1], "kohya", base=fused)
    done = convert_file(paths[0], paths[1], "bfl", base=fused, algorithm=needs)
    assert {m.written for m in done.modules} == {f"diffusion_model.{n}" for n in FUSED}
    assert "several modules, fused" in done.text() and done.loss < 1e-6
    assert_same(changes(paths[0], named(FUSED)), changes(paths[1], named(FUSED)))
    back = convert_file(paths[1], paths[2], "diffusers", base=split)
    assert {m.written for m in back.modules} == {f"transformer.{n}" for n in SPLIT}
    assert_same(changes(paths[0], named(SPLIT)), changes(paths[2], named(SPLIT)))


def test_peft_patterns_and_scales(tmp_path):
    """Ranks and alphas that differ become patterns, which only their own modules match."""
    shape = LayerShape.of_file((8, 12))
    given_ = {"q": (2, 2.0), "net.q": (2, 3.0), "x.net.q": (4, 4.0), "other": (2, 2.0)}
    made = {n: (a := LoCon(shape, r, alpha), random_params(a)) for n, (r, alpha) in given_.items()}
    write_adapter(tmp_path / "a.safetensors", made)
    shapes = dict.fromkeys(given_, shape)
    model = checkpoint(tmp_path / "m.safetensors", dict.fromkeys(given_, (8, 12)))
    convert_file(tmp_path / "a.safetensors", tmp_path / "peft", "peft", base=model)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 2)
    assert (
        list(config["rank_pattern"]) == [r"x\.net\.q"] and config["alpha_pattern"][r"net\.q"] == 3
    )
    _, report = read_adapter(tmp_path / "peft", shapes)
    assert {layer.layer: layer.scale for layer in report.layers} == {
        n: alpha / r for n, (r, alpha) in given_.items()
    }
    assert_same(changes(tmp_path / "a.safetensors", shapes), changes(tmp_path / "peft", shapes))


def test_what_peft_cannot_build():
    shape, conv = LayerShape.of_file((8, 12)), LayerShape.of_file((8, 12, 3, 3))
    with pytest.raises(
        FileFormatError, match="PEFT keeps one algorithm a folder, and the file has locon, loha"
    ):
        peft_config({"a": LoCon(shape, 2), "b": LoHa(shape, 2)})
    with pytest.raises(FileFormatError, match="PEFT has cores for all convolutions or for none"):
        peft_config({"a": LoHa(conv, 2), "b": LoHa(conv, 2, tucker=True)})
    with pytest.raises(
        FileFormatError, match="one decompose_factor for all modules, and none gives"
    ):
        peft_config({"a": LoKr.create(shape, 1, factor=2), "b": LoKr.create(shape, 1, factor=4)})
    config = peft_config(
        {"a": LoKr.create(shape, 100, factor=2), "b": LoHa(shape, 2)}
        | {"b": LoKr.create(conv, 100, factor=2)}
    )
    assert config["decompose_factor"] == 2 and config["r"] == config["alpha"]


LORA = {
    "lora_down.weight": np.ones((2, 12), np.float32),
    "lora_up.weight": np.ones((8, 2), np.float32),
}
CONV = {"hada_w1_a": (6, 2), "hada_w1_b": (2, 36), "hada_w2_a": (6, 2), "hada_w2_b": (2, 36)}


def under(module, tensors):
    return {
        f"{module}.{k}": np.ones(v, np.float32) if isinstance(v, tuple) else v
        for k, v in tensors.items()
    }


Q = "lora_unet_blocks_0_attn_1_to_q"
REFUSED = {
    "no dots": (under(Q, LORA), "diffusers", {}, MatchError, f"module '{Q}' has underscores for dots, and diffusers writes dots: give the model"),
    "no part": (under("lycoris_x", LORA), "kohya", {}, MatchError, r"'.*' does not say which part of a model it is for, and kohya does: give it \(--part unet"),
    "no such part": (under("lora_te1_x", LORA), "bfl", {}, MatchError, r"bfl has no name for te1, of which '.*' is: leave it out \(--only\)"),
    "two parts": (under("unet.x", LORA) | under("text_encoder.x", LORA), "peft", {}, MatchError, "peft keeps one part of a model a folder, and the file has te1, unet"),
    "one name twice": (under("lora_unet_x", LORA) | under("lora_transformer_x", LORA), "kohya", {}, MatchError, "would both be 'lora_unet_x' in kohya"),
    "an algorithm": (under("diffusion_model.x", {k: (2, 2) for k in CONV}), "bfl", {}, FileFormatError, "module 'diffusion_model.x' is loha, and bfl knows locon only: --algorithm lora"),
    "a core": (under("diffusion_model.x", {"lora_down.weight": (2, 4, 1, 1), "lora_mid.weight": (2, 2, 3, 3), "lora_up.weight": (8, 2, 1, 1)}), "bfl", {}, FileFormatError, "has a Tucker core, which bfl does not know: --algorithm lora"),
    "flat columns": (under("lora_unet_x", CONV), "kohya", {"algorithm": "lora"}, FileFormatError, r"'lora_unet_x' \(loha\) may be of a linear layer or of a convolution: give the model it is for \(--base\)"),
    "not understood": (under(Q, LORA) | {"a.processor.q_lora1.up.weight": np.ones(2)}, "kohya", {}, FileFormatError, "a.processor.q_lora1.up.weight: is named as by x-labs.*--lossy leaves what is not read out"),
    "broken": (under(Q, LORA | {"lora_up.weight": np.ones((8, 3), np.float32)}), "kohya", {}, ShapeError, f"module '{Q}': lora_down.weight has shape"),
    "no layer": (under("lora_unet_nothing", LORA), "kohya", {"base": True}, MatchError, "module 'lora_unet_nothing' matches no layer of .*model.safetensors"),
    "a bias": (under("diffusion_model.x", {"diff": (8, 12), "diff_b": (8,)}), "bfl", {"algorithm": "lora"}, FileFormatError, "the change of its bias has no place in bfl: --lossy accepts"),
    "a dialect": (under(Q, LORA), "klingon", {}, MatchError, "dialect 'klingon' is unknown: use one of lycoris, kohya"),
    "a rank alone": (under(Q, LORA), "kohya", {"rank": 4}, FileFormatError, "rank 4 must be at least 1, and goes with --algorithm lora"),
    "another algorithm": (under(Q, LORA), "kohya", {"algorithm": "loha"}, FileFormatError, "algorithm 'loha': a module can be made 'lora'"),
    "nothing left": (under(Q, LORA), "kohya", {"only": "te1"}, MatchError, "no module is left to convert"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(tmp_path, what):
    tensors, to, options, kind, match = REFUSED[what]
    write(tmp_path / "a.safetensors", tensors)
    options = {**options, "base": base(tmp_path)} if options.get("base") else options
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(kind, match=match):
        convert_file(tmp_path / "a.safetensors", tmp_path / "out", to, **options)
    assert before == sorted(p.name for p in tmp_path.iterdir())


def test_a_folder_is_new_and_has_a_place(tmp_path):
    write(tmp_path / "a.safetensors", under(Q, LORA))
    with pytest.raises(
        FileFormatError, match="is there already, and peft is a folder: choose another"
    ):
        convert_file(tmp_path / "a.safetensors", tmp_path, "peft")
    with pytest.raises(OSError, match="cannot be written"):
        convert_file(
            tmp_path / "a.safetensors", tmp_path / "no" / "peft", "peft", base=base(tmp_path)
        )


def test_what_is_not_read_may_be_left_out(tmp_path):
    write(
        tmp_path / "a.safetensors",
        under(Q, LORA) | under("lora_te1_x", LORA) | {"loose": np.ones(2)},
    )
    done = convert_file(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", "lycoris", lossy=True, only="unet"
    )
    assert done.left_out == ("loose", "lora_te1_x") and "left out: loose" in done.text()
    assert [m.written for m in done.modules] == ["lycoris_blocks_0_attn_1_to_q"]
    json.dumps(done.as_dict(), allow_nan=False)


def test_parts_and_their_prefixes():
    names = {
        "a": Name("unet", "x.y", True),
        "b": Name("te1", "x.y", True),
        "c": Name("te2", "x.y", True),
    }
    assert module_names(DIALECTS["kohya"], names) == {
        "a": "lora_unet_x_y",
        "b": "lora_te1_x_y",
        "c": "lora_te2_x_y",
    }
    assert module_names(DIALECTS["lycoris"], names) == {
        "a": "lycoris_x_y",
        "b": "lycoris_text_encoder_x_y",
        "c": "lycoris_text_encoder_2_x_y",
    }
    del names["c"]
    assert module_names(DIALECTS["kohya"], names)["b"] == "lora_te_x_y"  # one encoder has no number
    unet = {"a": Name("unet", "down_blocks.0.resnets.0.conv1", True)}
    assert module_names(DIALECTS["diffusers"], unet)["a"].startswith("unet.")
    assert module_names(DIALECTS["diffusers"], names)["a"] == "transformer.x.y"
    told = {"a": Name("unet", "x.y", True, "unet.")}
    assert module_names(DIALECTS["diffusers"], told)["a"] == "unet.x.y"


def test_magnitudes_of_peft():
    assert magnitude(np.ones((5, 1))).shape == (5,)
    assert magnitude(np.ones((5, 1, 1, 1))).shape == (1, 5, 1, 1)
    with pytest.raises(
        FileFormatError, match="a magnitude of each input, and PEFT knows those of outputs"
    ):
        magnitude(np.ones((1, 7)))


def test_a_lora_that_is_larger_than_its_layer_is_said(tmp_path):
    shape = SHAPES["unet.blocks.0.attn_1.to_q"]
    adapter = LoKr.create(shape, 1000, factor=2)
    write_adapter(
        tmp_path / "a.safetensors", {"unet.blocks.0.attn_1.to_q": (adapter, random_params(adapter))}
    )
    done = convert_file(
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        "kohya",
        base=base(tmp_path),
        algorithm="lora",
    )
    assert "larger than the layer itself (160 for 96 values)" in done.text()


def test_modules_are_counted(tmp_path):
    write(tmp_path / "a.safetensors", under(Q, LORA) | under("lora_te1_x", LORA))
    seen = []
    convert_file(
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        "kohya",
        progress=lambda *p: seen.append(p),
    )
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    "name", [n for n, c in PEER_CASES.items() if (PEER / "adapter" / f"{n}.safetensors").exists()]
)
def test_the_peers_files_there_and_back(tmp_path, name):
    """Every algorithm of LyCORIS to kohya's names and back: the same keys, shapes, dtypes and bits."""
    start, there, back = (
        PEER / "adapter" / f"{name}.safetensors",
        tmp_path / "k.safetensors",
        tmp_path / "l.safetensors",
    )
    assert convert_file(start, there, "kohya", part="unet").loss == 0
    assert convert_file(there, back, "lycoris").loss == 0
    with open_file(start) as old, open_file(back) as new:
        assert set(old) == set(new)
        for key in old:
            assert old.dtype(key) == new.dtype(key) and old.shape(key) == new.shape(key), key
            assert (old.raw(key) == new.raw(key)).all(), key


def test_a_meaning_of_its_own_prefix(tmp_path):
    """kohya's OFT is not LyCORIS's: it keeps its prefix, or is refused."""
    write(
        tmp_path / "a.safetensors",
        {
            "oft_unet_x.oft_blocks": np.ones((2, 4, 4), np.float32),
            "oft_unet_x.alpha": np.array(0.5, np.float32),
        },
    )
    done = convert_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")
    assert [m.written for m in done.modules] == ["oft_unet_x"]
    with pytest.raises(
        MatchError,
        match="'oft_unet_x' means what it does under oft_unet_ only, which lycoris does not",
    ):
        convert_file(tmp_path / "a.safetensors", tmp_path / "c.safetensors", "lycoris")
