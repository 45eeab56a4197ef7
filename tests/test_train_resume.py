"""A run that is broken off and resumed ends as one that was not: bit for bit, also after kill -9."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lycoris_cupy import FileFormatError, LycorisError
from lycoris_cupy.io.safetensors import open_file
from lycoris_cupy.optim import SGD, AdamW, Average, Lion, Prodigy, ScheduleFreeAdamW, cosine
from lycoris_cupy.train import read_log, read_state
from tests import training
from tests.training import batch, factors, student

ROOT = Path(__file__).resolve().parent.parent


class Stop(Exception):
    pass


def until(step):
    """Batches that break the run off when this step is asked for."""

    def batches(number):
        if number == step:
            raise Stop
        return batch(number)

    return batches


def train(engine, optimizer, out, batches=batch, steps=12, **options):
    options = {"log_every": 4, "checkpoint_every": 3, **options}
    return training.train(engine, optimizer, steps, batches, out=out, **options)


def same_files(one, other):
    with open_file(one) as a, open_file(other) as b:
        assert a.metadata == b.metadata and set(a) == set(b)
        assert all(a.raw(name).tobytes() == b.raw(name).tobytes() for name in a)


def without_seconds(run):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(run)]


KINDS = {
    "adamw, average, norm": (lambda p: AdamW(p, cosine(0.03, 12, 2), clip=0.1), {"max_norm": 0.5}, "f32", 0.9),
    "prodigy": (Prodigy, {"accumulate": 2}, "f32", None),
    "schedule-free": (lambda p: ScheduleFreeAdamW(p, 0.02), {}, "f64", None),
    "lion in bf16 alone": (lambda p: Lion(p, 0.01, seed=5), {}, "bf16", None),
    "sgd": (lambda p: SGD(p, 0.05), {}, "bf16", 0.99),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_unbroken(kind, tmp_path):
    make, options, dtype, decay = KINDS[kind]

    def run(out, batches, resume):
        engine = student(dtype=dtype, dropout=0.2 if dtype == "f32" else 0.0)
        optimizer = make(engine.parameters("a"))
        average = None if decay is None else Average(optimizer.masters, decay, warmup=True)
        result = train(engine, optimizer, out, batches, average=average, resume=resume, **options)
        return factors(engine), result

    whole, result = run(tmp_path / "whole", batch, False)
    for stop in (5, 8, 11):  # twice from a checkpoint, and once more
        with pytest.raises(Stop):
            run(tmp_path / "broken", until(stop), True)
    again, resumed = run(tmp_path / "broken", batch, True)
    assert (again == whole).all() and resumed.loss == result.loss
    assert without_seconds(tmp_path / "broken") == without_seconds(tmp_path / "whole")
    for file in ("a.safetensors", "checkpoints/step-00000012/adapter.safetensors"):
        same_files(tmp_path / "whole" / file, tmp_path / "broken" / file)


def test_the_generator_that_batches_draw_from_goes_on(tmp_path):
    def run(out, stop, resume):
        rng, engine = np.random.default_rng(5), student()

        def batches(step):
            if step == stop:
                raise Stop
            return batch(int(rng.integers(1000)))

        train(engine, AdamW(engine.parameters("a")), out, batches, rng=rng, resume=resume)
        return factors(engine)

    whole = run(tmp_path / "whole", None, False)
    with pytest.raises(Stop):
        run(tmp_path / "broken", 8, False)
    assert (run(tmp_path / "broken", None, True) == whole).all()


def test_an_iterable_is_advanced(tmp_path):
    def run(out, count, resume):
        engine = student()
        batches = (batch(step) for step in range(count))
        train(engine, AdamW(engine.parameters("a")), out, batches, resume=resume)
        return factors(engine)

    whole = run(tmp_path / "whole", 12, False)
    with pytest.raises(LycorisError, match="the batches end after 7"):
        run(tmp_path / "broken", 7, False)
    assert (run(tmp_path / "broken", 12, True) == whole).all()


def test_validation_and_patience_go_on(tmp_path):
    values = [5.0, 3.0, 4.0, 3.5]

    def run(out, stop, resume):
        engine = student()
        return train(
            engine,
            AdamW(engine.parameters("a")),
            out,
            until(stop),
            steps=100,
            resume=resume,
            validate=lambda _: values[read_step(out) // 3],
            patience=2,
        )

    def read_step(out):  # how many validations the log has, times 3
        return 3 * sum("validation" in line for line in read_log(out))

    with pytest.raises(Stop):
        run(tmp_path / "run", 10, False)
    result = run(tmp_path / "run", None, True)
    assert (result.steps, result.stopped, result.best) == (12, "early", (3.0, 6))
    names = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["best-00000006", "step-00000009", "step-00000012"]
    assert run(tmp_path / "run", None, True).steps == 12  # still stopped


def test_more_steps_may_follow(tmp_path):
    engine = student()
    train(engine, AdamW(engine.parameters("a")), tmp_path / "run", steps=6)
    more, whole = student(), student()
    train(more, AdamW(more.parameters("a")), tmp_path / "run", steps=12, resume=True)
    train(whole, AdamW(whole.parameters("a")), None)
    assert (factors(more) == factors(whole)).all()


def other_base():
    engine = student()
    engine.layers["head"].weight[0, 0] += 1
    return engine


def weaker():
    engine = student()
    engine.strength["a"] = 0.5
    return engine


def beside_another():
    engine = student()
    engine.add("b", "locon")
    return engine


@pytest.mark.parametrize(
    "make, settings, options, message",
    [
        (student, {"lr": 0.2}, {}, r"optimizer.lr was 0.1, is 0.2"),
        (student, {"lr": cosine(0.1, 5)}, {}, r"optimizer.lr was 0.1, is \[0.1, 0.09"),
        (student, {"clip": 1.0}, {}, "optimizer.clip was None, is 1.0"),
        (student, {}, {"accumulate": 2}, "accumulate was 1, is 2"),
        (student, {}, {"configuration": {"data": {"seed": 2}}}, "data.seed was 1, is 2"),
        (
            lambda: student(rank=3),
            {},
            {},
            r"adapter.conv was 'LoCon.*rank|adapter.conv was .*down\(3,3,4,2\)",
        ),
        (weaker, {}, {}, "strength was 1.0, is 0.5"),
        (lambda: student(dropout=0.1), {}, {}, "dropout was "),
        (beside_another, {}, {}, "trained on another base"),
        (
            other_base,
            {},
            {},
            "trained on another base: the fingerprint of its weights is [0-9a-f]{12}, that",
        ),
    ],
)
def test_another_run_is_not_continued(make, settings, options, message, tmp_path):
    first = student()
    data = {"configuration": {"data": {"seed": 1}}}
    train(first, AdamW(first.parameters("a"), 0.1), tmp_path / "run", steps=3, **data)
    before = sorted((p, p.read_bytes()) for p in (tmp_path / "run").rglob("*") if p.is_file())
    engine = make()
    optimizer = AdamW(engine.parameters("a"), **{"lr": 0.1, **settings})
    with pytest.raises(LycorisError, match=message):
        train(engine, optimizer, tmp_path / "run", resume=True, **{**data, **options})
    assert before == sorted(
        (p, p.read_bytes()) for p in (tmp_path / "run").rglob("*") if p.is_file()
    )


def test_a_folder_with_a_run_is_not_begun_anew(tmp_path):
    engine = student()
    train(engine, AdamW(engine.parameters("a")), tmp_path / "run", steps=1)
    with pytest.raises(
        LycorisError, match="run: holds a run already: resume it, or choose another"
    ):
        train(engine, AdamW(engine.parameters("a")), tmp_path / "run", steps=1)
    with pytest.raises(OSError, match="cannot be written"):
        train(engine, AdamW(engine.parameters("a")), tmp_path / "no/such/run", steps=1)


def test_broken_states_are_refused(tmp_path):
    engine = student()
    train(engine, AdamW(engine.parameters("a")), tmp_path / "run", steps=1)
    (path,) = (tmp_path / "run/checkpoints").iterdir()
    file = path / "state.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(FileFormatError, match="state.safetensors"):
        read_state(path, "cpu")
    file.write_bytes(whole.replace(b'\\"array\\"', b'\\"arrow\\"'))
    with pytest.raises(FileFormatError, match="the state in it is broken"):
        read_state(path, "cpu")
    (path / "adapter.safetensors").replace(file)
    with pytest.raises(FileFormatError, match="has version None, expected '1': it is no state"):
        read_state(path, "cpu")


CHILD = """
import sys
from lycoris_cupy.optim import AdamW, Average
from lycoris_cupy.train import fit
from tests.training import batch, squared_error, student
engine = student()
optimizer = AdamW(engine.parameters("a"), 0.02, clip=0.1)
print("begun", flush=True)
fit(engine, batch, squared_error, name="a", optimizer=optimizer, steps=int(sys.argv[2]), out=sys.argv[1],
    resume=True, log_every=3, checkpoint_every=1, average=Average(optimizer.masters, 0.9), progress=False,
    validate=lambda engine: 1 / (1 + engine.parameters("a")["head"]["up"].sum() ** 2), validate_every=7)
