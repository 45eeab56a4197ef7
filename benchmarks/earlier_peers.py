"""Puts the peers' rows of an earlier file beside a new one, whose run had no time for them:

    python -m benchmarks.earlier_peers NEW.json EARLIER.json

Each row takes along the bare layer's times of its own run, over which its ratios are, and the file
says in `peers_at` of which commit and date that run was. The rows of torch's optimizer come too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .results import Results
from .table import CALLS


def with_peers(new: dict, earlier: dict) -> dict:
    """`new` with the peers of `earlier`. Raises ValueError where there is nothing to take, peers of
    its own would be lost, or the GPUs differ."""
    if new["gpu"] != earlier["gpu"]:
        raise ValueError(f"one file is of {new['gpu'] or 'a CPU'}, the other of {earlier['gpu']}")
    if new["peers"]:
        raise ValueError("the new file has peers of its own")
    if not earlier["peers"]:
        raise ValueError("the earlier file has no peers")
    bare: dict = {}
    for row in earlier["rows"]:
        times = {f"bare_{call}_us": row[f"bare_{call}_us"] for call in CALLS}
        bare[row["shape"], row["adapter"]] = times
        bare.setdefault((row["shape"], "none"), times)
    # A row that was earlier once has them already.
    peers = [{**bare.get((p["shape"], p["adapter"]), {}), **p} for p in earlier["peers"]]
    at = earlier.get("peers_at") or f"{earlier['commit']} {earlier['date']}"
    more = [o for o in earlier["optimizers"] if o["optimizer"].startswith("torch")]
    had = {o["optimizer"] for o in new["optimizers"]}
    optimizers = new["optimizers"] + [o for o in more if o["optimizer"] not in had]
    return {**new, "optimizers": optimizers, "peers": peers, "peers_at": at}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.earlier_peers")
    parser.add_argument("new", type=Path, help="the file of the new run, which is written anew")
    parser.add_argument("earlier", type=Path, help="a file with peers, from the same kind of GPU")
    options = parser.parse_args()
    try:
        read = [json.loads(path.read_text()) for path in (options.new, options.earlier)]
        data = with_peers(*read)
    except KeyError as error:
        what = f"{options.new} or {options.earlier}"
        parser.error(f"{what} is no file of results of this kit: it lacks {error}")
    except (OSError, ValueError) as error:
        parser.error(f"{options.new}, {options.earlier}: {error}")
    results = Results(options.new, {})
    results.data = data
    results.write()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
