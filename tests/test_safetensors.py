"""Safetensors files: each rule has its error, reading agrees with the library, writing is all or
nothing.
"""

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from lycoris_cupy.errors import DtypeError, FileFormatError
from lycoris_cupy.io import atomic
from lycoris_cupy.io import safetensors as ours
from lycoris_cupy.io.header import BITS, NUMPY
from lycoris_cupy.io.safetensors import Stored, open_file, write


def raw_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def one(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}, **more}


def random_array(rng, dtype, shape):
    count = int(np.prod(shape)) * dtype.itemsize
    raw = rng.integers(0, 2 if dtype == np.dtype(bool) else 256, count, dtype=np.uint8)
    return raw.view(dtype).reshape(shape)


EIGHT = b"\0" * 8
B = {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}
BROKEN = {
    "not JSON": (b"{", b"", r"the header is not JSON"),
    "no UTF-8": (b'{"\xff":1}', b"", r"the header is not JSON"),
    "byte order mark": (b"\xef\xbb\xbf{}", b"", r"the header is not JSON"),
    "UTF-16": ("{}".encode("utf-16"), b"", r"the header is not JSON"),
    "half a surrogate pair": (b'{"__metadata__":{"\\ud800":"x"}}', b"", r"the header is not JSON"),
    "NaN": (b'{"a":NaN}', b"", r"NaN is no JSON number"),
    "nested deep": (b"[" * 100_000, b"", r"the header is not JSON"),
    "long number": (b'{"a":' + b"9" * 5000 + b"}", b"", r"the header is not JSON"),
    "trailing text": (b"{}x", b"", r"the header is not JSON"),
    "no object": (b"[1]", b"", r"the header is \[1\], expected a JSON object"),
    "duplicate key": (b'{"a":1,"a":2}', b"", r"the header names 'a' twice"),
    "duplicate field": (b'{"a":{"dtype":"F32","dtype":"F32"}}', b"", r"the header names 'dtype' twice"),
    "metadata number": (one(__metadata__={"k": 1}), EIGHT, r"__metadata__ is \{'k': 1\}, expected an object"),
    "metadata list": (one(__metadata__=["k"]), EIGHT, r"__metadata__ is \['k'\], expected an object of strings"),
    "entry": ({"a": ["F32", [2], [0, 8]]}, EIGHT, r"tensor 'a' is \['F32', .*expected an object with dtype, shape"),
    "field missing": ({"a": {"dtype": "F32", "shape": []}}, EIGHT, r"tensor 'a' is .*expected an object with dtype"),
    "dtype": (one("F31"), EIGHT, r"tensor 'a' has dtype 'F31', expected one of F64, F32"),
    "dtype list": (one(["F32"]), EIGHT, r"tensor 'a' has dtype \['F32'\], expected one of"),
    "shape": (one(shape=(-2,)), EIGHT, r"tensor 'a' has shape \[-2\], expected at most 64 extents of 0 or more"),
    "shape bool": (one(shape=(True, 2)), EIGHT, r"tensor 'a' has shape \[True, 2\], expected"),
    "shape float": (one(shape=(2.0,)), EIGHT, r"tensor 'a' has shape \[2.0\], expected"),
    "axes": (one(shape=(1,) * 64 + (2,)), EIGHT, r"expected at most 64 extents"),
    "offsets negative": (one(offsets=(-8, 0)), EIGHT, r"data_offsets \[-8, 0\], expected two byte counts of 0 or more"),
    "offsets three": (one(offsets=(0, 4, 8)), EIGHT, r"data_offsets \[0, 4, 8\], expected two byte counts"),
    "offsets reversed": (one(offsets=(8, 0)), EIGHT, r"tensor 'a' has data_offsets \[8, 0\], which run backwards"),
    "out of the file": (one(offsets=(8, 16)), EIGHT, r"tensor 'a' ends at byte 16, but the file has only 8 bytes"),
    "byte count": (one(shape=(3,)), EIGHT, r"tensor 'a' has 8 bytes, expected 12 for F32 of shape \[3\]"),
    "half a byte": (one("F4", (3,), (0, 2)), EIGHT[:2], r"tensor 'a' has 2 bytes, expected 1.5 for F4 of shape \[3\]"),
    "huge": (one(shape=(0, 2**62, 2**62), offsets=(0, 0)), b"", r"too large for any array"),
    "overlap": (one(b=B), EIGHT, r"'b' starts at byte 4, inside 'a', which ends at 8"),
    "hole": (one(shape=(1,), offsets=(4, 8)), EIGHT, r"bytes 0 to 4, before tensor 'a', belong to no tensor"),
    "empty inside": (one(b={**B, "shape": [0], "data_offsets": [4, 4]}), EIGHT, r"'b' starts at byte 4, inside 'a'"),
    "trailing bytes": (one(shape=(1,), offsets=(0, 4)), EIGHT, r"4 bytes follow the last tensor, expected none"),
}  # fmt: skip


