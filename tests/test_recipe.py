"""Recipes: which layers are taken, and what each of them gets."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lycoris_cupy import Conv1d, Conv2d, Engine, GroupNorm, LayerNorm, Linear, LycorisError
from lycoris_cupy.adapters import new_adapter
from lycoris_cupy.errors import MatchError, ShapeError
from lycoris_cupy.layers import LayerShape
from lycoris_cupy.norms import NormShape
from lycoris_cupy.ops.window import Window
from lycoris_cupy.recipe import PRESETS, Recipe, match

KERNELS = {
    "linear": (),
    "conv1x1": (1, 1),
    "point": (1,),
    "wide": (1, 3),
    "tall": (3, 1),
    "square": (3, 3),
    "line": (5,),
}


def shape_of(kind: str, inputs=12, outputs=8) -> LayerShape:
    if kind == "norm":
        return NormShape.of_channels(outputs)
    return LayerShape(Window.of(KERNELS[kind]), inputs, outputs)


def taken(recipe, shapes):
    return list(match(Recipe.from_table(recipe), shapes).adapters)


def engine(**kinds):
    """A network with a layer of each name, never run."""
    made = {
        "linear": lambda: Linear(np.ones((12, 8))),
        "conv1x1": lambda: Conv2d(np.ones((1, 1, 12, 8))),
        "wide": lambda: Conv2d(np.ones((1, 3, 12, 8))),
        "tall": lambda: Conv2d(np.ones((3, 1, 12, 8))),
        "line": lambda: Conv1d(np.ones((5, 12, 8))),
        "layer_norm": lambda: LayerNorm(np.ones(8)),
        "group_norm": lambda: GroupNorm(np.ones(8), groups=2),
    }
    return Engine({n: made[kind]() for n, kind in kinds.items()}, device="cpu", dtype="f64")


WORDS = st.sampled_from(["attn", "to_q", "norm1", "mlp", "conv", "0", "1"])
NAMES = st.lists(WORDS, min_size=1, max_size=3).map(".".join)
NETS = st.dictionaries(NAMES, st.sampled_from([*KERNELS, "norm"]), min_size=1, max_size=8)
PATTERNS = st.lists(
    st.one_of(NAMES, st.just("*"), WORDS.map("*{}".format), WORDS.map("{}.*".format)),
    min_size=1,
    max_size=3,
    unique=True,
)


def like(pattern: str, name: str) -> bool:
    """fnmatch's '*', written down once more."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name) is not None


@settings(deadline=None, max_examples=150)
@given(NETS, PATTERNS, st.one_of(st.just([]), PATTERNS), st.booleans())
def test_what_is_taken(kinds, targets, exclude, train_norm):
    """Every layer that a target matches and no exclusion does, if the algorithm can sit on it, in
    the order of the network; a pattern that brings nothing is an error.
    """
    shapes = {name: shape_of(kind) for name, kind in kinds.items()}
    sits = [name for name, kind in kinds.items() if kind != "norm" or train_norm]
    expected = [
        name
        for name in sits
        if any(like(p, name) for p in targets) and not any(like(p, name) for p in exclude)
    ]
    idle = [p for p in targets if not any(like(p, name) for name in expected)]
    void = [p for p in exclude if not any(like(p, name) for name in kinds)]
    table = {"targets": targets, "exclude": exclude, "train_norm": train_norm, "rank": 2}
    if idle or void:
        with pytest.raises(MatchError):
            taken(table, shapes)
        return
    found = match(Recipe.from_table(table), shapes)
    assert list(found.adapters) == expected
    for name, adapter in found.adapters.items():
        assert adapter.algorithm == ("norm" if kinds[name] == "norm" else "locon")
    passed_over = {one.layer for one in found.skipped}
    meant = {n for n in kinds if any(like(p, n) for p in targets)}
    assert passed_over == {n for n in meant - set(expected) if not any(like(p, n) for p in exclude)}


