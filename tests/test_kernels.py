"""Kernels without a GPU: each compiles for each arch with no spill; sources, arguments, cache."""

import functools

import numpy as np
import pytest

from lycoris_cupy import cublaslt, cuda_source, gemm, kernels, nvrtc
from lycoris_cupy.arrays import bf16
from lycoris_cupy.errors import DtypeError, KernelError, ShapeError
from lycoris_cupy.ops import conv_plan
from lycoris_cupy.ops.window import Window

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")

try:
    nvrtc._nvrtc()
    NVRTC = ""
except KernelError as error:
    NVRTC = str(error)
needs_nvrtc = pytest.mark.skipif(bool(NVRTC), reason=NVRTC)

SOURCE = """
// variants bf16: BLOCK=64 | BLOCK=128 FAST=1
// variants f32: none
#include "types.cuh"
/* extern "C" __global__ void NAME(gone)(int n) */
extern "C" __global__ void __launch_bounds__((64 + 64), 2) NAME(axpy)(
    const T* __restrict__ x,  // (n), with a comma and a )
    const A* scale, float* sums, T* out,
    int taps, long long n, const A factor, const Shape shape) {
  const long long i = blockIdx.x * 64 + threadIdx.x;
  if (i < n) out[i] = narrow(widen(x[i]) * *scale * factor);
}
extern "C" __global__ void NAME(nothing)(void) {}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cuda_src of its own, and no cached launchers of it left behind."""
    (tmp_path / "types.cuh").write_text((cuda_source.source_folder() / "types.cuh").read_text())
    (tmp_path / "axpy.cu").write_text(SOURCE)
    monkeypatch.setattr(cuda_source, "source_folder", lambda: tmp_path)
    yield tmp_path
    kernels._kernel.cache_clear()


# -- every kernel of the package -------------------------------------------------------------------


@functools.cache
def cases():
    return sorted({(file, dtype) for file, dtype, _ in cuda_source.variants()})


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("file, dtype", cases())
def test_every_variant_compiles_without_spills(file, dtype, arch):
    only = cuda_source.architectures(cuda_source.expand(file))
    if only and arch not in only:
        with pytest.raises(KernelError):  # it says so, and it is so
            _, __, defines = next(v for v in cuda_source.variants() if v[:2] == (file, dtype))
            nvrtc.compile_source(file, dtype, arch, defines)
        return
    declared = {f"{op}_{dtype}" for op in cuda_source.signatures(cuda_source.expand(file))}
    compiled = set()
    for name, kind, defines in cuda_source.variants():
        if (name, kind) == (file, dtype):
            code, log = nvrtc.compile_source(file, dtype, arch, defines)
            used = nvrtc.resources(log)
            assert code[:4] == b"\x7fELF" and used
            spilled = {k: v for k, v in used.items() if any(v[1:])}
            assert not spilled, f"{defines}: (registers, stores, loads, stack) {spilled}"
            assert all(registers <= 255 for registers, *_ in used.values())
            compiled |= used.keys()
    assert compiled == declared  # no kernel is left out of every define set


def test_every_declared_kernel_can_be_launched_by_name():
    for file, dtype, defines in cuda_source.variants():
        for op in cuda_source.signatures(cuda_source.expand(file)):
            assert kernels.kernel(file, op, dtype, **defines).name == f"{op}_{dtype}"


# -- reading a source ------------------------------------------------------------------------------


def test_signatures(folder):
    found = cuda_source.signatures(cuda_source.expand("axpy.cu"))
    assert list(found) == ["axpy", "nothing"]
    assert [str(p) for p in found["axpy"]] == [
        "const T* x", "const A* scale", "float* sums", "T* out", "int taps", "long long n",
        "const A factor", "const Shape shape",
    ]  # fmt: skip
    assert found["nothing"] == ()