@pytest.mark.parametrize("rule", BROKEN)
def test_each_rule_has_its_error(tmp_path, rule):
    header, data, match = BROKEN[rule]
    path = raw_file(tmp_path / "broken.safetensors", header, data)
    with pytest.raises(FileFormatError, match=rf"broken\.safetensors: .*{match}"):
        open_file(path)


def test_too_short(tmp_path):
    for size in (0, 7):
        path = tmp_path / f"{size}.safetensors"
        path.write_bytes(b"\0" * size)
        with pytest.raises(
            FileFormatError,
            match=rf"has {size} bytes, expected at least the 8 of the header's length",
        ):
            open_file(path)


@pytest.mark.parametrize("claim", [3, 1 << 30, 2**64 - 1])
def test_a_header_longer_than_the_file_is_never_allocated(tmp_path, claim):
    path = raw_file(tmp_path / "a.safetensors", b"{}", length=claim)
    tracemalloc.start()
    try:
        with pytest.raises(
            FileFormatError, match=rf"the header claims {claim} bytes, but only 2 follow: truncated"
        ):
            open_file(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_header_beyond_the_librarys_limit(tmp_path):
    path = tmp_path / "a.safetensors"
    with open(path, "wb") as handle:
        handle.write(struct.pack("<Q", 200_000_000))
        handle.truncate(8 + 200_000_000)  # sparse
    with pytest.raises(
        FileFormatError, match="the header has 200000000 bytes, expected at most 100000000"
    ):
        open_file(path)


def test_what_only_the_library_refuses(tmp_path):
    path = raw_file(
        tmp_path / "a.safetensors", b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'
    )
    with pytest.raises(FileFormatError, match=r"a\.safetensors: Error while deserializing header"):
        open_file(path)


def test_not_a_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "none.safetensors")
    with pytest.raises(FileFormatError, match="is not a regular file"):
        open_file(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # opening one would wait for a writer
    with pytest.raises(FileFormatError, match="is not a regular file"):
        open_file(tmp_path / "pipe")


def test_truncated_after_it_was_opened(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, {"a": np.zeros(1000, np.float32)})
    with open_file(path) as file:
        os.truncate(path, os.path.getsize(path) - 1)
        with pytest.raises(
            FileFormatError, match=r"tensor 'a' has 4000 bytes, the file ends after 3999"
        ):
            file["a"]


def test_every_dtype_reads_as_the_library_reads_it(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.safetensors"
    arrays = {name: random_array(rng, dtype, (3, 5)) for name, dtype in NUMPY.items()}
    specs = {
        n: safetensors.TensorSpec(
            dtype=a.dtype.name, shape=a.shape, data_ptr=a.ctypes.data, data_len=a.nbytes
        )
        for n, a in arrays.items()
        if n not in ("F8_E8M0", "C64")
    }
    safetensors.serialize_file(specs, path, metadata={"k": "v"})
    with open_file(path) as file:
        assert set(file) == set(specs) and len(file) == len(specs) and file.metadata == {"k": "v"}
        for name, array in arrays.items():
            assert (name in file) == (name in specs)
            if name in specs:
                assert file.dtype(name) == name and file.shape(name) == (3, 5)
                assert file[name].dtype == array.dtype and file[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_packed_dtypes_pass_through_but_are_no_arrays(tmp_path, dtype):
    data = bytes(range(BITS[dtype]))
    path = raw_file(tmp_path / "a.safetensors", one(dtype, (2, 4), (0, len(data))), data)
    with open_file(path) as file:
        with pytest.raises(
            FileFormatError, match=f"tensor 'a' is packed {dtype}, which has no array"
        ):
            file["a"]
        write(tmp_path / "b.safetensors", {"a": file.stored("a")})
    with open_file(tmp_path / "b.safetensors") as file:
        assert (
            file.dtype("a") == dtype
            and file.shape("a") == (2, 4)
            and file.raw("a").tobytes() == data
        )


def test_only_the_tensor_asked_for_is_read(tmp_path):
    size = 1 << 40  # sparse: reading it would take an hour
    header = one(
        "U8", (size,), (8, 8 + size), small={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    )
    path = raw_file(tmp_path / "a.safetensors", header, np.array([1, 2], np.float32).tobytes())
    os.truncate(path, os.path.getsize(path) + size)
    with open_file(path) as file:
        assert file["small"].tolist() == [1, 2] and file.shape("a") == (size,)


# -- any input
# --------------------------------------------------------------------------------------------------

COUNTS = st.one_of(
    st.integers(0, 24), st.sampled_from([-1, 4, 8, 2**63, 2**64, True, None, 1.5, "1"])
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "F31", None]),
        "shape": st.one_of(st.lists(COUNTS, max_size=3), st.just({})),
        "data_offsets": st.lists(COUNTS, min_size=1, max_size=3),
    },
    optional={"extra": st.none()},
)
HEADERS = st.dictionaries(
    st.sampled_from(["a", "b", "", "\u00e9", "__metadata__"]),
    st.one_of(ENTRIES, st.dictionaries(st.text(), st.text())),
)


def agrees(path):
    """Ours refuses with its own error, or reads what the library reads."""
    try:
        file = open_file(path)
    except FileFormatError as error:
        assert str(error).startswith(f"{path}: ")
        return False
    with file, safetensors.safe_open(path, "np") as library:
        assert set(file) == set(library.keys())
        assert file.metadata == (library.metadata() or {})
        for name in file:
            part = library.get_slice(name)
            assert (file.dtype(name), list(file.shape(name))) == (
                part.get_dtype(),
                part.get_shape(),
            )
            if file.dtype(name) in NUMPY:
                assert file[name].shape == file.shape(name)
    return True


@given(
    st.one_of(st.binary(max_size=64), HEADERS.map(lambda h: json.dumps(h).encode())),
    st.binary(max_size=24),
)
def test_any_header_reads_right_or_is_refused(tmp_path_factory, header, data):
    agrees(raw_file(tmp_path_factory.getbasetemp() / "any.safetensors", header, data))


@given(st.binary(max_size=200))
def test_any_bytes_read_right_or_are_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "bytes.safetensors"
    path.write_bytes(data)
    agrees(path)


@given(
    st.sampled_from(["a", "b", "c"]),
    st.sampled_from(["dtype", "shape", "data_offsets"]),
    st.one_of(st.sampled_from(sorted(BITS)), st.lists(COUNTS, max_size=3)),
)
def test_a_header_with_one_wrong_field(tmp_path_factory, name, field, value):
    header = one(
        b={**B, "dtype": "F16", "shape": [2, 1], "data_offsets": [8, 12]}, c={**B, "shape": [0]}
    )
    header["c"]["data_offsets"] = [12, 12]
    path = tmp_path_factory.getbasetemp() / "header.safetensors"
    assert agrees(raw_file(path, header, EIGHT + EIGHT[:4]))
    header[name][field] = value
    agrees(raw_file(path, header, EIGHT + EIGHT[:4]))


@given(st.integers(0, 10_000), st.integers(0, 255), st.sampled_from(["flip", "cut", "insert"]))
def test_a_damaged_file_reads_right_or_is_refused(tmp_path_factory, at, byte, how):
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    write(
        path, {"x.alpha": np.array(3, np.float32), "x.b": np.ones((2, 3), np.float16)}, {"k": "v"}
    )
    data = bytearray(path.read_bytes())
    at %= len(data)
    data[at : at + (how != "insert")] = b"" if how == "cut" else bytes([byte])
    path.write_bytes(data)
    assert not agrees(path) or how == "flip"  # another size never fits


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
    lambda n: n != "__metadata__"
)