@settings(deadline=None, max_examples=100)
@given(NETS, st.integers(1, 9), st.integers(1, 9), st.one_of(st.none(), st.integers(1, 5)))
def test_a_kernel_is_over_space_by_any_of_its_extents(kinds, rank, conv_rank, alpha):
    shapes = {name: shape_of(kind) for name, kind in kinds.items() if kind != "norm"}
    spatial = {n for n, kind in kinds.items() if kind in ("wide", "tall", "square", "line")}
    table = {"rank": rank, "conv_rank": conv_rank, "conv_alpha": alpha, "tucker": True}
    if not spatial:
        with pytest.raises(MatchError):
            taken(table, shapes)
        return
    for name, adapter in match(Recipe.from_table(table), shapes).adapters.items():
        expected = conv_rank if name in spatial else rank
        assert adapter.rank == expected and adapter.tucker == (name in spatial)
        given_alpha = alpha if name in spatial else None
        assert adapter.scale == (1.0 if given_alpha is None else given_alpha / expected)


@pytest.mark.parametrize(
    "selector, kinds",
    [
        (":linear", "linear"),
        (":conv1x1", "conv1x1 point"),
        (":conv", "wide tall square line"),
        (":norm", "norm"),
    ],
)
def test_groups_of_kind(selector, kinds):
    shapes = {kind: shape_of(kind) for kind in (*KERNELS, "norm")}
    table = {"targets": selector, "train_norm": True}
    assert sorted(taken(table, shapes)) == sorted(kinds.split())


# name: kind, and the groups of place that it is in; then the presets that take it beside `full`.
# T: a text encoder's.
PLACES = {
    # Stable Diffusion as diffusers names it
    "conv_in": ("square", "ends"),
    "time_embedding.linear_1": ("linear", ""),
    "down_blocks.0.resnets.1.conv1": ("square", "resnet"),
    "down_blocks.0.resnets.1.time_emb_proj": ("linear", "resnet"),
    "down_blocks.0.resnets.0.conv_shortcut": ("conv1x1", "resnet"),
    "down_blocks.1.downsamplers.0.conv": ("square", "sampler"),
    "up_blocks.1.upsamplers.0.conv": ("square", "sampler"),
    "mid_block.resnets.0.conv2": ("square", "resnet"),
    "mid_block.attentions.0.proj_in": ("conv1x1", "transformer"),
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": ("linear", "attention"),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0": ("linear", "attention"),
    "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj": ("linear", "mlp"),
    # the original's names, in a checkpoint
    "model.diffusion_model.input_blocks.0.0": ("square", "ends"),
    "model.diffusion_model.input_blocks.1.0.in_layers.2": ("square", "resnet"),
    "model.diffusion_model.input_blocks.3.0.op": ("square", "sampler"),
    "model.diffusion_model.input_blocks.1.1.proj_in": ("conv1x1", "transformer"),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k": ("linear", "attention"),
    "model.diffusion_model.output_blocks.2.1.conv": ("square", "sampler"),
    "model.diffusion_model.out.2": ("square", "ends"),
    # folded, as adapter files write them
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_v": ("linear", "attention"),
    # text encoders
    "text_model.encoder.layers.0.self_attn.q_proj": ("linear", "attention text-encoder"),
    "text_model.encoder.layers.11.mlp.fc2": ("linear", "mlp text-encoder"),
    "lora_te1_text_model_encoder_layers_1_mlp_fc1": ("linear", "mlp text-encoder"),
    "text_encoder_2.text_model.encoder.layers.0.self_attn.out_proj": ("linear", "attention text-encoder"),
    "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc": ("linear", "mlp text-encoder"),
    "encoder.block.0.layer.0.SelfAttention.q": ("linear", "attention text-encoder"),
    # Flux, both namings
    "double_blocks.0.img_attn.qkv": ("linear", "attention"),
    "double_blocks.0.txt_mlp.0": ("linear", "mlp"),
    "double_blocks.0.img_mod.lin": ("linear", "transformer"),
    "single_blocks.3.linear1": ("linear", "attention mlp"),
    "transformer_blocks.0.attn.add_q_proj": ("linear", "attention"),
    "transformer_blocks.0.ff_context.net.2": ("linear", "mlp"),
    "single_transformer_blocks.5.proj_mlp": ("linear", "mlp"),
    "single_transformer_blocks.5.proj_out": ("linear", "attention mlp"),
    "single_transformer_blocks.5.norm.linear": ("linear", "transformer"),
    "x_embedder": ("linear", ""),
    # DiT, SD3, Wan
    "blocks.7.attn.qkv": ("linear", "attention"),
    "blocks.7.mlp.fc1": ("linear", "mlp"),
    "blocks.7.adaLN_modulation.1": ("linear", "transformer"),
    "joint_blocks.2.x_block.attn.proj": ("linear", "attention"),
    "blocks.0.cross_attn.k": ("linear", "attention"),
    "blocks.0.ffn.2": ("linear", "mlp"),
    "layers.3.feed_forward.w1": ("linear", "mlp"),
    "final_layer.linear": ("linear", ""),
}  # fmt: skip
SHAPES = {name: shape_of(kind) for name, (kind, _) in PLACES.items()}
GROUPS_OF = {}
for _name, (_, _groups) in PLACES.items():
    GROUPS_OF[_name] = set(_groups.split())
    if GROUPS_OF[_name] & {"attention", "mlp"}:
        GROUPS_OF[_name].add("transformer")
    if _name.startswith("text_encoder_2") or _name.startswith("conditioner"):
        GROUPS_OF[_name].add("text-encoder")


