"""The peers' columns: each shape's adapters in torch, right after the project measured the same
shape (see `conftest`).

    python -m pip install -e ".[peer]"
    python -m pytest benchmarks --benchmark-enable -n 0 --peer-seconds 300
"""

from __future__ import annotations

import json
import time

import pytest

from lycoris_cupy.arrays import gpu_missing

from .earlier_peers import main, with_peers
from .peers import run
from .shapes import CPU_SHAPES, SHAPES
from .table import head, peer_ratio

GPU = not gpu_missing()
MEASURED = SHAPES if GPU else CPU_SHAPES
WARM_SHARE = 0.4  # of the peers' time, in which their kernels are compiled side by side


class Clock:
    """Hands out what is left of the peers' time, in equal parts to the shapes to come. It stands
    from `stop` to `go_on`: what the project takes for itself between two shapes does not count.
    """

    def __init__(self, seconds: float, shapes: int):
        self._end, self._shapes = time.monotonic() + seconds, shapes
        self._stopped: float | None = None

    def stop(self) -> None:
        self._stopped = time.monotonic()

    def go_on(self) -> None:
        if self._stopped is not None:
            self._end += time.monotonic() - self._stopped
        self._stopped = None

    def part(self) -> float:
        left, self._shapes = self._end - time.monotonic(), self._shapes - 1
        return max(left, 0.0) / (self._shapes + 1)


@pytest.fixture(scope="module")
def clock(pytestconfig, results):
    seconds = pytestconfig.getoption("--peer-seconds")
    if not seconds:
        pytest.skip("no time for the peers: give --peer-seconds")
    if run.missing():
        pytest.fail(
            f'--peer-seconds was given, but {run.missing()} is missing: pip install "'
            'lycoris_cupy[peer]"'
        )
    clock = Clock(seconds, len(MEASURED))
    if GPU:
        start = time.monotonic()
        warmed = run.warm(SHAPES, "cuda:0", WARM_SHARE * seconds)
        results.put("peers_warmed", {"processes": warmed, "seconds": time.monotonic() - start})
    clock.stop()
    return clock


def test_the_clock_stands_while_others_measure(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock(90.0, 3)
    clock.stop()
    now[0] += 1000
    clock.go_on()
    assert clock.part() == 30.0
    now[0] += 10
    clock.stop()
    now[0] += 50
    clock.go_on()
    assert clock.part() == 40.0


def test_peers_of_an_earlier_run_keep_their_own_bare_layer():
    def file(commit: str, bare: float, peers: list) -> dict:
        row = {"shape": "s", "adapter": "a", "bare_forward_us": bare, "bare_step_us": 2 * bare}
        kept = {"gpu": "G", "commit": commit, "date": "today", "rows": [row], "peers": peers}
        return {**kept, "optimizers": [{"optimizer": "SGD"}]}

    peer = {"shape": "s", "adapter": "a", "peer": "p", "mode": "m", "forward_us": 30.0}
    earlier = file("old", 10.0, [peer, {**peer, "adapter": "none"}])
    earlier["optimizers"].append({"optimizer": "torch, AdamW"})
    joined = with_peers(file("new", 12.0, []), earlier)
    assert peer_ratio(joined, joined["rows"][0]) == {"forward": 3.0}
    assert joined["peers"][1]["bare_step_us"] == 20.0 and "peers of old today" in head(joined)
    assert [o["optimizer"] for o in joined["optimizers"]] == ["SGD", "torch, AdamW"]
    # And once more, beside a third run.
    later = with_peers(file("newer", 15.0, []), joined)
    assert peer_ratio(later, later["rows"][0]) == {"forward": 3.0}
    assert later["peers_at"] == "old today"
    for wrong in (joined, {**file("new", 12.0, []), "gpu": "H"}):
        with pytest.raises(ValueError, match=r"peers of its own|one file is of"):
            with_peers(wrong, earlier)


def test_the_command_writes_the_new_file_anew(tmp_path, monkeypatch, capsys):
    """And nothing, where a file is not one of these or has peers already."""
    row = {"shape": "s", "adapter": "a", "bare_forward_us": 1.0, "bare_step_us": 2.0}
    peer = {"shape": "s", "adapter": "a", "peer": "p", "mode": "m", "forward_us": 3.0}
    file = {"gpu": "G", "commit": "c", "date": "d", "rows": [row], "peers": [], "optimizers": []}
    paths = [tmp_path / name for name in ("new.json", "earlier.json", "other.json")]
    for path, data in zip(paths, (file, {**file, "peers": [peer]}, {"gpu": "G"}), strict=True):
        path.write_text(json.dumps(data))

    def run_on(*files) -> None:
        monkeypatch.setattr("sys.argv", ["earlier_peers", *map(str, files)])
        main()

    with pytest.raises(SystemExit):
        run_on(paths[0], paths[2])
    assert "it lacks" in capsys.readouterr().err and json.loads(paths[0].read_text()) == file
    run_on(*paths[:2])
    joined = json.loads(paths[0].read_text())
    assert joined["peers_at"] == "c d" and joined["peers"][0]["bare_step_us"] == 2.0
    with pytest.raises(SystemExit):
        run_on(*paths[:2])
    assert "peers of its own" in capsys.readouterr().err


@pytest.mark.parametrize("shape", MEASURED, ids=[s.name for s in MEASURED])
def test_peers(shape, clock, cases, results):
    case, _ = cases(shape)
    if GPU:
        import cupy

        cupy.get_default_memory_pool().free_all_blocks()
    clock.go_on()
    rows = run.measure(case, clock.part())
    clock.stop()
    results.add("peers", *rows)
    ran = [row for row in rows if "forward_us" in row and row["adapter"] != "none"]
    assert ran, f"no peer's adapter ran: {rows[-1]}"