@given(
    st.dictionaries(
        NAMES,
        st.tuples(st.sampled_from(sorted(NUMPY)), st.lists(st.integers(0, 4), max_size=4)),
        max_size=6,
    ),
    st.dictionaries(NAMES, NAMES, max_size=3),
    st.randoms(use_true_random=False),
)
def test_what_is_written_is_read_by_both(tmp_path_factory, forms, metadata, random):
    rng = np.random.default_rng(random.getrandbits(32))
    tensors = {
        name: random_array(rng, NUMPY[dtype], tuple(shape))
        for name, (dtype, shape) in forms.items()
    }
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    write(path, tensors, metadata)
    assert agrees(path)
    with open_file(path) as file:
        assert file.metadata == metadata and set(file) == set(tensors)
        for name, array in tensors.items():
            assert file[name].dtype == array.dtype and file[name].shape == array.shape
            assert file[name].tobytes() == array.tobytes()


# -- writing
# --------------------------------------------------------------------------------------------------


def test_arrays_of_any_order_are_written_right(tmp_path):
    a = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    odd = {
        "turned": a.T,
        "strided": a[:, ::2, ::3],
        "big": a.astype(">f4"),
        "zero": np.array(7.0),
        "read": np.broadcast_to(a, (2, 2, 3, 4)),
    }
    write(tmp_path / "a.safetensors", odd)
    with open_file(tmp_path / "a.safetensors") as file:
        for name, array in odd.items():
            assert file.shape(name) == array.shape and (file[name] == array).all()


