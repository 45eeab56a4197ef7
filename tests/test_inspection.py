"""Inspection: figures against the dense change, what looks wrong, the page, and differences."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lycoris_cupy import Engine, Full, LayerShape, Linear, LoCon, LoHa, bf16
from lycoris_cupy.adapters import Adapter
from lycoris_cupy.errors import MatchError
from lycoris_cupy.io.adapter_file import write_adapter
from lycoris_cupy.io.charts import bars, sparkline, spectra
from lycoris_cupy.io.convert import convert_file
from lycoris_cupy.io.diff import diff_files
from lycoris_cupy.io.inspection import inspect_file
from lycoris_cupy.io.page import page, write_page
from lycoris_cupy.io.safetensors import write
from tests.cases import KINDS, adapters_for
from tests.test_spectrum import dense, random_params

SHAPE = LayerShape.of_file((8, 12))


def lora(rank=3, seed=0, **factors):
    adapter = LoCon(SHAPE, rank, 6.0)
    return adapter, random_params(adapter, seed) | factors


def inspected(folder, adapters, base=None, **options):
    write_adapter(folder / "a.safetensors", adapters)
    return inspect_file(folder / "a.safetensors", base, **options)


@pytest.mark.parametrize(
    "kind", [k for k in KINDS if k.shape.window.groups == 1], ids=lambda k: k.name
)
def test_figures_are_those_of_the_dense_change(tmp_path, kind):
    table = {name.replace(" ", "_"): a for name, a in adapters_for(kind.shape).items()
             if type(a).svd is not Adapter.svd}  # fmt: skip
    adapters = {name: (a, random_params(a, i)) for i, (name, a) in enumerate(table.items())}
    rng = np.random.default_rng(9)
    weights = {f"{name}.weight": rng.standard_normal(kind.weight) for name in adapters}
    write(tmp_path / "m.safetensors", weights)
    found = inspected(tmp_path, adapters, tmp_path / "m.safetensors")
    assert len(found.figures) == len(adapters) and not found.report.unmatched
    for one in found.figures:
        change = dense(*adapters[one.layer.layer])
        values = np.linalg.svd(change, compute_uv=False)
        assert one.norm == pytest.approx(np.linalg.norm(change))
        weight = np.linalg.norm(weights[f"{one.layer.layer}.weight"])
        assert one.relative == pytest.approx(one.norm / weight)
        shares = values[values > 0] / values.sum()
        assert one.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
        count = min(len(one.spectrum), len(values))
        assert np.allclose(one.spectrum[:count], values[:count], atol=1e-9 * values[0])
        assert one.used == np.linalg.matrix_rank(change)
    told = found.as_dict()
    json.dumps(told, allow_nan=False)
    assert told["layers"][0]["layer"] == min(adapters) and told["layers"][0]["norm"] > 0


WRONG = {
    "untrained": (lora(up=np.zeros((3, 8))), r"changes nothing \(up is all zero\): untrained\?"),
    "dead ranks": (lora(up=np.diag([1.0, 1, 0]) @ np.ones((3, 8)) + np.eye(3, 8)[[0, 1, 1]] * [[1], [1], [0]]), "1 of 3 ranks carry nothing"),
    "huge value": (lora(down=np.full((12, 3), 2e4)), "a factor has a value of 2e"),
    "scale": ((LoCon(SHAPE, 2, 64.0), random_params(LoCon(SHAPE, 2))), "a scale of 32"),
    "negative": ((LoCon(SHAPE, 2, -2.0), random_params(LoCon(SHAPE, 2))), "a negative scale, -1"),
    "half a loha": ((LoHa(SHAPE, 2), random_params(LoHa(SHAPE, 2)) | {"w2_up": np.zeros((2, 8))}), "changes nothing"),
    "a bias of zero": ((Full(SHAPE, bias=True), {"diff": np.ones((12, 8)), "diff_b": np.zeros(8)}), "diff_b is all zero"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_looks_wrong(tmp_path, what):
    adapter, match = WRONG[what]
    sound = {f"layer.{i}": lora(seed=i) for i in range(3)}
    found = inspected(tmp_path, sound | {"bad": adapter})
    assert [one.layer.module for one in found.suspicious] == ["lycoris_bad"]
    note = "; ".join(found.suspicious[0].notes)
    assert re.search(match, note), note
    assert f"looks wrong:\n  lycoris_bad: {note}" in found.text()


def test_a_layer_far_larger_than_the_others(tmp_path):
    adapters = {f"layer.{i}": lora(seed=i) for i in range(5)} | {
        "bad": lora(up=np.full((3, 8), 300.0))
    }
    found = inspected(tmp_path, adapters)
    (one,) = found.suspicious
    assert re.search(r"the change is \d+ times that of the median", "; ".join(one.notes))
    write(tmp_path / "m.safetensors", {f"{n}.weight": np.full((8, 12), 100.0) for n in adapters})
    found = inspect_file(tmp_path / "a.safetensors", tmp_path / "m.safetensors")
    assert re.search(r"the change is [\d.]+ times the weight", "; ".join(found.suspicious[0].notes))


def test_one_layer_twice_and_others_that_are_not_read(tmp_path):
    up, down = np.ones((8, 2)), np.ones((2, 12))
    tensors = {}
    for module in ("lora_unet_a", "lora_transformer_a", "lora_unet_b", "lora_unet_nowhere"):
        tensors |= {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}
    tensors["lora_unet_b.lora_up.weight"] = np.full((8, 2), np.nan)
    write(tmp_path / "a.safetensors", tensors)
    found = inspect_file(tmp_path / "a.safetensors")
    assert [one.notes for one in found.suspicious] == [
        ("1 of 2 ranks carry nothing", "the same layer as lora_unet_a"),
        ("1 of 2 ranks carry nothing", "the same layer as lora_transformer_a"),
        ("1 of 2 ranks carry nothing",),
    ]
    (entry,) = found.report.unmatched
    assert entry.reason == "lora_up.weight has 16 values of 16 that are NaN or infinite"
    write(
        tmp_path / "m.safetensors",
        {"unet.a.weight": np.ones((8, 12)), "unet.b.weight": np.ones((9, 12))},
    )
    found = inspect_file(tmp_path / "a.safetensors", tmp_path / "m.safetensors")
    reasons = {entry.name: entry.reason for entry in found.report.unmatched}
    assert reasons["lora_unet_nowhere"] == "no layer has this name"
    assert "NaN" in reasons["lora_unet_b"]
    assert "on 2 of 2 layers" in found.report.summary()


def test_progress_and_alpha(tmp_path):
    seen = []
    found = inspected(
        tmp_path, {"a": lora(), "b": lora()}, alpha_from="rank", progress=lambda *p: seen.append(p)
    )
    assert seen == [(1, 2), (2, 2)] and {one.layer.scale for one in found.figures} == {1}


class _Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def test_the_page(tmp_path):
    """One file that needs nothing else, in which nothing of a file's is markup."""
    evil = "x<script>alert(1)</script>&\"'"
    adapters = {
        "block.2.q": lora(),
        "block.10.q": lora(seed=1),
        "block.1.q": lora(up=np.zeros((3, 8))),
    }
    write_adapter(
        tmp_path / "a.safetensors",
        adapters | {evil: lora(seed=2)},
        metadata={"modelspec.title": evil},
    )
    write_page(tmp_path / "a.html", inspect_file(tmp_path / "a.safetensors"))
    text = (tmp_path / "a.html").read_text()
    parsed = _Tags(text)
    kinds = [tag for tag, _ in parsed.tags]
    assert kinds.count("script") == 1 and kinds.count("table") == 2 and "img" not in kinds
    assert not re.search(r"https?://|url\(|@import|src=|href=", text)
    assert kinds.count("tr") - 1 == 4 + 3  # the head, a row a layer, rows of metadata
    order = [d for d in parsed.words if re.fullmatch(r"lycoris_block_\d+_q", d)]
    assert order[-3:] == ["lycoris_block_1_q", "lycoris_block_2_q", "lycoris_block_10_q"]
    assert "Looks wrong: 1" in text and "prefers-color-scheme:dark" in text
    assert 'class="bar mark"' in text and "<title>lycoris_block_10_q: " in text


