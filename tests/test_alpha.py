"""Alpha: one precedence, said in the report; sources that disagree are an error."""

import json
import math
import re

import numpy as np
import pytest

from lycoris_cupy import Engine, LayerShape, Linear
from lycoris_cupy.errors import FileFormatError
from lycoris_cupy.io.adapter_file import inspect_adapter, read_adapter
from lycoris_cupy.io.alpha import Alphas, Configuration
from lycoris_cupy.io.safetensors import write

A, B = ("lora_A.weight", "lora_B.weight")


def tensors(module="base_model.model.net.to_q", alpha=None, rank=4, conv=False):
    kernel = (3, 3) if conv else ()
    one = (1, 1) if conv else ()
    out = {
        f"{module}.{A}": np.ones((rank, 6, *kernel), np.float32),
        f"{module}.{B}": np.ones((8, rank, *one), np.float32),
    }
    return out if alpha is None else out | {f"{module}.alpha": np.array(alpha, np.float32)}


def layer(folder, content, metadata=None, config=None, **options):
    folder.mkdir(exist_ok=True)
    write(folder / "adapter_model.safetensors", content, metadata)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    report = inspect_adapter(folder / "adapter_model.safetensors", **options)
    assert not report.unmatched, report.unmatched
    (one,) = report.layers
    return one


META = {
    "lora_adapter_metadata": json.dumps(
        {"unet.r": 4, "unet.lora_alpha": 8, "transformer.lora_alpha": 3}
    )
}


@pytest.mark.parametrize(
    "content, metadata, config, scale, why",
    [
        (tensors(alpha=2), None, None, 0.5, "alpha / rank = 2 / 4"),
        (tensors(), None, None, 1, "no alpha in the file: scale 1"),
        (tensors(), None, {"lora_alpha": 8, "r": 4}, 2, "alpha / rank = 8 / 4, alpha from .*adapter_config.json"),
        (tensors(alpha=8), None, {"lora_alpha": 8, "r": 4}, 2, "alpha / rank = 8 / 4"),
        (tensors(), None, {"lora_alpha": 8, "r": 4, "use_rslora": True}, 4, "alpha / rank = 16 / 4, alpha from"),
        (tensors(), None, {"lora_alpha": 8, "r": 2, "rank_pattern": {"to_q": 4}, "alpha_pattern": {"to_q": 1}}, 0.25, "1 / 4"),
        (tensors(), None, {"lora_alpha": 8, "alpha_pattern": {"q": 1, "net.to_.*": 2}}, 0.5, "2 / 4"),
        (tensors(), None, {"peft_type": "LORA"}, 1, "no alpha"),
        (tensors("unet.to_q"), META, None, 2, "8 / 4, alpha from lora_adapter_metadata"),
        (tensors("transformer.to_q"), META, None, 0.75, "3 / 4, alpha from lora_adapter_metadata"),
        (tensors("text_encoder.to_q"), META, None, 1, "no alpha"),
        (tensors("lora_unet_q"), {"ss_network_dim": "4", "ss_network_alpha": "2"}, None, 0.5, "2 / 4, alpha from ss_network_alpha"),
        # A training record of another rank, or of several alphas, is not about this module.
        (tensors("lora_unet_q"), {"ss_network_dim": "8", "ss_network_alpha": "2"}, None, 1, "no alpha"),
        (tensors("lora_unet_q"), {"ss_network_dim": "Dynamic", "ss_network_alpha": "None"}, None, 1, "no alpha"),
        (tensors("lora_unet_q"), {"ss_network_dim": "4", "ss_network_alpha": "2", "ss_network_args": "not json"}, None, 0.5, "2 / 4"),
        (tensors("lora_unet_q", 4), {"ss_network_dim": "4", "ss_network_alpha": "2", "ss_network_args": '{"rs_lora": true}'}, None, 1, "4 / 4"),
        (tensors("lora_unet_q", conv=True), {"ss_network_dim": "4", "ss_network_alpha": "2", "ss_network_args": '{"conv_dim": "4", "conv_alpha": "1"}'}, None, 0.25, "ss_network_args conv_alpha"),
        (tensors("lora_unet_q", 0), {"ss_network_dim": "4", "ss_network_alpha": "4"}, None, 1, "alpha 0 is read as rank"),
        # A configuration beside a file of another dialect is not about it.
        (tensors("lora_unet_q"), None, {"lora_alpha": 8, "r": 4}, 1, "no alpha"),
    ],
)  # fmt: skip
def test_the_precedence(tmp_path, content, metadata, config, scale, why):
    one = layer(tmp_path / "a", content, metadata, config)
    assert one.scale == pytest.approx(scale)
    assert re.search(why, one.scale_from), one.scale_from


