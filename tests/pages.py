"""The pages of the documentation, their blocks, and the files that their commands need."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from lycoris_cupy import Conv2d, Engine, Linear
from lycoris_cupy.io.convert import convert_file

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
_FENCE = re.compile(r"^[ \t]*(```+|~~~+)(.*)$", re.M)


@dataclass(frozen=True)
class Block:
    """language: the word after the fence. line: of the page, where the text begins."""

    language: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    """Every fenced block of a page, in order."""
    fences = list(_FENCE.finditer(page))
    assert len(fences) % 2 == 0, "a block that does not end"
    out = []
    for begin, end in zip(fences[::2], fences[1::2], strict=True):
        assert not end[2].strip(), f"a block ends with {end[0]!r}"
        text = page[begin.end() + 1 : end.start()]
        out.append(Block(begin[2].strip(), text, page.count("\n", 0, begin.end()) + 2))
    return out


def commands(block: Block) -> list[str]:
    """The lines of a shell block, without those that are empty or a remark."""
    lines = (line.strip() for line in block.text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def make_files(folder: Path) -> None:
    """A model in one file and in two, what became of it by training, adapters for it in several
    algorithms and dialects, the log of a run: the names that the pages' commands use.
    """
    rng = np.random.default_rng(0)
    model = {
        "conv_in.weight": rng.standard_normal((32, 3, 3, 3), np.float32) / 5,
        "attn.to_q.weight": rng.standard_normal((32, 32), np.float32) / 5,
        "proj.weight": rng.standard_normal((8, 32), np.float32) / 5,
        "proj.bias": rng.standard_normal(8, np.float32),
    }
    save_file(model, folder / "model.safetensors")
    _checkpoints(folder, model, rng)
    engine = Engine(
        {
            "conv_in": Conv2d.from_torch(model["conv_in.weight"], padding=1),
            "attn.to_q": Linear.from_torch(model["attn.to_q.weight"]),
            "proj": Linear.from_torch(model["proj.weight"], model["proj.bias"]),
        },
        device="cpu",
    )
    kinds = {
        "style": ("locon", {"rank": 16}),
        "pose": ("loha", {"rank": 2}),
        "dylora": ("dylora", {"rank": 8}),
        "dora": ("locon", {"rank": 4, "dora": "output"}),
        "oft": ("diag-oft", {"rank": 4}),
    }
    for name, (algorithm, options) in kinds.items():
        engine.add(name, algorithm, **options)
        values = {
            layer: {n: v + rng.standard_normal(v.shape) / 9 for n, v in factors.items()}
            for layer, factors in engine.parameters(name).items()
        }
        engine.set_parameters(name, values)
        engine.save_adapter(name, folder / f"{name}.safetensors")
        engine.detach(name)
    lines = [{"step": s, "seconds": s / 5, "loss": 1 / s, "grad_norm": 2 / s} for s in range(1, 9)]
    (folder / "run").mkdir()
    (folder / "run/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = folder / "model.safetensors"
    convert_file(folder / "style.safetensors", folder / "my-peft-adapter", "peft", base=base)


def _checkpoints(folder: Path, model: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    shutil.copy(folder / "model.safetensors", folder / "base.safetensors")
    tuned = dict(model)
    for name in ("conv_in.weight", "attn.to_q.weight"):
        out, inner = model[name].shape[0], model[name][0].size
        change = rng.standard_normal((out, 2)) @ rng.standard_normal((2, inner)) / 50
        tuned[name] = (model[name] + change.reshape(model[name].shape)).astype(np.float32)
    save_file(tuned, folder / "tuned.safetensors")
    shards = folder / "transformer"
    shards.mkdir()
    names = sorted(model)
    where = {}
    for i, part in enumerate((names[:2], names[2:])):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-00002.safetensors"
        save_file({name: model[name] for name in part}, shards / file)
        where |= dict.fromkeys(part, file)
    size = sum(array.nbytes for array in model.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (shards / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (shards / "config.json").write_text("{}")
