"""Where and with what a measurement was made."""

from __future__ import annotations

import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lycoris_cupy.arrays import gpu_missing

ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict:
    """Machine, versions, commit and date. On a machine without a GPU `gpu` is ''."""
    found = {
        "gpu": "",
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "numpy": package("numpy"),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }
    if gpu_missing():
        return found
    import cupy
    from cupy_backends.cuda.libs import nvrtc

    runtime = cupy.cuda.runtime
    return {
        **found,
        "gpu": runtime.getDeviceProperties(0)["name"].decode(),
        "driver": driver(),
        "cuda_driver": runtime.driverGetVersion(),
        "cuda_runtime": runtime.runtimeGetVersion(),
        "nvrtc": ".".join(map(str, nvrtc.getVersion())),
        "cupy": cupy.__version__,
        "nvmath": package("nvmath-python"),
        "cublaslt": _cublaslt(),
        "cudnn_frontend": package("nvidia-cudnn-frontend"),
        "cudnn": _cudnn(),
    }


def package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit, with '+' if files differ from it; '' outside a repository."""

    def git(*words):
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        return head + "+" * bool(head and git("status", "--porcelain", "--untracked-files=no"))
    except OSError:  # no git on this machine
        return ""


def driver() -> str:
    """The version of the kernel driver; '' where the system does not tell."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return ""
    return next((w for w in words if w.count(".") >= 1 and w[0].isdigit()), "")


def _cublaslt() -> str:
    def found():
        from nvmath.bindings import cublasLt

        return cublasLt.get_version()

    return _told(found)


def _cudnn() -> str:
    if not package("nvidia-cudnn-frontend"):
        return ""

    def found():
        import cudnn

        return cudnn.backend_version()

    return _told(found)


def _told(ask) -> str:
    """A library's version, or why it tells none: no reason to measure nothing."""
    try:
        return str(ask())
    except Exception as error:
        return f"unknown: {error}"