@pytest.mark.parametrize(
    "group", ["attention", "mlp", "transformer", "resnet", "sampler", "ends", "text-encoder"]
)
def test_groups_of_place(group):
    expected = [name for name in PLACES if group in GROUPS_OF[name]]
    assert taken({"targets": f":{group}"}, SHAPES) == expected


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset):
    spatial = {name for name, shape in SHAPES.items() if shape.taps > 1}
    text = {name for name in PLACES if "text-encoder" in GROUPS_OF[name]}

    def within(*groups):
        return {name for name in PLACES if GROUPS_OF[name] & set(groups)}

    every = set(PLACES)
    of_ia3 = ("to_k", "to_v", "ff.net.2", "k_proj", "v_proj", "mlp.fc2")
    expected = {
        "full": every,
        "full-lin": every - spatial,
        "attn-mlp": within("transformer") - spatial,
        "attn-only": within("attention") - spatial,
        "unet-only": every - text,
        "unet-transformer-only": within("transformer") - spatial - text,
        "unet-convblock-only": within("resnet", "sampler", "ends") - text,
        "ia3": {name for name in PLACES if name.endswith(of_ia3)},
    }[preset]
    assert set(taken({"preset": preset}, SHAPES)) == expected


PEER = json.loads((Path(__file__).parent / "peer/lycoris-4.1.3-presets.json").read_text())["layers"]
_EMBEDDED = {f"unet.add_embedding.linear_{i}" for i in (1, 2)}
_TEXT_NORMS = {f"text_encoder.encoder.layers.0.layer_norm{i}" for i in (1, 2)}
_LAST_NORMS = {"text_encoder.final_layer_norm", "unet.conv_norm_out"}
# What a preset takes here and not there: `full` is every layer, and a block's own norms are of the
# block, where LyCORIS names the attention and the mlp of a text encoder alone.
BEYOND = {
    "full": _EMBEDDED,
    "full-lin": _EMBEDDED,
    "unet-only": _EMBEDDED,
    "full with norms": _EMBEDDED | _TEXT_NORMS | _LAST_NORMS,
    "full-lin with norms": _EMBEDDED | _TEXT_NORMS | _LAST_NORMS,
    "unet-only with norms": _EMBEDDED | {"unet.conv_norm_out"},
    "attn-mlp with norms": _TEXT_NORMS,
}


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "ia3"])
def test_presets_take_what_lycoris_takes(preset, norms):
    """On a real U-Net and text encoder. LyCORIS's `ia3` takes nothing there: its names would have to
    stand at the beginning of a path.
    """
    shapes = {}
    for name, one in PEER.items():
        kind, *sizes = one["shape"]
        shapes[name] = (
            NormShape.of_channels(*sizes)
            if kind == "norm"
            else LayerShape(Window.of(sizes[2:]), *sizes[:2])
        )
    case = f"{preset} with norms" if norms else preset
    theirs = {name for name, one in PEER.items() if case in one["taken"]}
    assert theirs and not any("ia3" in one["taken"] for one in PEER.values())
    ours = set(taken({"preset": preset, "train_norm": norms}, shapes))
    assert ours - theirs == BEYOND.get(case, set()) and not theirs - ours


