"""`lycoris-cupy train`: what a file says is what is trained; errors are one line that names the key."""

import functools
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest

from lycoris_cupy import losses
from lycoris_cupy.cli import main, train_config
from lycoris_cupy.cli.train import train
from lycoris_cupy.demo.extra import PACKAGES, find_spec
from lycoris_cupy.optim import AdamW, cosine, rate_factors
from lycoris_cupy.train import fit, launch, read_log, read_state
from tests.test_parallel import missing
from tests.training import batch, factors, student

ROOT = Path(__file__).resolve().parent.parent
DEMO = pytest.mark.skipif(
    not all(find_spec(name) for name in PACKAGES), reason="the extra demo is not installed"
)
NETWORK = '''
import numpy as np
from lycoris_cupy import Conv2d, Engine, Linear
from tests.test_parallel import missing
from tests.training import TEACHER, batch, squared_error, student


def failing(device):
    raise ZeroDivisionError("a bug of theirs")


def late():
    def batches(step):
        if step:
            raise IndexError("no more pictures")
        return batch(step)

    return batches


def network(device, width=6):
    engine = student("cpu")
    assert width == 6
    return {name: layer for name, layer in engine.layers.items()}


def whole(device, dtype):
    engine = student("cpu", dtype)
    engine.detach("a")
    return engine


def pair():
    def topology(call, x):
        return call("head", call("conv", x))

    return student("cpu").layers, topology


def data(count=4):
    return lambda step: batch(step, count)


def held():
    return [batch(1000), batch(1001)]


def number():
    return 3


def ending():
    return [batch(0)]
'''  # fmt: skip
CONFIG = """
name = "a"
output = "run"
[network]
source = "net.py:network"
dtype = "f32"
[adapter]
algorithm = "locon"
rank = 2
[data]
batches = "net.py:data"
validation = "net.py:held"
[optimizer]
lr = 0.02
schedule = "cosine"
warmup = 2
clip = 0.5
rates = { "conv*" = 0.5 }
betas = [0.8, 0.95]
[train]
steps = 8
checkpoint_every = 4
log_every = 2
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETWORK)
    (tmp_path / "c.toml").write_text(CONFIG)
    return tmp_path


def change(here, *pairs):
    text = CONFIG
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    (here / "c.toml").write_text(text)


def test_the_file_is_what_is_trained(here, capsys):
    """The same run in Python, to the bit."""
    assert main(["train", "c.toml", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    engine = student("cpu")
    engine.detach("a")
    engine.add("a", "locon", rank=2, seed=0)
    parameters = engine.parameters("a")
    optimizer = AdamW(
        parameters,
        cosine(0.02, 8, 2),
        (0.8, 0.95),
        clip=0.5,
        rates=rate_factors(parameters, {"conv*": 0.5}),
    )
    result = fit(
        engine,
        batch,
        losses.mse,
        name="a",
        optimizer=optimizer,
        steps=8,
        progress=False,
        log_every=2,
    )
    found = student("cpu")
    found.detach("a")
    found.attach("run/a.safetensors")
    assert (factors(found) == factors(engine)).all()
    lines = read_log(Path("run"))
    assert [line["loss"] for line in lines if "loss" in line] == [
        line["loss"] for line in result.lines
    ]
    assert [line["step"] for line in lines if "validation" in line] == [4, 8]
    assert "a: 2 of 2 layers" in out and f"8 steps, loss {result.loss:.5g}" in out
    assert "best validation" in out and "wrote run/a.safetensors" in out
    assert (here / "run/loss.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("source", ["net.py:whole", "net.py:pair", "net:network"])
def test_other_networks_are_the_same(source, here):
    change(here, ("net.py:network", source))
    assert main(["train", "c.toml", "--device", "cpu", "--steps", "3"]) == 0
    assert [line["step"] for line in read_log(Path("run"))] == [2, 3, 3]


def test_a_dry_run_writes_nothing(here, capsys):
    before = sorted(here.iterdir())
    assert main(["train", "c.toml", "--dry-run", "--device", "cpu"]) == 0
    assert sorted(here.iterdir()) == before
    out = capsys.readouterr().out
    for part in ("a: 2 of 2 layers", "conv ", "LoCon", "locon", "activations", "8 steps of AdamW on cpu, mse",
                 "(4, 5, 4, 4) -> (4, 5, 4, 5), in 1 piece", "validation: 2 batches", "nothing was written"):  # fmt: skip
        assert part in out or part == "LoCon", part


def test_resumed_is_unbroken_and_more_steps_may_follow(here, capsys):
    change(here, ('schedule = "cosine"', ""))
    assert main(["train", "c.toml", "--steps", "4"]) == 0
    assert main(["train", "c.toml"]) == 2
    assert "run: holds a run already: resume it" in capsys.readouterr().err
    assert main(["train", "c.toml", "--resume"]) == 0
    resumed = (here / "run/a.safetensors").read_bytes()
    change(here, ('schedule = "cosine"', ""), ('"run"', '"whole"'))
    assert main(["train", "c.toml"]) == 0
    assert (here / "whole/a.safetensors").read_bytes() == resumed
    change(here, ('schedule = "cosine"', ""), ("clip = 0.5", "clip = 0.25"))
    assert main(["train", "c.toml", "--resume"]) == 2
    assert "optimizer.clip was 0.5, is 0.25" in capsys.readouterr().err


def test_the_example_says_what_there_is(here, capsys):
    """It parses; every key of the file is in it; what is commented out is the default."""
    assert main(["train", "--example", "train.toml"]) == 0
    text = Path("train.toml").read_text()
    assert text == train_config.EXAMPLE.read_text()
    train_config.read_configuration(Path("train.toml"))
    shown = tomllib.loads(re.sub(r"^# (\w+ = )", r"\1", text, flags=re.M))
    for table, keys in train_config._TABLES.items():
        found = shown if not table else shown[table]
        missing = keys.keys() - found.keys() - {"pairs", "batches"}  # those stand in a sentence
        assert not missing, (table, missing)
        for key, one in keys.items():
            line = re.search(rf"^# {key} = .*$", text, re.M)
            if line and "by default" not in line[0]:
                assert found[key] == one.default, line[0]
    assert main(["train", "--example", "train.toml"]) == 2
    assert "train.toml: is there already" in capsys.readouterr().err


@DEMO
@pytest.mark.parametrize("data", ['pictures = "demo"', 'pictures = "photos"', 'pairs = "pairs"'])
def test_the_demo_network_on_pictures(data, here):
    """One step, on patches of 8 pixels, from each kind of pictures."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for folder, size in (("photos", 40), ("pairs/input", 12), ("pairs/target", 24)):
        (here / folder).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(
                0, 255, (size + 2, size, 3) if folder == "photos" else (size, size, 3), np.uint8
            )
            Image.fromarray(pixels).save(here / folder / f"{i}.png")
    text = train_config.EXAMPLE.read_text().replace(
        'pictures = "demo"', f"{data}\nbatch = 2\npatch = 8"
    )
    Path("t.toml").write_text(
        text.replace("rank = 16", "rank = 2").replace("warmup = 10", "warmup = 0")
    )
    assert main(["train", "t.toml", "--device", "cpu", "--steps", "1"]) == 0
    lines = read_log(Path("run"))
    assert [line["step"] for line in lines] == [1, 1] and 0 < lines[0]["loss"] < 1
    assert main(["inspect", "run/screen.safetensors"]) == 0