def test_a_page_of_a_base_and_one_of_nothing(tmp_path):
    write(tmp_path / "m.safetensors", {"a.weight": np.full((8, 12), 100.0)})
    text = page(inspected(tmp_path, {"a": lora()}, tmp_path / "m.safetensors"))
    assert (
        "|dW| / |W| of each layer" in text
        and "1 of 1 modules" in text
        and "Nothing looks wrong" in text
    )
    write(tmp_path / "b.safetensors", {"loose": np.ones(2)})
    text = page(inspect_file(tmp_path / "b.safetensors"))
    assert "Looks wrong: 1" in text and "<svg" not in text


def test_charts_of_odd_values():
    assert "1e-05" not in bars([0.0, 0.0], ["a", "b"], [False, True], "|dW|")
    log = bars([1.0, 1.1, 0.9, 500.0], list("abcd"), [False] * 4, "|dW|")
    assert all(f">{tick}<" in log for tick in ("1", "10", "100"))
    linear = bars([1.0, 2.0, 4.0], list("abc"), [False] * 3, "|dW|")
    assert all(f">{tick}<" in linear for tick in ("0", "1", "2", "3"))
    assert bars([], [], [], "x") and spectra([]) and spectra([[1.0]]) and spectra([[0.0, 0.0]])
    assert sparkline([]) == "" == sparkline([0.0]) and "circle" in sparkline([2.0])
    assert spectra([[4.0, 2.0, 1.0], [8.0, 4.0, 2.0]]).count("<circle") == 3
    assert not re.search("nan|inf", log + linear + spectra([[1.0, 0.0]]))