@pytest.mark.parametrize(
    "text, message",
    [
        ('extern "C" __global__ void plain(int n) {}', r"not declared as NAME\(op\)"),
        ('extern "C" __global__ void NAME(f)(int) {}', r"cannot read the kernel parameter 'int'"),
        ('extern "C" __global__ void NAME(f)(T** x) {}', r"cannot read the kernel parameter"),
        ('extern "C" __global__ void NAME(f)(int n', r"never closed"),
        (
            'extern "C" __global__ void NAME(f)(int n) {}\n'
            'extern "C" __global__ void NAME(f)(T* n) {}',
            r"f is declared twice",
        ),
    ],
)
def test_signatures_that_cannot_be_read(text, message):
    with pytest.raises(KernelError, match=message):
        cuda_source.signatures(text)


def test_define_sets(folder):
    listed = cuda_source.define_sets(cuda_source.expand("axpy.cu"))
    assert listed == {"bf16": [{"BLOCK": "64"}, {"BLOCK": "128", "FAST": "1"}], "f32": [{}]}
    assert cuda_source.define_sets("no lines") == {"bf16": [{}], "f32": [{}], "f64": [{}]}
    mixed = cuda_source.define_sets("// variants: A=1\n// variants f64: A=2\n")
    assert mixed == {"bf16": [{"A": "1"}], "f32": [{"A": "1"}], "f64": [{"A": "2"}]}
    with pytest.raises(KernelError, match="names 'fp8', expected bf16, f32, f64"):
        cuda_source.define_sets("// variants fp8: A=1")
    assert ("axpy.cu", "bf16", {"BLOCK": "64"}) in cuda_source.variants()


def test_a_define_set_that_is_not_listed_is_refused(folder):
    assert kernels.kernel("axpy.cu", "axpy", bf16, BLOCK=64).defines == {"BLOCK": "64"}
    with pytest.raises(KernelError, match="does not list the define set 'BLOCK=32' for bf16"):
        kernels.kernel("axpy.cu", "axpy", "bf16", BLOCK=32)
    with pytest.raises(KernelError, match="does not list the define set 'none' for bf16"):
        kernels.kernel("axpy.cu", "axpy", "bf16")
    with pytest.raises(KernelError, match="not made for f64"):
        kernels.kernel("axpy.cu", "axpy", np.float64)
    with pytest.raises(KernelError, match="no kernel 'axpby'; it has axpy, nothing"):
        kernels.kernel("axpy.cu", "axpby", "bf16")


def test_includes_are_expanded_and_guarded(folder):
    (folder / "one.cuh").write_text('#pragma once\n#include "two.cuh"\nint one;\n')
    (folder / "two.cuh").write_text('#include "one.cuh"\nint two;\n')  # a ring
    (folder / "ring.cu").write_text('#include "one.cuh"\n  # include "two.cuh"\n')
    text = cuda_source.expand("ring.cu")
    assert "#include" not in text and "pragma" not in text
    assert text.count("#ifndef INCLUDED_two_cuh") == text.count("int two;") == 2
    with pytest.raises(KernelError, match=r"gone\.cu does not exist"):
        cuda_source.expand("gone.cu")
    (folder / "ring.cu").write_text('#include "gone.cuh"\n')
    with pytest.raises(KernelError, match=r"gone\.cuh does not exist, but ring\.cu includes it"):
        cuda_source.expand("ring.cu")


@needs_nvrtc
def test_the_cache_key_follows_headers_options_and_arch(folder):
    def key(**changed):
        options = nvrtc._options(*({"dtype": "f32", "arch": "sm_80"} | changed).values(), {})
        return nvrtc.cache_key(cuda_source.expand("axpy.cu"), options)

    before = key()
    assert before == key()
    assert len({before, key(dtype="f64"), key(arch="sm_90a")}) == 3
    with (folder / "types.cuh").open("a") as header:
        header.write("// another word\n")
    assert key() != before


def test_missing_sources_say_where_they_were_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_source, "_PACKAGE", tmp_path / "lycoris_cupy")
    with pytest.raises(KernelError, match=r"CUDA sources are missing.*reinstall"):
        cuda_source.source_folder.__wrapped__()


@needs_nvrtc
def test_an_error_of_the_compiler_is_shown(folder):
    (folder / "broken.cu").write_text('#include "types.cuh"\nint f() { return nonsense; }\n')
    message = r'(?s)broken\.cu does not compile.*"nonsense" is undefined'
    with pytest.raises(KernelError, match=message):
        nvrtc.compile_source("broken.cu", "f32", "sm_80")


