"""The CUDA sources: where they are, their includes expanded, and what they say of themselves.

A .cu file is the signature of its kernels, `extern "C" __global__ void NAME(op)(parameters)`, and
lists the define sets it may be compiled with in `// variants` lines. Refused: a declaration or a
line that cannot be read.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from .arrays import DTYPES
from .errors import KernelError

_PACKAGE = Path(__file__).parent
_WORD = r"[A-Za-z_]\w*"


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel: `const T* x` is Parameter('x', 'T', pointer=True, const=True)."""

    name: str
    type: str
    pointer: bool
    const: bool

    def __str__(self) -> str:
        return f"{'const ' * self.const}{self.type}{'*' * self.pointer} {self.name}"


@functools.cache
def source_folder() -> Path:
    """Where the .cu files are: inside the package in a wheel, at the top of the repository in a
    checkout.
    """
    for folder in (_PACKAGE / "cuda_src", _PACKAGE.parent / "cuda_src"):
        if folder.is_dir():
            return folder
    raise KernelError(
        f"the CUDA sources are missing: neither {_PACKAGE / 'cuda_src'} nor "
        f"{_PACKAGE.parent / 'cuda_src'} exists; reinstall lycoris_cupy"
    )


def expand(file: str) -> str:
    """The text of cuda_src/file with each `#include "x.cuh"` replaced by that file's text, compiled
    once.

    The guard is the preprocessor's, so that an include inside an #if that is not taken does not
    count.
    """
    return _expand(source_folder() / file, ())


def _expand(path: Path, inside: tuple[Path, ...]) -> str:
    if not path.is_file():
        raise KernelError(
            f"{path} does not exist" + (f", but {inside[-1].name} includes it" if inside else "")
        )
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        include = re.match(r'\s*#\s*include\s+"([^"]+)"', line)
        if include and path.parent / include[1] not in inside:
            guard = "INCLUDED_" + re.sub(r"\W", "_", include[1])
            inner = _expand(path.parent / include[1], (*inside, path))
            lines += [f"#ifndef {guard}", f"#define {guard}", inner + "#endif"]
        elif not include and not re.match(r"\s*#\s*pragma\s+once", line):
            lines.append(line)
    return "\n".join(lines) + "\n"


def signatures(source: str) -> dict[str, tuple[Parameter, ...]]:
    """The kernels that a source declares: `extern "C" __global__ void [__cluster_dims__(...)]
    [__launch_bounds__(...)] NAME(op)(parameters)`.
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", source, flags=re.DOTALL)
    found: dict[str, tuple[Parameter, ...]] = {}
    for match in re.finditer(r'extern\s+"C"\s+__global__\s+void\s+', text):
        at = match.end()
        for word in ("__cluster_dims__", "__launch_bounds__"):
            if sizes := re.compile(rf"\s*{word}\s*").match(text, at):
                at = _closing(text, sizes.end()) + 1
        name = re.compile(rf"\s*NAME\s*\(\s*({_WORD})\s*\)\s*").match(text, at)
        if not name:
            raise KernelError(
                f"a kernel is not declared as NAME(op)(...): {text[at : at + 60].strip()!r}"
            )
        inside = text[name.end() + 1 : _closing(text, name.end())]
        parameters = tuple(
            _parameter(p) for p in inside.split(",") if p.strip() not in ("", "void")
        )
        if found.setdefault(name[1], parameters) != parameters:
            raise KernelError(f"kernel {name[1]} is declared twice, with different parameters")
    return found


def _closing(text: str, at: int) -> int:
    """The index of the parenthesis that closes the one at `at`."""
    depth = 0
    for i in range(at, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise KernelError(f"a parenthesis is never closed: {text[at : at + 60]!r}")


def _parameter(text: str) -> Parameter:
    words = re.findall(
        rf"{_WORD}|\*", re.sub(r"\b(__restrict__|__grid_constant__|struct)\b", " ", text)
    )
    const = "const" in words
    words = [w for w in words if w != "const"]
    if len(words) < 2 or words.count("*") > 1:
        raise KernelError(f"cannot read the kernel parameter {text.strip()!r}")
    return Parameter(words[-1], " ".join(w for w in words[:-1] if w != "*"), "*" in words, const)


def define_sets(source: str) -> dict[str, list[dict[str, str]]]:
    """Per dtype, the define sets that a source lists: `// variants bf16: BLOCK=64 VEC=1 | none`.

    `// variants:` speaks for every dtype that has no line of its own. A file with lines for some
    dtypes only is compiled for those only; one without any line has one empty set for each. Lines
    of one dtype add up.
    """
    listed: dict[str, list[dict[str, str]]] = {}
    for names, text in re.findall(r"^//\s*variants([\w ]*):(.*)$", source, flags=re.MULTILINE):
        sets = []
        for alternative in text.split("|"):
            words = [] if alternative.split() == ["none"] else alternative.split()
            sets.append(dict(w.split("=", 1) for w in words))
        for name in names.split() or ["all"]:
            if name not in DTYPES and name != "all":
                raise KernelError(
                    f"'// variants {names.strip()}:' names {name!r}, expected {', '.join(DTYPES)}"
                )
            listed.setdefault(name, []).extend(sets)
    if not listed:
        listed = {"all": [{}]}
    return {
        name: listed.get(name) or listed["all"]
        for name in DTYPES
        if name in listed or "all" in listed
    }


def architectures(source: str) -> list[str]:
    """The only targets that a source compiles for, of its `// only sm_90a` line; empty for all."""
    return [
        a for line in re.findall(r"^// only (sm_.*)$", source, re.MULTILINE) for a in line.split()
    ]


def variants() -> list[tuple[str, str, dict[str, str]]]:
    """Every (file, dtype, defines) that the package can compile, on some architecture."""
    out = []
    for path in sorted(source_folder().glob("*.cu")):
        for dtype, sets in define_sets(expand(path.name)).items():
            out += [(path.name, dtype, defines) for defines in sets]
    return out