def test_diff(tmp_path):
    a = {
        "same": lora(seed=1),
        "more": lora(seed=2),
        "gone": lora(seed=3),
        "other": lora(seed=4),
        "shape": lora(seed=7),
    }
    scaled = lora(seed=2)[1]
    small = LoCon(LayerShape.of_file((6, 12)), 2)
    b = {"same": a["same"], "more": (a["more"][0], scaled | {"up": scaled["up"] * 1.25}), "new": lora(seed=5),
         "other": (LoCon(SHAPE, 3, 3.0), a["other"][1] | {"up": a["other"][1]["up"] * 2}), "shape": (small, random_params(small))}  # fmt: skip
    write_adapter(tmp_path / "a.safetensors", a)
    write_adapter(tmp_path / "b.safetensors", b)
    found = diff_files(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    told = {one.layer: one for one in found.layers}
    assert {name: one.what for name, one in told.items()} == {
        "same": "same", "more": "changed", "gone": "only in A", "other": "equal", "shape": "not comparable", "new": "only in B",
    }  # fmt: skip
    assert (
        told["more"].by == pytest.approx(0.25)
        and told["other"].detail == "locon rank 3, scale 2 -> locon rank 3, scale 1"
    )
    assert not found.same and found.count("changed") == 1
    head = found.text().splitlines()[0].rpartition(": ")[2]
    assert sorted(head.split(", ")) == sorted(f"1 {one.what}" for one in found.layers)
    assert "more: changed by 0.25" in found.text()
    json.dumps(found.as_dict(), allow_nan=False)
    assert diff_files(tmp_path / "a.safetensors", tmp_path / "a.safetensors").same


def test_diff_across_dialects_and_algorithms(tmp_path):
    """A conversion against what it was made of: equal; in a narrower dtype: changed a little."""
    adapter = LoHa(SHAPE, 2, 3.0)
    write_adapter(
        tmp_path / "a.safetensors",
        {"q": (adapter, random_params(adapter))},
        dtype=np.dtype(np.float32),
        prefix="lora_unet_",
    )
    write(tmp_path / "m.safetensors", {"unet.q.weight": np.ones((8, 12), np.float32)})
    base = tmp_path / "m.safetensors"
    paths = [tmp_path / f"{x}.safetensors" for x in "abc"]
    convert_file(paths[0], paths[1], "diffusers", algorithm="lora", base=base)
    assert diff_files(paths[0], paths[1], base).same and diff_files(paths[0], paths[1]).same
    convert_file(paths[1], paths[2], "lycoris", dtype=np.dtype(bf16), lossy=True)
    (one,) = diff_files(paths[1], paths[2]).layers  # LyCORIS does not say the part
    assert one.what == "changed" and 1e-4 < one.by < 1e-2


def test_diff_of_files_that_name_a_layer_twice(tmp_path):
    tensors = {}
    for module in ("lora_unet_a", "lora_transformer_a"):
        tensors |= {
            f"{module}.lora_up.weight": np.ones((8, 1)),
            f"{module}.lora_down.weight": np.ones((1, 12)),
        }
    write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(
        MatchError, match="modules 'lora_transformer_a' and 'lora_unet_a' both mean 'a'; remove one"
    ):
        diff_files(tmp_path / "a.safetensors", tmp_path / "a.safetensors")


def test_a_long_list_is_cut_in_the_text(tmp_path):
    """A checkpoint given for an adapter: the text stays readable, JSON has every key."""
    write(tmp_path / "m.safetensors", {f"model.layers.{i}.weight": np.ones(2) for i in range(100)})
    found = inspect_file(tmp_path / "m.safetensors")
    assert len(found.text().splitlines()) < 70 and "and 40 more (--json has all)" in found.text()
    assert len(found.as_dict()["unmatched"]) == 100


def test_diff_sees_magnitudes_and_biases(tmp_path):
    """What stands beside the factors is part of what a file does."""
    layer = Linear(np.ones((6, 4), np.float32), np.zeros(4, np.float32))
    engine = Engine({"proj": layer}, device="cpu")
    engine.add("a", "locon", rank=2, dora="output")
    engine.save_adapter("a", tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    (key,) = (name for name in tensors if name.endswith("dora_scale"))
    save_file({**tensors, key: 2 * tensors[key]}, tmp_path / "b.safetensors")
    (found,) = diff_files(tmp_path / "a.safetensors", tmp_path / "b.safetensors").layers
    assert found.what == "changed" and found.by == pytest.approx(1)
    assert "magnitudes per output by 1" in found.detail
    del tensors[key]
    bias = np.arange(4, dtype=np.float32)
    module = key.removesuffix("dora_scale")
    for name, values in (("c", bias), ("d", 3 * bias), ("e", 0 * bias)):
        save_file({**tensors, f"{module}diff_b": values}, tmp_path / f"{name}.safetensors")
    save_file(tensors, tmp_path / "f.safetensors")
    for other, what in (("c", "same"), ("d", "changed"), ("e", "changed"), ("f", "changed")):
        got = diff_files(tmp_path / "c.safetensors", tmp_path / f"{other}.safetensors")
        assert [one.what for one in got.layers] == [what], other
        assert what == "same" or "the bias by" in got.layers[0].detail
    assert diff_files(tmp_path / "e.safetensors", tmp_path / "f.safetensors").same