def test_resources_of_a_log():
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a_bf16' for 'sm_90a'
ptxas info    : Function properties for a_bf16
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'b_bf16' for 'sm_90a'
ptxas info    : Function properties for b_bf16
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 7 registers
"""
    assert nvrtc.resources(log) == {"a_bf16": (32, 4, 12, 8), "b_bf16": (7, 0, 0, 0)}


@needs_nvrtc
def test_arch_of_a_device():
    assert [nvrtc.arch_of(c) for c in ("80", "86", "90", "100")] == [
        "sm_80", "sm_86", "sm_90a", "sm_100a",
    ]  # fmt: skip
    assert nvrtc.arch_of("990").startswith("compute_")  # newer than NVRTC: PTX
    with pytest.raises(KernelError, match="capability 30 is older"):
        nvrtc.arch_of("30")


# -- the cache on disk -----------------------------------------------------------------------------


def test_the_cache_survives_what_happens_to_files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert nvrtc._cached("key") is None
    path = nvrtc._store("key", b"code")
    assert path.parent == tmp_path / "lycoris_cupy" and path.read_bytes() == b"code"
    assert nvrtc._cached("key") == path
    path.write_bytes(b"cod")  # cut off
    assert nvrtc._cached("key") is None
    assert nvrtc._store("key", b"code") == path == nvrtc._cached("key")
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing is left beside


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert nvrtc._cached("key") is None
    path = nvrtc._store("key", b"code")
    assert path.read_bytes() == b"code" and tmp_path not in path.parents


# -- arguments -------------------------------------------------------------------------------------


def device_array(shape, dtype):
    """A CuPy array over no memory: enough for what a launch checks."""
    cupy = pytest.importorskip("cupy")
    memory = cupy.cuda.UnownedMemory(1 << 20, 1 << 20, None, 0)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


@pytest.fixture
def launched(folder, monkeypatch):
    """(the launcher, what it passed on), with the launch itself left out."""
    passed = []
    launch = kernels.kernel("axpy.cu", "axpy", "bf16", BLOCK=64)
    monkeypatch.setattr(kernels, "_current_device", lambda: 0)
    launch._loaded[0] = [lambda *args: passed.append(args), None, 48 * 1024]
    return launch, passed


SHAPE = np.zeros((), np.dtype([("n", np.int32), ("m", np.int32)]))


def good():
    x, wide = device_array((4, 4), bf16), device_array((1,), np.float32)
    return [x, wide, wide, x, 3, 10**10, 2.5, SHAPE]


def test_arguments_become_the_exact_c_types(launched):
    launch, passed = launched
    launch((2,), (64,), *good(), shared=16)
    grid, block, values, *more = passed[0]
    assert (grid, block, more) == ((2,), (64,), [16, None, False])
    kinds = [type(v) for v in values[4:7]]
    assert kinds == [np.int32, np.int64, np.float32] and values[4:7] == [3, 10**10, 2.5]
    assert values[7] is SHAPE
    launch((1,), (1,), None, *good()[1:7], SHAPE[()])  # a null pointer; a scalar of the struct
    assert passed[1][2][0] is None and passed[1][2][7].dtype == SHAPE.dtype
    launch((2,), (64,), *good(), together=True)  # the current stream, cooperative
    assert passed[2][3:] == (0, None, True)


@pytest.mark.parametrize(
    "at, value, message",
    [
        (
            0,
            lambda: device_array((4,), np.float32),
            r"argument 0, 'const T\* x', has dtype float32",
        ),
        (0, lambda: device_array((4, 4), bf16)[:, 1:], r"strides \(8, 2\) is not C-contiguous"),
        (
            1,
            lambda: device_array((1,), bf16),
            r"'const A\* scale', has dtype bfloat16, expected fl",
        ),
        (3, lambda: np.zeros(3), r"'T\* out', is ndarray, expected a CuPy array of bfloat16"),
        (3, lambda: 5, r"is int, expected a CuPy array"),
        (4, lambda: 3.0, r"'int taps', is 3.0, expected an integer"),
        (4, lambda: 2**31, r"is 2147483648, which does not fit int32"),
        (4, lambda: np.int64(-(2**31) - 1), r"does not fit int32"),
        (5, lambda: 2**63, r"does not fit int64"),
        (6, lambda: "2", r"'const A factor', is str, expected a number"),
        (6, lambda: np.zeros(1), r"is ndarray, expected a number"),
        (7, lambda: 1, r"'const Shape shape', is int, expected one structured NumPy value"),
        (7, lambda: np.zeros(2, SHAPE.dtype), r"expected one structured NumPy value"),
    ],
)
def test_arguments_that_are_refused(launched, at, value, message):
    launch, passed = launched
    args = good()
    args[at] = value()
    with pytest.raises(KernelError, match=message):
        launch((1,), (64,), *args)
    assert not passed


def test_a_kernel_may_name_its_cluster():
    found = cuda_source.signatures(cuda_source.expand("column_sum.cu"))
    assert [p.name for p in found["column_sum_once"]] == ["x", "scale", "out", "rows", "columns"]


def test_a_launch_of_the_wrong_size_is_refused(launched):
    launch, passed = launched
    with pytest.raises(KernelError, match="axpy_bf16 got 7 arguments, expected 8: const T"):
        launch((1,), (64,), *good()[:-1])
    with pytest.raises(KernelError, match=r"grid \(0, 1\) and block \(64,\) must be at least 1"):
        launch((0, 1), (64,), *good())
    assert not passed


def test_parameters_that_no_argument_fits():
    with pytest.raises(KernelError, match="no array has this type"):
        kernels.converter(cuda_source.Parameter("x", "char", True, True), "f32")
    with pytest.raises(KernelError, match="pass numbers as A"):
        kernels.converter(cuda_source.Parameter("x", "T", False, False), "bf16")


# -- plans of convolutions, and shapes of products -------------------------------------------------


@pytest.mark.parametrize("dtype", [bf16, np.dtype(np.float32)])
def test_plans_of_convolutions(dtype):
    window = Window.of((3, 3), 2, 1)
    plan = conv_plan.plan_conv(dtype, (2, 9, 7, 16), (9, 16, 24), window, True, True, 132)
    assert plan.shape == (2, 5, 4, 24) and plan.numbers == (40, 16, 24, 1, 0)
    assert plan.geometry["from"].tolist() == [1, 9, 7] and plan.geometry["to"].tolist() == [1, 5, 4]
    back = conv_plan.plan_dx(dtype, (2, 5, 4, 24), (9, 16, 24), window, (9, 7), True, True, 132)
    assert back.shape == (2, 9, 7, 16) and back.numbers[0] == 126
    weight = conv_plan.plan_dw(dtype, (2, 9, 7, 16), (2, 5, 4, 24), window, True, True, 132)
    assert weight.shape == (9, 16, 24) and weight.geometry == plan.geometry


def test_tiles_follow_the_shape():
    def tile(rows, columns, copies=(8, 8)):
        return conv_plan.choose_tile(rows, columns, 1, copies, 132)

    assert tile(16384, 640) == (128, 128)
    assert tile(256, 1280) == (64, 64)  # few rows: small tiles fill the device
    assert tile(16384, 16) == (128, 32)
    assert tile(16384, 640, (1, 8)) == tile(16384, 640, (1, 1)) == (64, 64)


def test_depthwise_goes_straight():
    window = Window.of((3,), 1, 1, groups=16)
    for channels, op in ((16, "conv_depthwise"), (48, "conv_narrow")):
        w = (3, channels // 16, channels)
        plan = conv_plan.plan_conv(bf16, (1, 5, channels), w, window, True, True, 132)
        assert plan.launch.op == op
    split = conv_plan.plan_dw(bf16, (8, 4096, 16), (8, 4096, 16), window, True, True, 132)
    assert split.launch.op == "conv_narrow_dw" and split.splits > 1 and split.sum


@pytest.mark.parametrize(
    "splits, elements, shares",
    [(256, 576, 32), (256, 2304, 32), (14, 36864, 1), (43, 36864, 8), (64, 1 << 20, 1), (2, 8, 1)],
)
def test_few_elements_of_many_splits_are_summed_by_several_threads_each(splits, elements, shares):
    _, grid, block, numbers = conv_plan.sum_of_splits(bf16, splits, elements // 8, 1, 8)
    assert block == ((256, 1) if shares == 1 else (32, shares))
    assert grid == (-(-elements // block[0]),) and numbers == (splits, elements // 8, 1, 8)


@pytest.mark.parametrize(
    "x, w, message",
    [
        ((2, 5, 16), (9, 16, 24), r"x has shape \(2, 5, 16\), expected \(N, 2 spatial axes"),
        ((2, 5, 5, 8), (9, 16, 24), r"w has shape .* for 8 channels in 1 groups"),
        ((2, 5, 5, 16), (4, 16, 24), r"w has shape .*expected \(taps 9"),
        ((2, 5, 5, 16), (9, 16, 0), r"at least one channel"),
        ((2**20, 64, 64, 16), (9, 16, 24), r"positions are more than .*split the batch"),
        ((2, 1, 1, 16), (9, 16, 24), r"smaller than the window"),
    ],
)
def test_convolutions_that_are_refused(x, w, message):
    with pytest.raises(ShapeError, match=message):
        conv_plan.plan_conv(bf16, x, w, Window.of((3, 3)), True, True, 132)


def test_gradients_that_are_refused():
    window = Window.of((3, 3))
    with pytest.raises(ShapeError, match=r"dy has shape .*expected \(2, 3, 3, 24\)"):
        conv_plan.plan_dx(bf16, (2, 4, 3, 24), (9, 16, 24), window, (5, 5), True, True, 132)
    with pytest.raises(ShapeError, match=r"dy has shape .*expected \(2, 3, 3, 24\)"):
        conv_plan.plan_dw(bf16, (2, 5, 5, 16), (2, 3, 4, 24), window, True, True, 132)
    with pytest.raises(ShapeError, match="3 groups must divide both"):
        conv_plan.dw_shape((2, 5, 5, 16), (2, 3, 3, 24), window.grouped(3))


def layout(shape, dtype=bf16, strides=None):
    return np.dtype(dtype), shape, strides or np.empty(shape, dtype).strides, 256


@pytest.mark.parametrize(
    "a, b, options, error, message",
    [
        (layout((3, 4)), layout((5, 6)), {}, ShapeError, r"a \(3, 4\) has 4 columns.* has 5 rows"),
        (layout((3, 4)), layout((4,)), {}, ShapeError, "expected 2 axes, or 3 with a batch"),
        (layout((2, 3, 4)), layout((5, 4, 6)), {}, ShapeError, "different batches"),
        (layout((3, 4), "i4"), layout((4, 6), "i4"), {}, DtypeError, "a has dtype int32"),
        (layout((3, 4)), layout((4, 6), "f4"), {}, DtypeError, "a is bfloat16 but b is float32"),
        (layout((3, 4)), layout((4, 6)), {"dtype": "f8"}, DtypeError, "asked for in float64"),
        (layout((3, 4)), layout((4, 6)), {"scale": (bf16, 1)}, DtypeError, "scale is 1 element"),
        (layout((3, 4)), layout((4, 6)), {"add": layout((4, 6))}, ShapeError, "add has shape"),
        (layout((3, 4)), layout((4, 6)), {"out": layout((3, 6), "f8")}, DtypeError, "asked for in"),
        (
            layout((3, 4)),
            layout((4, 6)),
            {"bias": (layout((6,)), 0), "dtype": "f4"},
            DtypeError,
            "add it apart",
        ),
    ],
)
def test_products_that_are_refused(a, b, options, error, message):
    given = {"dtype": None, "add": None, "out": None, "scale": None, "bias": None} | options
    with pytest.raises(error, match=message):
        rest = (given[name] for name in ("add", "out", "scale", "bias"))
        gemm._plan(0, False, False, given["dtype"], a, b, *rest)


def test_rows_that_overlap_are_refused():
    with pytest.raises(ShapeError, match="last axis must be contiguous"):
        cublaslt._matrix(layout((3, 4), strides=(2, 6)), "a", 1)
    with pytest.raises(ShapeError, match="rows must not overlap"):
        cublaslt._matrix(layout((3, 4), strides=(0, 2)), "a", 1)