ERRORS = [
    ("steps = 8", "stops = 8", "c.toml: [train] has no key 'stops': did you mean 'steps'?"),
    ("steps = 8", "", "c.toml: [train] steps is missing, expected a whole number from 1 on"),
    ("steps = 8", "steps = 0", "c.toml: [train] steps is 0, expected a whole number from 1 on"),
    ("steps = 8", "steps = true", "c.toml: [train] steps is True, expected a whole number"),
    ("lr = 0.02", 'lr = "high"', "c.toml: [optimizer] lr is 'high', expected a number of at least 0"),
    ("lr = 0.02", "lr = -1", "c.toml: [optimizer] lr is -1, expected a number of at least 0"),
    ("betas = ", "beta = ", "c.toml: [optimizer] AdamW has no key 'beta': did you mean 'betas'?"),
    ("betas = [0.8, 0.95]", 'betas = [0.8, 1.5]', "c.toml: [optimizer] betas are (0.8, 1.5), expected two"),
    ("betas = [0.8, 0.95]", 'betas = "x"', "c.toml: [optimizer] AdamW betas is 'x', expected a list of 2 numbers"),
    ("betas = [0.8, 0.95]", 'eps = true', "c.toml: [optimizer] AdamW eps is True, expected a number"),
    ('"conv*" = 0.5', '"conv*" = "x"', "c.toml: [optimizer] rates is {'conv*': 'x'}, expected a table of patterns"),
    ("net.py:network", "net.py:failing", "net.py, line 9: ZeroDivisionError: a bug of theirs"),
    ("net.py:data", "net.py:late", "net.py, line 15: IndexError: no more pictures"),
    ("[optimizer]", '[optimizer]\nkind = "Adam"', "c.toml: [optimizer] kind is 'Adam', expected one of AdamW, SGD"),
    ("[optimizer]", '[optimizer]\nkind = "SGD"', "c.toml: [optimizer] SGD has no key 'betas'"),
    ("warmup = 2", "warmup = 9", "c.toml: [optimizer] steps is 8, expected more than the warm-up of 9"),
    ('"conv*" = 0.5', '"cnv*" = 0.5', "c.toml: [optimizer] 'cnv*' matches no layer and no factor of: conv."),
    ("[optimizer]", "[optimiser]", "c.toml: has no key 'optimiser': did you mean 'optimizer'?"),
    ('name = "a"', "", "c.toml: name is missing, expected a name without slashes"),
    ('name = "a"', 'name = "a/b"', "c.toml: name is 'a/b', expected a name without slashes"),
    ('output = "run"', 'output = "no/run"', "no/run: cannot be written: No such file"),
    ('name = "a"', 'name = "a', "c.toml: is no TOML: "),
    ('[network]\nsource = "net.py:network"\ndtype = "f32"', "network = 3", "c.toml: network is 3, expected a table [network]"),
    ("rank = 2", "rnak = 2", "c.toml: [adapter]"),
    ('algorithm = "locon"', 'algorithm = "lokan"', "c.toml: [adapter]"),
    ("net.py:network", "net.py:net", "c.toml: [network] source: net.py has no function 'net'"),
    ("net.py:network", "none.py:network", "c.toml: [network] source: there is no file none.py"),
    ("net.py:network", "no_such_module:f", "c.toml: [network] source: cannot import no_such_module: No module"),
    ("net.py:network", "real-esrgan", "c.toml: [network] source is 'real-esrgan', expected 'realesr-anime"),
    ("net.py:network", "net.py:number", "c.toml: [network] source: net.py:number returns int, expected an Engine"),
    ("net.py:network", "x.param", "x.param: No such file or directory"),
    ('dtype = "f32"', 'dtype = "f16"', "c.toml: [network] dtype is 'f16', expected one of bf16, f32, f64"),
    ('dtype = "f32"', 'options = { widht = 6 }', "c.toml: [network] source: network: got an unexpected keyword"),
    ("net.py:data", "net.py:number", "c.toml: [data] batches: net.py:number returns int, expected a function"),
    ("net.py:data", "net.py:ending", "the batches end after 1: give a function of the step"),
    ('batches = "net.py:data"', "", "c.toml: [data] names nothing, expected one of pictures, pairs, batches"),
    ('batches = "net.py:data"', 'batches = "net.py:data"\npairs = "p"', "[data] names pairs and batches, expected one"),
    ('batches = "net.py:data"', 'pairs = "p"', "c.toml: [data] validation goes with batches"),
    ("steps = 8", 'steps = 8\nloss = "msee"', "c.toml: [train] loss is 'msee', expected one of mse, l1, charbonnier"),
    ("steps = 8", "steps = 8\naccumulate = 3", "input 0 of the batch has shape (4, 5, 4, 4): its first axis"),
]  # fmt: skip