def test_every_tensor_starts_at_a_multiple_of_its_item_size(tmp_path):
    tensors = {
        "a": np.ones(3, np.int8),
        "b": np.ones(3, np.float16),
        "c": np.ones(3),
        "d": np.ones(3, np.float32),
    }
    write(tmp_path / "a.safetensors", tensors)
    data = (tmp_path / "a.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    assert length % 8 == 0
    for name, entry in json.loads(data[8 : 8 + length]).items():
        assert entry["data_offsets"][0] % tensors[name].itemsize == 0


def listing(folder):
    return sorted(os.listdir(folder))


def failing(error):
    def read():
        raise error

    return {"a": np.ones(5000, np.float32), "b": Stored("F32", (3,), read)}


REFUSED = {
    "dtype": (
        {"a": np.ones(2, np.complex128)},
        None,
        DtypeError,
        "tensor 'a' has dtype complex128, expected one of",
    ),
    "name": (
        {"__metadata__": np.ones(2)},
        None,
        FileFormatError,
        "a tensor cannot be named '__metadata__'",
    ),
    "metadata": (
        {},
        {"k": 1},
        FileFormatError,
        r"metadata is \{'k': 1\}, expected a mapping from str to str",
    ),
    "a tensor that fails": (failing(ZeroDivisionError("x")), None, ZeroDivisionError, "x"),
    "Ctrl-C": (failing(KeyboardInterrupt("stop")), None, KeyboardInterrupt, "stop"),
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("what", REFUSED)
def test_a_failed_write_leaves_what_was_there(tmp_path, what, old):
    tensors, metadata, kind, match = REFUSED[what]
    path = tmp_path / "a.safetensors"
    if old:
        path.write_bytes(b"old")
    with pytest.raises(kind, match=match):
        write(path, tensors, metadata)
    assert listing(tmp_path) == (["a.safetensors"] if old else [])
    assert not old or path.read_bytes() == b"old"


def test_too_much_metadata(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "MAX_HEADER", 1000)
    with pytest.raises(
        FileFormatError, match="the header would have 1... bytes, expected at most 1000: shorten"
    ):
        write(tmp_path / "a.safetensors", {}, {"k": "x" * 1001})
    assert listing(tmp_path) == []


def test_too_little_space_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(
        OSError, match="cannot be written: 40.. bytes are needed, 100 are free"
    ) as caught:
        write(tmp_path / "a.safetensors", {"a": np.ones(1000, np.float32)})
    assert caught.value.errno == errno.ENOSPC and listing(tmp_path) == []


def test_no_room_half_way(tmp_path):
    """A limit on the size of files, as a full disk: for real, in another process."""
    (tmp_path / "a.safetensors").write_bytes(b"old")
    code = (
        "import resource, signal, sys, numpy as np\n"
        "from lycoris_cupy.io.safetensors import write\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))\n"
        "try:\n    write(sys.argv[1], {'a': np.ones(10_000_000, np.float32)})\n"
        "except OSError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "cannot be written, 20000000 of 40000" in done.stdout and "File too large" in done.stdout
    assert (
        listing(tmp_path) == ["a.safetensors"]
        and (tmp_path / "a.safetensors").read_bytes() == b"old"
    )


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    tensors = {"a": np.ones(1)}
    with pytest.raises(
        FileNotFoundError, match="cannot be written: No such file or directory.*none/a.safetensors"
    ):
        write(tmp_path / "none" / "a.safetensors", tensors)
    with pytest.raises(IsADirectoryError, match="cannot be written: is a directory"):
        write(tmp_path, tensors)

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", "somewhere else")

    monkeypatch.setattr(atomic, "open", refuse, raising=False)
    with pytest.raises(
        PermissionError, match=r"cannot be written: Permission denied.*a\.safetensors"
    ):
        write(tmp_path / "a.safetensors", tensors)


def test_links_and_permissions_stay(tmp_path):
    path, link = tmp_path / "a.safetensors", tmp_path / "link.safetensors"
    path.write_bytes(b"old")
    path.chmod(0o640)
    link.symlink_to(path)
    write(link, {"a": np.ones(1)})
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o640
    with open_file(path) as file:
        assert file["a"] == 1


def test_the_file_and_its_name_are_on_the_disk(tmp_path, monkeypatch):
    """fsync of the file before it takes its name, and of the directory after."""
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(os.path.isdir(f"/proc/self/fd/{fd}")), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    write(tmp_path / "a.safetensors", {"a": np.ones(1)})
    assert events == [False, "replace", True]


def test_progress_counts_bytes(tmp_path):
    seen = []
    with atomic.replacing(tmp_path / "a.safetensors") as handle:
        ours.dump(handle, {"a": np.ones(10), "b": np.ones(0)}, progress=lambda *at: seen.append(at))
    size = os.path.getsize(tmp_path / "a.safetensors")
    assert seen == [(size - 80, size), (size, size)]
