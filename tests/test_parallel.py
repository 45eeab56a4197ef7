"""Several processes train as one does; a lost or failing one stops all, with an error that says so.

The same tests run with two GPUs and NCCL, and with two processes on the CPU.
"""

import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from lycoris_cupy import DeviceError, LycorisError, MatchError, ShapeError
from lycoris_cupy.arrays import to_device
from lycoris_cupy.optim import AdamW, Average
from lycoris_cupy.train import (
    LostProcessError,
    NonFiniteError,
    Step,
    launch,
    parallel,
    read_log,
)
from lycoris_cupy.train.reducers import require_gpus
from tests import training
from tests.training import batch, factors, squared_error, student


def missing(gpus):
    try:
        require_gpus(gpus)
    except DeviceError as error:
        return str(error)
    return ""


def pytest_generate_tests(metafunc):
    if "where" in metafunc.fixturenames:
        few = pytest.mark.skipif(bool(missing(2)), reason=f"GPU row: {missing(2)}")
        metafunc.parametrize("where", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, few])])


STEPS = 12


def train(reducer, out, resume=False, accumulate=1, batches=batch, device=None):
    """A run in this process: alone with reducer None."""
    device = device or reducer.device
    engine = student(device, "f64")
    optimizer = AdamW(engine.parameters("a"), 0.02, clip=0.05)
    # On a GPU f64 would be exact too, but for the order of sums: bounds are those of f64.
    average = Average(optimizer.masters, 0.9)
    training.train(
        engine, optimizer, STEPS, on(device, batches), out=out, resume=resume, log_every=3,
        checkpoint_every=2, average=average, reducer=reducer, accumulate=accumulate,
    )  # fmt: skip
    return factors(engine)


def on(device, batches):
    def moved(step):
        return tuple(tuple(to_device(x, device) for x in part) for part in batches(step))

    return moved


def test_two_processes_are_one(where, tmp_path):
    """Each takes its half of a batch in two pieces; one alone takes the whole in one."""
    alone = train(None, tmp_path / "one", device="cpu" if where == "cpu" else "cuda:0")
    both = launch(train, 2, tmp_path / "two", False, 2, device=where)
    np.testing.assert_allclose(both, alone, rtol=1e-9, atol=1e-12)
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert [line["step"] for line in two] == [3, 6, 9, 12] == [line["step"] for line in one]
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(
            [b["loss"], b["grad_norm"]], [a["loss"], a["grad_norm"]], rtol=1e-6
        )
    assert {p.name for p in (tmp_path / "two").iterdir()} == {
        "a.safetensors",
        "checkpoints",
        "log.jsonl",
    }


def joining(reducer):
    """What NcclReducer does before there is a communicator."""
    reducer._connection.send(("join", "of 0" if reducer.rank == 0 else None))
    assert reducer._connection.recv() == "of 0"
    return reducer.rank


def test_all_join_by_what_the_first_gives():
    assert launch(joining, 2, device="cpu") == 0


def losing(reducer, out, at):
    """Process 1 kills itself when this step is asked for."""

    def batches(step):
        if reducer.rank == 1 and step == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(step)

    return train(reducer, out, batches=batches)


def test_a_lost_process_stops_all(where, tmp_path):
    """In seconds, with an error that names it; the last checkpoint is whole, and gone on from."""
    with pytest.raises(
        LostProcessError, match=r"process 1 of 2 was killed by SIGKILL: .* resume"
    ) as lost:
        launch(losing, 2, tmp_path / "run", 7, device=where)
    assert lost.value.rank == 1
    names = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert names[-1] == "step-00000006"
    shutil.copytree(tmp_path / "run", tmp_path / "one")
    unbroken = train(None, None, device="cpu" if where == "cpu" else "cuda:0")
    resumed = launch(train, 2, tmp_path / "run", True, device=where)
    np.testing.assert_allclose(resumed, unbroken, rtol=1e-9, atol=1e-12)
    alone = train(None, tmp_path / "one", True, device="cpu" if where == "cpu" else "cuda:0")
    np.testing.assert_allclose(alone, unbroken, rtol=1e-9, atol=1e-12)


