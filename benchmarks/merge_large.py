"""How long a merge into an SDXL-shaped checkpoint takes, beside a copy of the file and beside
lycoris-lora's own merge of the same files; and how much memory each needs.

    python -m benchmarks.merge_large [--peer PYTHON] [--repeats 3] [--dtype bf16] [-o RESULT.json]

The checkpoint has the names and shapes of Stable Diffusion XL and random values (6.9 GB), the
adapter a LoRA of rank 16 on every projection of the transformer blocks and a LoKr of factor 8 on
every 3x3 convolution. Runs are interleaved, each command a process of its own: a copy
(`cp`, `sync`), the merge, and with --peer, the Python of an environment with torch and
lycoris-lora 4.1.3, that one. The time is wall time until the bytes are on the disk; memory is the
largest resident set of the process. 'cold' rows begin with the checkpoint outside the page cache,
'warm' rows after it was read. About 22 GB of disk are needed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
STRENGTH = 0.8


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--peer", help="the Python of an environment with torch and lycoris-lora")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-repeats", type=int, help="of lycoris-lora (default: as the others)")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "f16", "f8_e4m3"))
    parser.add_argument("--folder", help="where the files are made (default: the temporary one)")
    parser.add_argument("-o", "--output", help="the JSON to write (default: benchmarks/results/)")
    args = parser.parse_args(arguments)
    output = Path(args.output or RESULTS / f"merge-large-{args.dtype}.json")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        peer_repeats = args.repeats if args.peer_repeats is None else args.peer_repeats
        data = {}
        for data in measure(Path(folder), args.dtype, args.repeats, args.peer, peer_repeats):
            output.write_text(json.dumps(data, indent=1) + "\n")  # as far as it got
    print(table(data))
    return 0


def measure(
    folder: Path, dtype: str, repeats: int, peer: str | None = None, peer_repeats: int = 0
) -> Iterator[dict]:
    """Rows of every command, cold and warm, again after each."""
    base, style, out = (folder / f"{name}.safetensors" for name in ("base", "style", "out"))
    run([sys.executable, "-m", "benchmarks.merge_files", str(base), str(style), dtype])
    merge = [sys.executable, "-m", "lycoris_cupy", "merge", base, f"{style}:{STRENGTH}", "-o", out]
    commands = {"copy": ["sh", "-c", f"cp '{base}' '{out}' && sync '{out}'"], "merge": merge}
    if peer:
        script = Path(__file__).parent / "merge_peer.py"
        commands["lycoris-lora"] = [peer, script, base, style, out, STRENGTH]
    rows: list[dict] = []
    agreement = None
    for turn in range(repeats):
        for cache in ("cold", "warm"):
            for name, command in commands.items():
                if name == "lycoris-lora" and (dtype.startswith("f8") or turn >= peer_repeats):
                    continue  # it refuses 8-bit floats
                prepare(base, cache)
                load = os.getloadavg()[0]
                seconds, cpu, resident = run([str(part) for part in command])
                row = {"command": name, "cache": cache, "s": seconds, "cpu_s": cpu}
                rows.append({**row, "rss": resident, "load_before": load})
                print(f"{name}, {cache}: {seconds:.1f} s, {resident / 2**20:.0f} MiB", flush=True)
                if name == "merge" and peer and agreement is None:
                    out.rename(folder / "ours")
                elif name == "lycoris-lora" and agreement is None:
                    agreement = compare(folder / "ours", out)
                out.unlink(missing_ok=True)
                yield {
                    "machine": machine(),
                    "dtype": dtype,
                    "bytes": base.stat().st_size,
                    "adapter_bytes": style.stat().st_size,
                    "rows": rows,
                    "peer_agreement": agreement,
                }


def prepare(base: Path, cache: str) -> None:
    """Nothing waits to be written, and the file is in the page cache, or not."""
    os.sync()
    with open(base, "rb", buffering=0) as handle:
        if cache == "cold":
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while handle.read(64 << 20):
                pass


def run(command: list[str]) -> tuple[float, float, int]:
    """(wall seconds, processor seconds, bytes of the largest resident set) of a process that must
    succeed.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            said.seek(0)
            raise SystemExit(f"{command} failed: {said.read().decode(errors='replace')[-2000:]}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def compare(ours: Path, theirs: Path) -> dict:
    """The two results, tensor by tensor: how many differ, and by how much of the change's norm."""
    command = [sys.executable, "-m", "benchmarks.merge_files", "compare", str(ours), str(theirs)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    ours.unlink()
    return json.loads(done.stdout)


def machine() -> dict:
    """What the numbers were measured on."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "load": os.getloadavg(),
        "free_disk": shutil.disk_usage(tempfile.gettempdir()).free,
    }


def medians(data: dict) -> dict[tuple[str, str], tuple[float, float, float, int]]:
    """(command, cache) to (median seconds, median of the ratios to the copy, median processor
    seconds, largest memory).
    """
    out = {}
    for name in dict.fromkeys(row["command"] for row in data["rows"]):
        for cache in ("cold", "warm"):
            mine, copies = (
                [r for r in data["rows"] if r["command"] == what and r["cache"] == cache]
                for what in (name, "copy")
            )
            ratios = [a["s"] / b["s"] for a, b in zip(mine, copies, strict=False)]
            out[name, cache] = (
                statistics.median(row["s"] for row in mine),
                statistics.median(ratios),
                statistics.median(row["cpu_s"] for row in mine),
                max(row["rss"] for row in mine),
            )
    return out


def table(data: dict) -> str:
    """Markdown: a row a command."""
    lines = [
        f"{data['bytes'] / 1e9:.2f} GB, {data['dtype']}, {data['machine']['cpu']}, "
        f"{data['machine']['cores']} cores",
        "",
        "| | cold, s | of the copy | warm, s | of the copy | processor, s | resident, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    found = medians(data)
    for name in dict.fromkeys(name for name, _ in found):
        (cold, cold_ratio, _, a), (warm, warm_ratio, cpu, b) = (
            found[name, cache] for cache in ("cold", "warm")
        )
        lines.append(
            f"| {name} | {cold:.1f} | {cold_ratio:.2f} | {warm:.1f} | {warm_ratio:.2f} | "
            f"{cpu:.1f} | {max(a, b) / 2**20:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
