"""LyCORIS's names for what a recipe says, and what it reads differently from what it says."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lycoris_cupy import LycorisError
from lycoris_cupy.adapters import Option
from lycoris_cupy.layers import LayerShape
from lycoris_cupy.ops.window import Window
from lycoris_cupy.recipe import Recipe, match
from lycoris_cupy.recipe.reference import BESIDE, CLASSES, ELSEWHERE, FIXED, NAMES, WORDS
from tests.pages import PAGES

# In LyCORIS's words, and the same in the project's.
SAME = [
    ({"algo": "lora"}, {"algorithm": "locon"}),
    ({"algo": "locon"}, {}),
    ({"algo": "diag-oft"}, {"algorithm": "diag-oft"}),
    ({"linear_dim": 8}, {"rank": 8, "alpha": 1}),
    ({"network_dim": "8"}, {"rank": 8, "alpha": 1}),
    ({"lora_dim": 8.0}, {"rank": 8, "alpha": 1}),
    ({"dim": 8, "alpha": 2}, {"rank": 8, "alpha": 2}),
    ({"linear_dim": 8, "linear_alpha": "4.5"}, {"rank": 8, "alpha": 4.5}),
    ({"linear_dim": 8, "network_alpha": 4}, {"rank": 8, "alpha": 4}),
    ({"linear_dim": 8, "linear_alpha": 0}, {"rank": 8, "alpha": 0}),
    ({"linear_dim": None, "conv_dim": None, "linear_alpha": None}, {}),
    ({"conv_dim": 4, "conv_alpha": 2}, {"conv_rank": 4, "conv_alpha": 2}),
    ({"use_tucker": True}, {"tucker": True}),
    ({"use_cp": "True"}, {"tucker": True}),
    ({"use_conv_cp": "false"}, {"tucker": False}),
    ({"use_tucker": True, "use_cp": True}, {"tucker": True}),
    ({"algo": "lokr", "decompose_both": "False"}, {"algorithm": "lokr", "decompose_both": False}),
    ({"algo": "lokr", "full_matrix": "TRUE", "factor": "8"}, {"algorithm": "lokr", "full_matrix": True, "factor": 8}),
    ({"algo": "lokr", "unbalanced_factorization": True}, {"algorithm": "lokr", "unbalanced_factorization": True}),
    ({"algo": "boft", "constrain": "0.5"}, {"algorithm": "boft", "constraint": 0.5}),
    ({"algo": "boft", "constraint": 0.5, "rescaled": True}, {"algorithm": "boft", "constraint": 0.5, "rescaled": True}),
    ({"algo": "ia3", "train_on_input": True}, {"algorithm": "ia3", "on_input": True}),
    ({"dora_wd": True}, {"dora": "output"}),
    ({"weight_decompose": "true"}, {"dora": "output"}),
    ({"dora_wd": True, "wd_on_output": True}, {"dora": "output"}),
    ({"dora_wd": True, "wd_on_output": "False"}, {"dora": "input"}),
    ({"dora_wd": False, "wd_on_output": False}, {"dora": None}),
    ({"rs_lora": True}, {"rs_lora": True}),
    ({"train_norm": "True"}, {"train_norm": True}),
    ({"dropout": 0, "rank_dropout": "0.1", "module_dropout": 0.0}, {"rank_dropout": 0.1}),
    ({"bypass_mode": True}, {}),
    ({"bypass_mode": False, "dora_wd": True}, {"dora": "output"}),
    ({"use_scalar": False, "use_data_init": True, "sig_type": "principal"}, {}),
    ({"train_llm_adapter": "False", "train_t5xxl": False}, {}),
    # forms hold the options of every algorithm: at their defaults they say nothing
    ({"algo": "lora", "factor": -1, "decompose_both": False, "constraint": 0, "rescaled": "false"}, {}),
    ({"target_name": ["*.to_q"], "use_fnmatch": True}, {"targets": ["*.to_q"]}),
    ({"unet_target_name": ["*.to_q"], "text_encoder_target_name": ["*.fc1"], "use_fnmatch": True}, {"targets": ["*.to_q", "*.fc1"]}),
    ({"target_module": ["Linear", "Conv2d"]}, {"targets": [":linear", ":conv1x1", ":conv"]}),
    ({"unet_target_module": ["ResnetBlock2D"], "unet_target_name": ["*.fc1"], "use_fnmatch": True}, {"targets": [":resnet", "*.fc1"]}),
    ({"exclude_name": ["*.to_k"], "use_fnmatch": True}, {"exclude": ["*.to_k"]}),
    ({"enable_conv": False}, {"exclude": [":conv"]}),
    ({"enable_conv": False, "exclude": "*.to_k"}, {"exclude": ["*.to_k", ":conv"]}),
    ({"enable_conv": True}, {}),
    (
        {"name_algo_map": {"*.fc1": {"algo": "lokr", "dim": 2, "factor": 4}}, "use_fnmatch": True},
        {"override": {"*.fc1": {"algorithm": "lokr", "rank": 2, "factor": 4}}},
    ),
    ({"module_algo_map": {"FeedForward": {"dim": 2}}}, {"override": {":mlp": {"rank": 2}}}),
    ({"preset": "attn-mlp"}, {"preset": "attn-mlp"}),
    (
        {"network_module": "lycoris.kohya", "network_dim": 8, "network_alpha": 4, "network_args": ["algo=lokr", "factor=-1", "conv_dim=2", "use_tucker=True", "dora_wd=false"]},
        {"algorithm": "lokr", "rank": 8, "alpha": 4, "factor": -1, "conv_rank": 2, "tucker": True, "dora": None},
    ),
    ({"network_args": []}, {}),
]  # fmt: skip

REFUSED = [
    ({"conv_dim": 0}, 'conv_dim is 0: LyCORIS then takes that of the linear layers: leave conv_dim out for that, or exclude = [":conv"]'),
    ({"conv_dim": "0"}, "conv_dim is 0: LyCORIS"),
    ({"conv_alpha": 0}, "conv_alpha is 0: LyCORIS"),
    ({"disable_conv_cp": True}, "LyCORIS turns Tucker cores on for true and for false alike: write tucker"),
    ({"disable_conv_cp": False}, "LyCORIS turns Tucker cores on"),
    ({"train_norm": 0}, "train_norm is 0, expected true or false"),
    ({"use_tucker": "no"}, "tucker is 'no', expected true or false"),
    ({"use_tucker": ""}, "tucker is '', expected true or false"),
    ({"dora_wd": "None"}, "dora_wd is 'None', expected true or false"),
    ({"rank": 4, "linear_dim": 5}, "rank = 4 and linear_dim = 5 say the same thing in two ways: keep one"),
    ({"linear_alpha": 4, "alpha": 5}, "linear_alpha = 4 and alpha = 5 say the same"),
    ({"use_cp": True, "tucker": False}, "use_cp = True and tucker = False say the same"),
    ({"dora_wd": True, "dora": "input"}, "dora_wd = 'output' and dora = 'input' say the same"),
    ({"dora_wd": False, "dora": "input"}, "say the same thing in two ways"),
    ({"target_name": ["a"], "targets": ["b"], "use_fnmatch": True}, "say the same thing in two ways"),
    ({"wd_on_output": False}, 'wd_on_output says nothing without dora_wd'),
    ({"bypass_mode": True, "dora_wd": True}, "bypass_mode beside DoRA: LyCORIS leaves DoRA out there"),
    ({"bypass_mode": "true", "dora": "input"}, "bypass_mode beside DoRA"),
    ({"use_scalar": True}, "use_scalar is True, but here it is always False"),
    ({"sig_type": "last"}, "sig_type is 'last', but here it is always 'principal'"),
    ({"mask_group_id": 1}, "the noise level goes to forward"),
    ({"loraplus_lr_ratio": 16}, "rate_factors"),
    ({"multiplier": 1.0}, "it is the strength of Engine.add"),
    ({"target_name": ["to_q"]}, "target_name holds regular expressions unless use_fnmatch = true"),
    ({"exclude_name": ["to_q"]}, "exclude_name holds regular expressions"),
    ({"name_algo_map": {"to_q": {"dim": 2}}}, "name_algo_map holds regular expressions"),
    ({"target_module": ["Foo"]}, "target_module names the class 'Foo'"),
    ({"module_algo_map": {"Foo": {}}}, "module_algo_map names the class 'Foo'"),
    ({"module_algo_map": 3}, "module_algo_map is 3, expected a table"),
    ({"network_module": "networks.lora"}, "network_module is 'networks.lora', but here it is always 'lycoris.kohya'"),
    ({"network_args": ["algo"]}, "network_args holds 'algo', expected name=value"),
    ({"network_args": ["algo=loha"], "algo": "lora"}, "algo is said twice, the second time in network_args"),
    ({"network_args": ["conv_dim=0"]}, "conv_dim is 0: LyCORIS"),
    ({"network_args": 3}, "network_args is 3, expected"),
    ({"target_module": 3}, "target_module is 3, expected a name or a list of them"),
]  # fmt: skip


@pytest.mark.parametrize("theirs, ours", SAME)
def test_both_say_the_same(theirs, ours):
    assert Recipe.from_table(theirs) == Recipe.from_table(ours)


@pytest.mark.parametrize("table, message", REFUSED)
def test_what_would_mean_something_else_is_refused(table, message):
    with pytest.raises(LycorisError, match=re.escape(message)) as caught:
        Recipe.from_table(table)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("table", [{"override": {3: {}}}, {"target_module": [["a"]]}])
def test_what_is_no_text_is_refused_by_name(table):
    with pytest.raises(LycorisError, match=next(iter(table))):
        Recipe.from_table(table)


def test_a_rank_in_an_exception_brings_no_alpha():
    shape = LayerShape(Window(), 24, 24)
    table = {"linear_dim": 8, "linear_alpha": 4, "override": {"a": {"dim": 2}}}
    found = match(Recipe.from_table(table), {"a": shape, "b": shape}).adapters
    assert {n: (adapter.rank, adapter.alpha) for n, adapter in found.items()} == {
        "a": (2, 4.0),
        "b": (8, 4.0),
    }


@pytest.mark.parametrize(
    "kind, value, expected",
    [
        ("int", np.int64(3), 3),
        ("int", np.float32(3), 3),
        ("int", " 3 ", 3),
        ("int", "3.5", None),
        ("int", True, None),
        ("float", "1e-3", 1e-3),
        ("float", "inf", None),
        ("float", 10**400, None),
        ("float", False, None),
        ("bool", np.True_, True),
        ("bool", " FALSE ", False),
        ("bool", 1, None),
        ("str", 3, None),
        ("str", "3", "3"),
    ],
)
def test_values(kind, value, expected):
    option = Option("some", kind, None)
    if expected is None:
        with pytest.raises(LycorisError, match="some is .*, expected"):
            option.parsed(value)
    else:
        found = option.parsed(value)
        assert found == expected and type(found) is type(expected)
    assert Option("some", kind, None, optional=True).parsed(None) is None


OWN = (
    *("algorithm", "rank", "alpha", "conv_rank", "conv_alpha", "rs_lora", "train_norm", "factor"),
    *(
        "targets",
        "exclude",
        "preset",
        "override",
        "tucker",
        "dora",
        "rule",
        "dropout",
        "constraint",
    ),
)
ODD = st.sampled_from(
    [None, True, False, 0, 1, -1, 2.5, "", "x", "true", "4", "*", ":mlp", "lora", [], ["*"], [None]]
    + [{}, {"*": {}}, {"*": 3}, {"*": {"rank": "2"}}, {3: {}}, float("nan"), float("inf"), b"x"]
)


@settings(deadline=None, max_examples=250)
@given(st.dictionaries(st.sampled_from([*OWN, *WORDS, "what"]), ODD, max_size=4))
def test_no_table_ends_in_another_error(table):
    """Whatever stands in a file: one line that says what is wrong, or a recipe that is its table."""
    try:
        recipe = Recipe.from_table(table)
    except LycorisError as error:
        assert "\n" not in str(error)
        return
    assert Recipe.from_table(recipe.table()) == recipe
    shape = LayerShape(Window.of((3, 3)), 24, 24)
    try:
        match(recipe, {"a.mlp": shape})
    except LycorisError as error:
        assert "\n" not in str(error)


def test_every_name_is_in_a_case_and_on_the_page():
    """The tables above speak of each name, and docs/recipes.md lists each."""
    names = {*NAMES, *FIXED, *ELSEWHERE, *BESIDE}
    told = {key for table, _ in (*SAME, *REFUSED) for key in table}
    told |= {
        "text_encoder_target_module",
        "loraplus_unet_lr_ratio",
        "loraplus_text_encoder_lr_ratio",
    }
    assert names <= told
    page = PAGES["docs/recipes.md"]
    listed = dict(re.findall(r"^\| `([^|]+)` \| `?([\w-]*)`? \|", page, re.M))
    pairs = {name: ours for line, ours in listed.items() for name in re.findall(r"\w+", line)}
    assert {name: pairs.get(name) for name in NAMES} == NAMES
    for name in names - NAMES.keys():
        assert f"`{name}`" in page, name
    for name in CLASSES:
        assert name in page, name
