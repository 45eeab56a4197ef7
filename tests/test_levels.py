"""The import levels: a file imports only from levels below its own, and CuPy only where a GPU is
certain.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "lycoris_cupy"
LEVELS = [
    {"errors"},
    {"arrays"},
    {
        "cublaslt",
        "cuda_source",
        "nvrtc",
        "kernels",
        "svd",
        "ranks",
        "randomised",
        "tucker",
        "nearest_kron",
        "tape",
        "philox",
        "plan",
        "tensor_map",
        "io.header",
        "io.atomic",
        "io.output",
        "io.rounding",
        "io.safetensors",
        "io.checkpoint",
        "io.shards",
        "io.strength",
    },
    {"gemm"},
    {"ops"},
    {"layers", "losses"},
    {"norms"},
    {"adapters"},
    {
        "spectrum",
        "resize",
        "extraction",
        "io.alpha",
        "io.peft_options",
        "io.dialects",
        "io.keys",
        "io.aliases",
        "io.modules",
        "io.report",
    },
    {"io.names", "io.source"},
    {"io.peft"},
    {"io.placing", "io.exact", "io.suspicions"},
    {
        "io.target",
        "io.conversion",
        "io.change_report",
        "io.peft_config",
        "io.peft_output",
        "io.merge_report",
    },
    {"io.adapter_file", "io.merge_layer", "io.merge"},
    {"io.convert_items", "io.convert", "io.resize", "io.extract"},
    {"io.diff", "io.inspection", "io.charts", "io.page_style"},
    {"io.page"},
    {"attachment", "explain", "graph", "inputs", "optim"},
    {"conditions", "gradients", "merged", "recipe", "topology"},
    {"engine"},
    {""},  # the package itself
    {"train"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


def level_of(name: str) -> int:
    for i, level in enumerate(LEVELS):
        if any(name == entry or (entry and name.startswith(entry + ".")) for entry in level):
            return i
    raise AssertionError(f"{name or 'the package'} has no level: put it into LEVELS")


def imports(path: Path):
    """(module inside the package, or a top-level name) of each import, with its line and whether it
    is inside a function.
    """
    tree = ast.parse(path.read_text())
    package = module_name(path).split(".") if module_name(path) else []
    if path.name != "__init__.py":
        package = package[:-1]
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            if not node.level:
                yield node.module, node.lineno, id(node) in inside
                continue
            base = package[: len(package) - node.level + 1]
            target = ".".join([*base, *(node.module.split(".") if node.module else [])])
            names = [f"{target}.{a.name}".strip(".") for a in node.names]
            for name in names:
                is_file = (PACKAGE / (name.replace(".", "/") + ".py")).exists()
                is_folder = (PACKAGE / name.replace(".", "/")).is_dir()
                yield (
                    "." + (name if is_file or is_folder else target),
                    node.lineno,
                    id(node) in inside,
                )


@pytest.mark.parametrize("path", FILES, ids=lambda p: module_name(p) or "package")
def test_imports_go_down(path):
    name = module_name(path)
    if name in ("io",):  # a folder without content of its own
        assert not path.read_text().strip() or "import" not in path.read_text()
        return
    here = level_of(name)
    for target, line, _ in imports(path):
        if not target.startswith("."):
            continue
        target = target[1:]
        assert level_of(target) <= here, (
            f"{path.name}:{line} imports {target or 'the package'} from above"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda p: module_name(p) or "package")
def test_cupy_is_imported_only_inside_functions(path):
    for target, line, inside in imports(path):
        if target.split(".")[0] in ("cupy", "cupyx", "cupy_backends", "nvmath", "torch"):
            assert inside, f"{path.name}:{line} imports {target} at the top"
            assert target.split(".")[0] != "torch"


def test_import_without_cupy():
    """The package imports, computes and names the reason where CuPy is not installed."""
    code = (
        "import sys; sys.modules['cupy'] = None\n"
        "import numpy as np, lycoris_cupy as lc\n"
        "assert lc.resolve_device('auto') == 'cpu'\n"
        "e = lc.Engine({'a': lc.Linear(np.ones((3, 2), np.float32))}, dtype='f32')\n"
        "assert (e.forward(np.ones((1, 3), np.float32)) == 3).all()\n"
        "try:\n    lc.resolve_device('cuda')\n"
        "except lc.DeviceError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "CuPy cannot be imported" in done.stdout and "cuda12" in done.stdout
