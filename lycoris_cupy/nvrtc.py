"""NVRTC: a source and its defines to machine code, for any architecture, cached on disk.

The cache key is the expanded source, the options, the architecture and the compiler's version. A
cache that cannot be written is no error: the code then lives in a scratch folder of the process.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import tempfile
from pathlib import Path

from .cuda_source import expand
from .errors import KernelError

# --no-cache: NVRTC's own cache would give the code without the log that says what it uses.
_OPTIONS = ("--std=c++17", "-ftz=true", "--ptxas-options=-v", "--no-cache")
_WORD = r"[A-Za-z_]\w*"


def _nvrtc():
    try:
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
    except (
        Exception
    ) as error:  # CuPy raises ImportError, RuntimeError or its own kinds for a missing library
        raise KernelError(
            f"NVRTC cannot be loaded ({error}): "
            'pip install "lycoris_cupy[cuda12]" brings CuPy and NVRTC'
        ) from error
    return nvrtc


def arch_of(capability: str) -> str:
    """The compile target for a device's compute capability ('90' -> 'sm_90a'); PTX if NVRTC does
    not know it yet.
    """
    known = sorted(_nvrtc().getSupportedArchs())
    number = int(capability)
    if number in known:
        return f"sm_{number}" + ("a" if number in (90, 100) else "")
    older = [k for k in known if k <= number]
    if not older:
        raise KernelError(
            f"compute capability {capability} is older than any that NVRTC compiles for: {known}"
        )
    return f"compute_{older[-1]}"


def compile_source(
    file: str, dtype: str, arch: str, defines: dict | None = None
) -> tuple[bytes, str]:
    """(machine code, compiler's log) of cuda_src/file for one storage dtype and arch ('sm_90a').
    Needs no GPU.

    Raises KernelError with the compiler's log.
    """
    return _compile(expand(file), file, _options(dtype, arch, defines or {}))


def _options(dtype: str, arch: str, defines: dict) -> tuple[str, ...]:
    named = (f"-D{name}={value}" for name, value in sorted(defines.items()))
    return (*_OPTIONS, f"-arch={arch}", f"-DT_{dtype.upper()}", *named)


def _compile(source: str, file: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    nvrtc = _nvrtc()
    program = nvrtc.createProgram(source, file, (), ())
    try:
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            raise KernelError(
                f"{file} does not compile with {' '.join(options)}: {error}\n{log}"
            ) from error
        log = nvrtc.getProgramLog(program)
        if any(o.startswith("-arch=compute_") for o in options):
            code = nvrtc.getPTX(program)
            return (code.encode() if isinstance(code, str) else bytes(code)), log
        return nvrtc.getCUBIN(program), log
    finally:
        nvrtc.destroyProgram(program)


def resources(log: str) -> dict[str, tuple[int, int, int, int]]:
    """{kernel: (registers, spill store bytes, spill load bytes, stack bytes)} of a log."""
    kernel_of = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    found = re.findall(kernel_of, log, flags=re.DOTALL)
    return {
        name: (int(used), int(out), int(into), int(stack)) for name, stack, out, into, used in found
    }


def cache_folder() -> Path:
    """The user's cache of compiled kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lycoris_cupy"


def cache_key(source: str, options: tuple[str, ...]) -> str:
    """sha256 over what the machine code depends on: expanded source, options (with the arch),
    NVRTC's version.
    """
    text = "\0".join([source, *options, str(_nvrtc().getVersion())])
    return hashlib.sha256(text.encode()).hexdigest()


def _cached(key: str) -> Path | None:
    # The name carries the digest of the content, so a truncated or foreign file is never given to
    # the driver.
    try:
        for path in cache_folder().glob(f"{key}-*"):
            if path.name == f"{key}-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.bin":
                return path
    except OSError:
        pass
    return None


def _store(key: str, code: bytes) -> Path:
    # Written beside and renamed, so that another process never sees half of it.
    name = f"{key}-{hashlib.sha256(code).hexdigest()[:16]}.bin"
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        return _write(folder, name, code)
    except OSError:  # no home, read-only or full: this process goes without a cache
        return _write(Path(_scratch().name), name, code)


def _write(folder: Path, name: str, code: bytes) -> Path:
    handle, beside = tempfile.mkstemp(dir=folder, prefix="new-")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(code)
        os.replace(beside, folder / name)
    except BaseException:
        os.unlink(beside)
        raise
    return folder / name


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="lycoris_cupy-")  # removed when the process ends


@functools.cache
def binary(file: str, dtype: str, arch: str, defines: tuple, fresh: bool = False) -> str:
    """The path of the machine code; compiled if the cache has none, or `fresh` says that what it
    has is no good.
    """
    source, options = expand(file), _options(dtype, arch, dict(defines))
    key = cache_key(source, options)
    path = None if fresh else _cached(key)
    return str(path or _store(key, _compile(source, file, options)[0]))