@pytest.mark.parametrize(
    "old, new, message", ERRORS, ids=[new or f"no {old}" for old, new, _ in ERRORS]
)
def test_errors_are_one_line(old, new, message, here, capsys):
    change(here, (old, new))
    assert main(["train", "c.toml", "--device", "cpu"]) == 2
    err = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line and not line.startswith(("a:", "\r"))
    ]
    assert len(err) == 1 and err[0].startswith("lycoris-cupy: error: ") and message in err[0], err
    assert not list(here.glob("run/*.safetensors"))


@DEMO
@pytest.mark.parametrize(
    "data, message",
    [
        ('pictures = "none"', "none: there is no such folder of pictures"),
        ('pictures = "empty"', "empty: holds no picture (.png"),
        (
            'pictures = "small"',
            "small/a.png: has 10 x 12 pixels, a damaged patch of 32 needs 64 x 64",
        ),
        ('pairs = "alone"', "alone: b.png is in input/ alone, expected pairs of one name"),
        (
            'pairs = "sizes"',
            "sizes/target/a.png: has 15 x 24 pixels, expected a multiple of its input's 10 x 12",
        ),
        ('pairs = "factors"', "factors/target/b.png: is 1 times its input, others are 2 times"),
    ],
)
def test_errors_of_pictures(data, message, here, capsys):
    from PIL import Image

    pictures = {
        "small/a": (10, 12), "alone/input/a": (9, 9), "alone/input/b": (9, 9), "alone/target/a": (9, 9),
        "sizes/input/a": (10, 12), "sizes/target/a": (15, 24), "factors/input/a": (40, 40),
        "factors/target/a": (80, 80), "factors/input/b": (40, 40), "factors/target/b": (40, 40),
    }  # fmt: skip
    (here / "empty").mkdir()
    for name, size in pictures.items():
        path = here / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(path)
    change(here, ('batches = "net.py:data"\nvalidation = "net.py:held"', data))
    assert main(["train", "c.toml", "--dry-run", "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "CONFIG is missing: --example FILE writes one to begin with"),
        (["none.toml"], "none.toml: No such file or directory"),
        (["c.toml", "--example", "x.toml"], "--example writes a configuration and reads none"),
        (["c.toml", "--gpus", "2", "--device", "cpu"], "--gpus and --device both say where to train"),
        (["c.toml", "--gpus", "99"], "99 GPUs were asked for, "),
        (["c.toml", "--device", "cuda:99"], "device 'cuda:99' was asked for, but"),
        (["c.toml", "--steps", "0"], "--steps is 0, expected at least 1"),
    ],
)  # fmt: skip
def test_errors_of_arguments(arguments, message, here, capsys):
    assert main(["train", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1, err


def test_interrupted_and_resumed(here):
    """Ctrl-C: one line, code 130, and the last checkpoint to go on from."""
    change(here, ("steps = 8", "steps = 100000"), ("warmup = 2", "warmup = 0"))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lycoris_cupy", "train", "c.toml", "--device", "cpu"]
    child = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What runs in the background of a shell is born deaf to Ctrl-C, and so are its children.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not list(here.glob("run/checkpoints/step-*")):
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130 and err.splitlines()[-1] == "lycoris-cupy: interrupted"
    assert "Traceback" not in err
    assert (
        "optimizer"
        in read_state(sorted(here.glob("run/checkpoints/step-*"))[-1], "cpu")["configuration"]
    )


def test_two_processes_are_one(here):
    """What --gpus starts, on the CPU."""
    change(here, ('data"\nvalidation', 'data"\n# validation'))
    config = train_config.read_configuration(Path("c.toml"))
    both = launch(train, 2, config, False, device="cpu")
    (here / "run").rename(here / "two")
    alone = train(None, config, False, "cpu")
    np.testing.assert_allclose(
        [line["loss"] for line in both.lines], [line["loss"] for line in alone.lines], rtol=1e-3
    )
    assert (
        both.path.exists()
        and (here / "two/a.safetensors").stat().st_size == both.path.stat().st_size
    )


def test_what_kills_leave_is_swept(here):
    change(here, ("steps = 8", "steps = 4"))
    assert main(["train", "c.toml"]) == 0
    left = [here / "run/.lycoris-0123.tmp", here / "run/checkpoints/.lycoris-4567.tmp"]
    left[0].write_text("half")
    left[1].mkdir()
    (left[1] / "adapter.safetensors").write_text("half")
    assert main(["train", "c.toml", "--resume"]) == 0
    assert not any(path.exists() for path in left)


@pytest.mark.gpu
@pytest.mark.skipif(bool(missing(2)), reason=f"GPU row: {missing(2)}")
def test_two_gpus_are_one(here):
    assert main(["train", "c.toml", "--gpus", "2"]) == 0
    (here / "run").rename(here / "two")
    assert main(["train", "c.toml", "--gpus", "1"]) == 0
    losses_of = [[v["loss"] for v in read_log(Path(run)) if "loss" in v] for run in ("run", "two")]
    np.testing.assert_allclose(*losses_of, rtol=1e-2)