def test_ia3_scales_the_input_of_the_last_layer_of_an_mlp():
    shapes = {n: shape_of("linear") for n in ("b.0.to_k", "b.0.ff.net.2", "te.mlp.fc2", "b.0.to_q")}
    found = match(Recipe.from_table({"preset": "ia3"}), shapes).adapters
    assert {name: adapter.on_input for name, adapter in found.items()} == {
        "b.0.to_k": False,
        "b.0.ff.net.2": True,
        "te.mlp.fc2": True,
    }
    with pytest.raises(LycorisError, match="preset 'ia3' is for ia3, not for locon"):
        Recipe.from_table({"preset": "ia3", "algorithm": "locon"})


def test_exceptions_lie_over_each_other():
    """Later ones over earlier ones; another algorithm takes over what it knows."""
    table = {
        "algorithm": "lokr", "rank": 2, "alpha": 3, "factor": 4, "dora": "output", "conv_rank": 1,
        "override": {
            "*.a": {"rank": 5},
            "*.b": {"algorithm": "locon", "conv_alpha": 7},
            "*.c": {"algorithm": "full"},
            "x.*": {"alpha": 6},
        },
    }  # fmt: skip
    shapes = {f"{x}.{y}": shape_of("square") for x in "xy" for y in "abcd"}
    found = match(Recipe.from_table(table), shapes).adapters
    told = {
        name: (adapter.algorithm, adapter.rank, adapter.alpha) for name, adapter in found.items()
    }
    assert told == {
        "x.a": ("lokr", 5, 6.0), "y.a": ("lokr", 5, 3.0),
        "x.b": ("locon", 1, 6.0), "y.b": ("locon", 1, 7.0),
        "x.c": ("full", 0, None), "y.c": ("full", 0, None),
        "x.d": ("lokr", 1, 6.0), "y.d": ("lokr", 1, 3.0),
    }  # fmt: skip
    titles = {name: adapter.title for name, adapter in found.items()}
    assert titles["x.b"] == "locon with dora per output" and titles["x.c"] == "full"


def test_norms_among_the_targets():
    net = engine(
        **{"a.norm1": "layer_norm", "a.to_q": "linear", "b.norm": "group_norm", "b.conv": "wide"}
    )
    report = net.add("x", "lokr", ["a.*"], train_norm=True, rank=1, factor=2)
    assert report == ["a.norm1", "a.to_q"]
    assert list(net.parameters("x")["a.norm1"]) == ["w_norm", "b_norm"]
    assert net.add("y", "lokr", rank=1, factor=2) == ["a.to_q", "b.conv"]


@pytest.mark.parametrize("algorithm", ["locon", "loha", "lokr", "glora"])
def test_rs_lora_is_alpha_over_the_root_also_for_a_reader(algorithm, tmp_path):
    net = engine(a="linear")
    options = {"factor": 2} if algorithm == "lokr" else {}
    net.add("x", algorithm, rank=2, alpha=3, rs_lora=True, **options)
    adapter = net.attachments["x"].adapters["a"]
    assert adapter.has_rank and abs(adapter.scale - 3 / np.sqrt(2)) < 1e-12
    net.save_adapter("x", tmp_path / "x.safetensors")
    report = net.attach(tmp_path / "x.safetensors", name="back")
    assert abs(report.layers[0].scale - 3 / np.sqrt(2)) < 1e-6


def test_one_recipe_in_many_ways(tmp_path):
    """As arguments, as a table, from a file: the same factors, bit for bit."""
    table = {"algorithm": "lokr", "rank": 1, "factor": 2, "targets": ["a", "c*"], "exclude": "c2"}
    (tmp_path / "style.toml").write_text(
        'algo = "lokr"\nlinear_dim = 1\nlinear_alpha = 1\nfactor = "2"\n'
        'targets = ["a", "c*"]\nexclude = "c2"\n'
    )
    net = engine(a="linear", b="linear", c1="wide", c2="tall")
    options = {"rank": 1, "factor": 2, "exclude": ["c2"]}
    reports = [
        net.add("arguments", "lokr", ["a", "c*"], seed=3, **options),
        net.add("table", table, seed=3),
        net.add("recipe", Recipe.from_table(table), seed=3),
        net.add("file", Recipe.from_toml(tmp_path / "style.toml"), seed=3),
    ]
    assert all(report == ["a", "c1"] for report in reports)
    again = net.add("again", reports[0].recipe, seed=3)
    assert again.recipe == reports[0].recipe and again.rows == reports[0].rows
    reports.append(net.add("words", algorithm="lokr", targets=["a", "c*"], seed=3, **options))
    first = net.parameters("arguments")
    for name in ("table", "recipe", "file", "again", "words"):
        for layer, factors in net.parameters(name).items():
            for factor, value in factors.items():
                assert value.tobytes() == first[layer][factor].tobytes()


