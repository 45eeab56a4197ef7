"""Writing in pieces: by threads, by the system's own copy, and where neither is to be had."""

import errno
import os
import threading
import time

import numpy as np
import pytest

from lycoris_cupy.errors import FileFormatError
from lycoris_cupy.io.atomic import replacing, require_place
from lycoris_cupy.io.output import in_threads
from lycoris_cupy.io.safetensors import Stored, dump, open_file, write


@pytest.fixture
def source(tmp_path):
    tensors = {
        f"t{i}": np.random.default_rng(i).integers(0, 256, 1000 * i, np.uint8) for i in range(9)
    }
    write(tmp_path / "a.safetensors", tensors)
    return tmp_path / "a.safetensors"


def copied(source, workers=0, **more):
    """The file once more, tensors passed on bit for bit, and whether it is the same."""
    out = source.with_name("b.safetensors")
    with open_file(source) as file, replacing(out) as handle:
        tensors = {name: file.stored(name) for name in file}
        dump(handle, tensors, workers=workers, **more)
    return out.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_copies(source, workers):
    seen = []
    assert copied(source, workers, progress=lambda *at: seen.append(at))
    size = os.path.getsize(source)
    assert seen == sorted(seen) and seen[-1] == (size, size)


@pytest.mark.parametrize("missing", ["copy_file_range", "pwrite", "preadv"])
def test_systems_without(source, monkeypatch, missing):
    for name in {"copy_file_range", missing}:  # so that the others are used
        monkeypatch.delattr(os, name, raising=False)
    assert copied(source) and copied(source, workers=3)


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EINVAL, errno.ENOSYS])
def test_files_between_which_the_system_cannot_copy(source, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    assert copied(source)


@pytest.mark.parametrize("call", ["copy_file_range", "pwrite"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk_says_how_far_it_got(source, monkeypatch, call, workers):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=r"cannot be written, \d+ of \d+ bytes done: No space left"):
        copied(source, workers)
    assert sorted(os.listdir(source.parent)) == ["a.safetensors"]


def test_a_source_that_is_cut_while_it_is_copied(source, monkeypatch):
    with open_file(source) as file:
        tensors = {name: file.stored(name) for name in file}
        os.truncate(source, os.path.getsize(source) - 100)
        with pytest.raises(OSError, match="bytes done: the source ended"):
            with replacing(source.with_name("b.safetensors")) as handle:
                dump(handle, tensors)
        with pytest.raises(
            FileFormatError, match="tensor 't8' has 8000 bytes, the file ends after"
        ):
            file.raw("t8")


def test_threads_make_what_they_write():
    """Each has memory of its own, and writes it before it makes the next."""
    memory = threading.local()
    done = []

    def make(i):
        if not hasattr(memory, "array"):
            memory.array = np.empty(50, np.uint8)
        memory.array[:] = i
        time.sleep(0.001)
        done.append((threading.get_ident(), (memory.array == i).all()))

    in_threads([lambda i=i: make(i) for i in range(40)], 4)
    assert len(done) == 40 and all(same for _, same in done) and len({t for t, _ in done}) > 1


@pytest.mark.parametrize("workers", [0, 3])
def test_the_first_error_is_raised_and_the_rest_is_not_begun(workers):
    begun = []

    def task(i):
        begun.append(i)
        time.sleep(0.005)
        if i >= 3:
            raise ValueError(i)

    with pytest.raises(ValueError, match="3"):
        in_threads([lambda i=i: task(i) for i in range(50)], workers)
    assert len(begun) < 30


def test_made_tensors_in_threads(tmp_path):
    scratch = threading.local()

    def make(i):
        scratch.array = getattr(scratch, "array", np.empty(3000, np.float32))
        scratch.array[:] = i
        return scratch.array

    tensors = {f"t{i}": Stored("F32", (3000,), lambda i=i: make(i)) for i in range(30)}
    with replacing(tmp_path / "a.safetensors") as handle:
        dump(handle, tensors, workers=4)
    with open_file(tmp_path / "a.safetensors") as file:
        assert all((file[f"t{i}"] == i).all() for i in range(30))


def test_places(tmp_path):
    require_place(tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="cannot be written: No such file or directory"):
        require_place(tmp_path / "none" / "new")
    with pytest.raises(NotADirectoryError, match="cannot be written: Not a directory"):
        require_place(tmp_path / "file" / "new")