def share_breaks(reducer, out):
    """A NaN in the half of the batch that process 1 takes."""

    def batches(step):
        parts = batch(step)
        if step == 5:
            parts[0][0][3, 0, 0, 0] = np.nan
        return parts

    return train(reducer, out, batches=batches)


def test_who_has_the_cause_names_it(where, tmp_path):
    with pytest.raises(LycorisError, match="^step 5: input 0 of the batch is not finite"):
        launch(share_breaks, 2, tmp_path / "run", device=where)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())[-1] == "step-00000004"


def test_validation_is_made_once_and_told_to_all(tmp_path):
    result = launch(validating, 2, tmp_path / "run", device="cpu")
    lines = [line["validation"] for line in read_log(tmp_path / "run") if "validation" in line]
    assert result == (6, "early", (3.0, 2)) and lines == [3.0, 3.0, 3.0]


def test_a_batch_that_has_no_equal_shares():
    class Second:
        rank, size, device = 1, 2, "cpu"

    engine = student()
    step = Step(
        engine, "a", squared_error, AdamW(engine.parameters("a")), accumulate=2, reducer=Second()
    )
    (inputs, targets, _), _ = step.pieces(*batch(0, 8))
    assert (inputs[0] == batch(0, 8)[0][0][4:6]).all() and len(targets[0]) == 2
    with pytest.raises(
        ShapeError, match=r"\(6, 5, 4, 4\): its first axis cannot be cut into 4 equal"
    ):
        step(*batch(0, 6))


def validating(reducer, out):
    def validate(engine):
        assert reducer.rank == 0
        return 3.0

    engine = student()
    optimizer = AdamW(engine.parameters("a"))
    result = training.train(
        engine,
        optimizer,
        40,
        out=out,
        reducer=reducer,
        validate=validate,
        validate_every=2,
        patience=2,
    )
    return result.steps, result.stopped, result.best


def failing(reducer, kind):
    if kind == "own":
        raise MatchError("no such layer")
    if kind == "file":
        open("/nothing/here")
    if kind == "exit" and reducer.rank == 0:
        os._exit(3)
    if kind == "bug" and reducer.rank == 1:
        raise ZeroDivisionError("a bug")
    time.sleep(60 if kind in ("exit", "bug") else 0)


@pytest.mark.parametrize(
    "kind, size, error, message",
    [
        ("own", 1, MatchError, "^no such layer$"),
        ("file", 1, OSError, "/nothing/here"),
        ("exit", 2, LostProcessError, "process 0 of 2 ended with exit code 3"),
        ("bug", 2, LycorisError, "process 1 of 2 failed: ZeroDivisionError: a bug"),
    ],
)
def test_errors_come_back(kind, size, error, message, monkeypatch, capfd):
    monkeypatch.setattr(parallel, "_GRACE", 0.2)
    begin = time.monotonic()
    with pytest.raises(error, match=message):
        launch(failing, size, kind, device="cpu")
    assert time.monotonic() - begin < 20
    assert ("Traceback" in capfd.readouterr().err) == (kind == "bug")


ORPHANS = """
import sys, time
from lycoris_cupy.train import launch
from tests.test_parallel import sleeping
if __name__ == "__main__":
    launch(sleeping, 2, sys.argv[1], device="cpu")
"""


def sleeping(reducer, folder):
    Path(folder, str(reducer.rank)).write_text(str(os.getpid()))
    time.sleep(60)


def test_children_do_not_outlive_their_parent(tmp_path):
    import subprocess
    import sys

    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    root = Path(__file__).resolve().parent.parent
    env = {**os.environ, "PYTHONPATH": str(root)}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], cwd=root, env=env)
    files = [tmp_path / "0", tmp_path / "1"]
    assert soon(lambda: all(f.exists() and f.read_text() for f in files))
    parent.kill()
    parent.wait()
    pids = [int(f.read_text()) for f in files]
    assert soon(lambda: not any(running(pid) for pid in pids))


def soon(condition):
    for _ in range(400):
        if condition():
            return True
        time.sleep(0.05)
    return False


def running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_more_gpus_than_there_are():
    with pytest.raises(DeviceError, match="99 GPUs were asked for"):
        launch(failing, 99, "own")
    with pytest.raises(LycorisError, match="0 processes were asked for"):
        launch(failing, 0, "own", device="cpu")
    assert issubclass(NonFiniteError, LycorisError)