def test_dropout_is_said_of_all_layers():
    net = engine(a="linear", b="linear")
    net.add("x", "locon", rank=2, dropout="0.25", module_dropout=0.5, seed=9)
    knobs = net.attachments["x"].dropout
    assert (knobs.dropout, knobs.module_dropout, knobs.rank_dropout, knobs.seed) == (
        0.25,
        0.5,
        0,
        9,
    )
    with pytest.raises(LycorisError, match="dropout is 1.0, expected a number from 0 to below 1"):
        net.add("y", "locon", dropout=1)
    with pytest.raises(LycorisError, match="override of 'a': dropout is said of all layers"):
        net.add("y", "locon", override={"a": {"dropout": 0.1}})


def test_an_alias_of_the_network_is_no_layer():
    """Nothing is attached when a recipe fails."""
    net = engine(a="linear")
    with pytest.raises(MatchError):
        net.add("x", "locon", ["b"])
    assert not net.attachments and net.add("x", "locon", "a") == ["a"]


BIG = {
    f"blocks.{i}.{rest}": shape_of("linear")
    for i in range(40)
    for rest in ("attn.to_q", "attn.to_k", "mlp.fc1", "mlp.fc2")
}


@pytest.mark.parametrize(
    "table, message",
    [
        ({"targets": "*.attn.to_qq"}, "targets: .* nearest: 'blocks.0.attn.to_q', 'blocks.0.attn.to_k'"),
        ({"targets": "blocks_0_attn_to_k"}, "nearest: 'blocks.0.attn.to_k'"),
        ({"targets": "*.mpl.*"}, "nearest: 'blocks.0.mlp.fc1'"),
        ({"targets": "zzz"}, "they are: 'blocks.0.attn.to_q', .* and 152 more"),
        ({"exclude": "*.to_v"}, "exclude: '\\*.to_v' matches none of the layers; nearest"),
        ({"override": {"*.to_v": {"rank": 2}}}, "override: '\\*.to_v' matches none"),
        ({"targets": ":conv"}, "targets: ':conv' matches none of the layers$"),
        ({"targets": ":atention"}, "no group of layers, nearest: ':attention'"),
        ({"preset": "unet-convblock-only"}, "preset 'unet-convblock-only': no layer is left"),
        ({"preset": "conv"}, "preset 'conv' is unknown: use one of full, full-lin"),
        ({"preset": "my.toml"}, "unknown: .*, ia3; what a file of presets says may stand in the recipe"),
        ({"preset": ["full"]}, "preset \\['full'\\] is unknown"),
        ({"rule": "reference"}, "layer 'blocks.0.attn.to_q': rule = 'reference' on locon .* it needs dora"),
        ({"preset": "full", "targets": "*"}, "preset 'full' and targets both say which layers"),
        ({"exclude": "*"}, "no layer is left to put an adapter on"),
        ({"targets": ["*", "*.to_q"], "exclude": "*.to_q"}, "'\\*.to_q' matches .*and 37 more, but exclude leaves out"),
        ({"targets": "*.to_q", "override": {"*.fc1": {"rank": 2}}}, "but none is a target"),
        ({"algorithm": "norm"}, "norm does not sit on Linear\\(12 -> 8\\): it sits on norms"),
        ({"tucker": True}, "tucker acts on kernels over space alone .* none of the 160 layers"),
        ({"conv_rank": 2}, "conv_rank acts on kernels over space alone"),
        ({"override": {":mlp": {"conv_alpha": 2}}}, "override of ':mlp': conv_alpha acts on kernels"),
        ({"targets": []}, "targets is empty: leave it out"),
        ({"targets": 3}, "targets is 3, expected a selector or a list"),
        ({"exclude": [3]}, "exclude is \\[3\\], expected a selector or a list"),
        ({"override": [1]}, "override is \\[1\\], expected a table of selectors"),
        ({"override": {"*": 3}}, "override of '\\*': it is 3, expected a table"),
        ({"override": {"*": {"targets": "a"}}}, "override of '\\*': targets is said of all layers"),
        ({"override": {"*": {"rnk": 3}}}, "override of '\\*': locon has no option 'rnk' \\(nearest: 'rank'\\)"),
        ({"algorithm": "lora2"}, "'lora2' is unknown: use one of locon"),
        ({"rank": 0}, "rank is 0, expected at least 1"),
        ({"rank": 2.5}, "rank is 2.5, expected a whole number"),
        ({"rank": True}, "rank is True, expected a whole number"),
        ({"alpha": float("nan")}, "alpha is nan, expected a number"),
        ({"alpha": "much"}, "alpha is 'much', expected a number"),
        ({"factor": 4}, "locon has no option 'factor' \\(it is one of lokr\\)"),
        ({"facto": 4}, "locon has no option 'facto' \\(nearest: 'factor' of lokr\\)"),
        ({"algorithm": "dylora", "block_size": 4}, "each step draws its block: draw_block"),
        ({"algorithm": "dylora", "rs_lora": True}, "rs_lora stands on locon, loha, lokr, glora, not"),
        ({"algorithm": "full", "dora": "output"}, "DoRA stands on locon, loha and lokr"),
    ],
)  # fmt: skip
def test_errors(table, message):
    with pytest.raises(LycorisError, match=message) as caught:
        taken(table, BIG)
    assert "\n" not in str(caught.value)