print("done", flush=True)
"""


def test_killed_at_any_moment(tmp_path):
    """SIGKILL at random moments, a checkpoint at every step: the end is that of an unbroken run."""
    chance, kills = random.Random(11), 0
    with start(tmp_path / "whole") as whole:
        begin = time.monotonic()
        assert whole.wait() == 0
        took = time.monotonic() - begin
    for last in (False, False, False, True):
        with start(tmp_path / "broken") as child:
            if not last:
                time.sleep(took * chance.uniform(0.05, 0.3))
                if child.poll() is None:
                    os.kill(child.pid, signal.SIGKILL)
                    kills += 1
            assert child.wait() in (0, -signal.SIGKILL)
    assert child.returncode == 0 and kills >= 2
    assert without_seconds(tmp_path / "broken") == without_seconds(tmp_path / "whole")
    same_files(tmp_path / "whole/a.safetensors", tmp_path / "broken/a.safetensors")
    names = [
        sorted(p.name for p in (tmp_path / run / "checkpoints").iterdir())
        for run in ("whole", "broken")
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("killed", ["before the last checkpoint", "before the oldest was gone"])
def test_killed_between_the_last_checkpoints(killed, tmp_path):
    """Behind the best one of the last step, or in the deletion of one too many: the same stay."""

    def run():
        engine = student()
        train(
            engine,
            AdamW(engine.parameters("a")),
            tmp_path / "run",
            resume=True,
            validate=lambda engine: -float(abs(engine.parameters("a")["head"]["up"]).sum()),
        )
        return sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())

    whole = run()
    assert whole == ["best-00000012", "step-00000009", "step-00000012"]
    last, old = (tmp_path / "run/checkpoints" / f"step-000000{n}" for n in ("12", "06"))
    if killed == "before the last checkpoint":
        last.rename(old)
    else:
        shutil.copytree(last, old)
    assert run() == whole


def start(out):
    """A child that has begun to train."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(out), "40"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "begun\n"
    return child