SOURCES = {"lora_alpha": 8, "r": 4}
RECORD = {"ss_network_dim": "4", "ss_network_alpha": "2"}


@pytest.mark.parametrize(
    "content, metadata, config, why",
    [
        (tensors(alpha=2), None, SOURCES, "alpha is 2 by its tensor and 8 by .*adapter_config.json: say which one holds"),
        (tensors("unet.x", alpha=2), META, None, "alpha is 2 by its tensor and 8 by lora_adapter_metadata"),
        (tensors("lora_unet_q", 4), RECORD, None, "alpha is 4 by its tensor and 2 by ss_network_alpha"),
        (tensors(), None, {"lora_alpha": 8, "r": 2}, "says rank 2 of 'net.to_q', its factors have rank 4"),
        (tensors(), None, {"lora_alpha": "8"}, "lora_alpha is '8', expected a finite number"),
        (tensors(), None, {"lora_alpha": True}, "lora_alpha is True, expected a finite number"),
        (tensors(), None, {"lora_alpha": 8, "alpha_pattern": {"(": 1}}, r"alpha_pattern '\(': "),
        (tensors(), None, {"lora_alpha": 8, "alpha_pattern": [1]}, r"alpha_pattern is \[1\], expected an object"),
        (tensors("unet.x"), {"lora_adapter_metadata": "{"}, None, "lora_adapter_metadata is not JSON"),
        (tensors("unet.x"), {"lora_adapter_metadata": "[]"}, None, r"lora_adapter_metadata is '\[\]', expected a JSON object"),
    ],
)  # fmt: skip
def test_conflicts_and_nonsense(tmp_path, content, metadata, config, why):
    path = tmp_path / "adapter_model.safetensors"
    write(path, content, metadata)
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (entry,) = inspect_adapter(path).unmatched
    assert re.search(why, entry.reason), entry.reason


@pytest.mark.parametrize(
    "source, scale", [("tensor", 0.5), ("configuration", 2), ("rank", 1), ("metadata", 1)]
)
def test_the_user_says_which_one_holds(tmp_path, source, scale):
    assert layer(tmp_path / "a", tensors(alpha=2), None, SOURCES, alpha_from=source).scale == scale


def test_an_unknown_source(tmp_path):
    with pytest.raises(
        FileFormatError, match="alpha from 'magic': expected one of tensor, metadata"
    ):
        layer(tmp_path / "a", tensors(), alpha_from="magic")


def test_a_broken_configuration(tmp_path):
    write(tmp_path / "adapter_model.safetensors", tensors())
    for text, why in (("{", "is not JSON"), ("[1]", "expected a JSON object")):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(FileFormatError, match=f"adapter_config.json: is .*{why}|{why}"):
            inspect_adapter(tmp_path)


def test_the_engine_and_a_folder(tmp_path):
    write(tmp_path / "adapter_model.safetensors", tensors(alpha=2))
    (tmp_path / "adapter_config.json").write_text(json.dumps(SOURCES))
    net = Engine({"net.to_q": Linear(np.zeros((6, 8)))}, device="cpu", dtype="f64")
    with pytest.raises(FileFormatError, match="say which one holds"):
        net.attach(tmp_path, name="a")
    report = net.attach(tmp_path, name="a", alpha_from="configuration")
    assert report.layers[0].scale == 2 and report.dialects == ("peft",)
    assert (net.merged().layers["net.to_q"].weight == 8).all()


def test_rounded_alphas_agree():
    """An alpha that was stored in bf16 is not another alpha."""
    alphas = Alphas({"ss_network_dim": "4", "ss_network_alpha": "10.6"})
    assert alphas.find("lora_unet_x", "x", 10.625, 4, False) == (10.625, "")
    with pytest.raises(FileFormatError, match="alpha is 10.8 by its tensor and 10.6"):
        alphas.find("lora_unet_x", "x", 10.8, 4, False)


def test_rank_stabilised():
    assert Configuration({"lora_alpha": 3, "use_rslora": True}).alpha("x", 9) == 3 * math.sqrt(9)


def test_full_lokr_has_no_use_for_alpha(tmp_path):
    write(tmp_path / "a.safetensors", {"lora_unet_q.lokr_w1": np.ones((2, 2)), "lora_unet_q.lokr_w2": np.ones((4, 3))},
          {"ss_network_dim": "4", "ss_network_alpha": "2"})  # fmt: skip
    found, _ = read_adapter(tmp_path / "a.safetensors", {"q": LayerShape.of_file((8, 6))})
    assert found["q"][0].scale == 1