def test_errors_of_a_layer_and_of_a_file(tmp_path):
    with pytest.raises(ShapeError, match="layer 'a': block size 7 does not divide the 8 outputs"):
        engine(a="linear").add("x", "boft", block_size=7)
    with pytest.raises(LycorisError, match="says all there is to say, but targets, rank stands"):
        engine(a="linear").add("x", {"rank": 3}, "a", rank=4)
    with pytest.raises(LycorisError, match="algorithm is said twice, 'locon' and 'loha'"):
        engine(a="linear").add("x", "locon", algorithm="loha")
    path = tmp_path / "a.toml"
    path.write_text("rank = \n")
    with pytest.raises(LycorisError, match="a.toml: is no TOML: "):
        Recipe.from_toml(path)
    path.write_text("rank = 0\n")
    with pytest.raises(LycorisError, match="a.toml: rank is 0, expected at least 1"):
        Recipe.from_toml(path)
    with pytest.raises(LycorisError, match="adapter: rank is 0"):
        Recipe.from_table({"rank": 0}, "adapter")
    with pytest.raises(LycorisError, match="a recipe is 3, expected a table"):
        Recipe.from_table(3)


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(["locon", "lokr", "diag-oft", "norm"]),
    st.dictionaries(st.sampled_from(["rank", "conv_rank", "alpha"]), st.integers(1, 9)),
    st.one_of(st.none(), st.lists(st.sampled_from(["a*", ":mlp", ":conv"]), min_size=1)),
    st.booleans(),
    st.dictionaries(
        st.sampled_from(["*.x", ":attention"]), st.fixed_dictionaries({"rank": st.integers(1, 9)})
    ),
)
def test_a_recipe_is_its_table(algorithm, numbers, targets, train_norm, override):
    table = {"algorithm": algorithm, **numbers, "train_norm": train_norm, "override": override}
    table |= {} if targets is None else {"targets": targets}
    table |= {"factor": 3, "decompose_both": True} if algorithm == "lokr" else {}
    recipe = Recipe.from_table(table)
    assert Recipe.from_table(recipe.table()) == recipe
    plain = SimpleNamespace(**recipe.table())
    assert plain.algorithm == algorithm and getattr(plain, "train_norm", False) == train_norm


def test_options_reach_the_adapter():
    """What a recipe makes is what the algorithm's own constructor makes."""
    shape = shape_of("square")
    for algorithm, options in {
        "lokr": {"factor": 2, "decompose_both": True, "tucker": True},
        "loha": {"tucker": True},
        "diag-oft": {"constraint": 0.5, "rescaled": True},
        "ia3": {"on_input": True},
        "full": {"bias": True},
        "locon": {"dora": "input", "rule": "reference"},
    }.items():
        table = {"algorithm": algorithm, "rank": 2, "alpha": 3.0, **options}
        made = match(Recipe.from_table(table), {"a": shape}).adapters["a"]
        assert made == new_adapter(algorithm, shape, 2, 3.0, **options)
