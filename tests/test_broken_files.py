"""Broken files, each with the one line that the command line says of it: never a traceback, never
an output.
"""

import struct

import numpy as np
import pytest

from lycoris_cupy import cli
from lycoris_cupy.io.safetensors import write

UP, DOWN = np.ones((8, 2), np.float32), np.ones((2, 12), np.float32)
BASE = {
    "unet.a.q.weight": (8, 12),
    "unet.a_q.weight": (8, 12),
    "unet.net.k.weight": (8, 12),
    "unet.conv.weight": (6, 4, 3, 3),
    "unet.double_blocks.0.img_attn.qkv.weight": (24, 8),
}


def lora(module, up=UP, down=DOWN, words=("lora_up.weight", "lora_down.weight")):
    return {f"{module}.{words[0]}": up, f"{module}.{words[1]}": down}


AB = ("lora_B.weight", "lora_A.weight")
K = "lora_unet_net_k"
HEADER = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
Q = "lora_unet_transformer_blocks_0_attn_to_q"

# name: (bytes, or tensors; metadata; configuration), what is said.
FILES = {
    "empty": ((b"",), "has 0 bytes, expected at least the 8 of the header's length"),
    "a torch zip": ((b"PK\x03\x04" + bytes(60),), "is a zip archive, as torch.save writes: load it with torch"),
    "a pickle": ((b"\x80\x02}q\x00(X\x04\x00\x00\x00" + bytes(40),), "is a pickle, as torch.save writes"),
    "a pointer": ((b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",), "is a Git LFS pointer: git lfs pull gets"),
    "a web page": ((b"<!doctype html><html><body>404</body></html>",), "is a web page: the download went wrong"),
    "a gguf": ((b"GGUF\x03\x00\x00\x00" + bytes(40),), "is a GGUF file"),
    "truncated": ((struct.pack("<Q", len(HEADER)) + HEADER + bytes(4),), "tensor 'x' ends at byte 8, but the file has only 4 bytes of data"),
    "cut in the header": ((struct.pack("<Q", 5000) + HEADER,), "the header claims 5000 bytes, but only 54 follow"),
    "too long": ((struct.pack("<Q", len(HEADER)) + HEADER + bytes(12),), "4 bytes follow the last tensor"),
    "no json": ((struct.pack("<Q", 8) + b"notjson!",), "the header is not JSON"),
    "NaN": ((lora(K, UP * np.nan),), f"module '{K}' on layer 'unet.net.k': lora_up.weight has 16 values of 16 that are NaN"),
    "infinite alpha": ((lora(K) | {f"{K}.alpha": np.array(np.inf)},), "alpha is inf, expected a finite number"),
    "half": (({f"{K}.lora_up.weight": UP},), "lora_down.weight is missing beside lora_up.weight"),
    "swapped sides": ((lora(K, DOWN, UP),), "on layer 'unet.net.k': lora_down.weight has shape (8, 2), expected"),
    "another model": ((lora("lora_unet_elsewhere_k"),), "nothing in the file matches any of the 5 layers"),
    "another size": ((lora(K, np.ones((8, 2)), np.ones((2, 16))),), "lora_down.weight has shape (2, 16), expected (2, 12) on Linear(12 -> 8)"),
    "a linear for a convolution": ((lora("lora_unet_conv", np.ones((6, 2)), np.ones((2, 4))),), "has shape (2, 4), expected (2, 4, 3, 3) on Conv2d"),
    "two layers of one name": ((lora("lora_unet_a_q"),), "module 'lora_unet_a_q' could mean any of 'unet.a.q', 'unet.a_q': rename all but one"),
    "one factor twice": ((lora(K) | {f"{K}.lora_A.weight": DOWN},), f"'{K}.lora_A.weight' and '{K}.lora_down.weight' are both lora_down.weight of module"),
    "one layer twice": ((lora(K) | lora("lora_transformer_net_k"),), "'lora_transformer_net_k' and 'lora_unet_net_k' both mean 'unet.net.k'; remove one"),
    "fused and split": ((lora(Q, np.ones((8, 2)), np.ones((2, 8))) | lora("lora_unet_double_blocks_0_img_attn_qkv", np.ones((24, 2)), np.ones((2, 8))),),
                        "duplicate layer after name folding: modules 'lora_unet_double_blocks_0_img_attn_qkv' and"),
    "two algorithms": ((lora(K) | {f"{K}.diff": np.ones((8, 12))},), "has keys of several algorithms, expected one: locon"),
    "an unknown key": ((lora(K) | {f"{K}.lora_middle": UP},), "unknown key 'lora_middle', expected keys among"),
    "x-labs": (({"double_blocks.0.processor.qkv_lora1.down.weight": UP},), "is named as by x-labs, which is not read; the dialects that are read: lycoris"),
    "no adapter": (({"model.layers.0.weight": UP},), "model.layers.0.weight: is in no dialect that is known"),
    "integers": ((lora(K, UP.astype(np.int8)),), "lora_up.weight has dtype I8, expected one of BF16, F16"),
    "an embedding": (({"base_model.model.net.k.lora_embedding_A": UP},), "lora_embedding_A is a LoRA of an embedding, which is not supported"),
    "two alphas": ((lora("base_model.model.net.k", words=AB) | {"base_model.model.net.k.alpha": np.array(1.0)}, None, '{"lora_alpha": 8, "r": 2}'),
                   "alpha is 1 by its tensor and 8 by"),
    "a record of another alpha": ((lora(K) | {f"{K}.alpha": np.array(1.0)}, {"ss_network_dim": "2", "ss_network_alpha": "2"}),
                                  "alpha is 1 by its tensor and 2 by ss_network_alpha: say which one holds (alpha_from, or --alpha-from"),
    "a broken configuration": ((lora("base_model.model.net.k", words=AB), None, "{"), "adapter_config.json: is not JSON"),
    "another rank": ((lora("base_model.model.net.k", words=AB), None, '{"lora_alpha": 8, "r": 16}'), "says rank 16 of 'net.k', its factors have rank 2"),
    "broken metadata": ((lora("unet.net.k", words=AB), {"lora_adapter_metadata": "{"}), "lora_adapter_metadata is not JSON"),
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("m.safetensors", {name: np.zeros(shape, np.float32) for name, shape in BASE.items()})
    return tmp_path


def make(content, metadata=None, configuration=None):
    if isinstance(content, bytes):
        with open("adapter_model.safetensors", "wb") as handle:
            handle.write(content)
    else:
        write("adapter_model.safetensors", content, metadata)
    if configuration is not None:
        with open("adapter_config.json", "w") as handle:
            handle.write(configuration)


@pytest.mark.parametrize("what", FILES)
def test_a_broken_file_is_one_line(here, capsys, what):
    content, message = FILES[what]
    make(*content)
    before = sorted(path.name for path in here.iterdir())
    for command in (
        ["merge", "m.safetensors", "adapter_model.safetensors", "-o", "out"],
        [
            "convert",
            "adapter_model.safetensors",
            "out",
            "--to",
            "lycoris",
            "--base",
            "m.safetensors",
        ],
    ):
        assert cli.main(command) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("lycoris-cupy: error: ") and "Traceback" not in err
        assert message in err or (
            command[0] == "convert" and what in ("another model", "no adapter")
        )
        assert before == sorted(path.name for path in here.iterdir())
    code = cli.main(["inspect", "adapter_model.safetensors", "--base", "m.safetensors"])
    out, err = capsys.readouterr()
    if what in ("one layer twice", "fused and split"):
        assert code == 0 and "the same layer as" in out
    elif code == 1:
        assert "not read:" in out and "Traceback" not in out
    else:  # it cannot be opened
        assert code == 2 and message in err
    assert before == sorted(path.name for path in here.iterdir())
