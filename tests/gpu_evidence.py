"""The record of the suite's last run on a GPU, and whether it belongs to the present sources:
python -m tests.gpu_evidence
"""

import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "gpu-suite.json"
SOURCES = ("lycoris_cupy/**/*.py", "cuda_src/*.cu", "cuda_src/*.cuh", "tests/*.py")


def fingerprint() -> str:
    """sha256 over the names and bytes of all that a run on the GPU depends on."""
    digest = hashlib.sha256()
    for path in sorted(p for pattern in SOURCES for p in ROOT.glob(pattern)):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def record(stats, exitstatus: int) -> Path:
    """Write the record of a run from pytest's reports."""
    import cupy
    import numpy

    reports = {kind: stats.get(kind, []) for kind in ("passed", "failed", "error", "skipped")}
    gpu_rows = [
        r.nodeid
        for r in reports["passed"]
        if "cuda:0" in r.nodeid or "gpu" in getattr(r, "keywords", {})
    ]
    runtime = cupy.cuda.runtime
    versions = {
        "python": sys.version.split()[0],
        "numpy": numpy.__version__,
        "cupy": cupy.__version__,
    }
    data = {
        "gpu": runtime.getDeviceProperties(0)["name"].decode(),
        "driver": runtime.driverGetVersion(),
        "cuda_runtime": runtime.runtimeGetVersion(),
        "versions": versions,
        "sources_sha256": fingerprint(),
        "exit_status": int(exitstatus),
        "counts": {kind: len(r) for kind, r in reports.items()},
        "gpu_rows_passed": len(gpu_rows),
        "gpu_rows": sorted(gpu_rows),
    }
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(data, indent=1) + "\n")
    return RECORD


def main() -> int:
    if not RECORD.exists():
        print(
            f"there is no record at {RECORD.relative_to(ROOT)}: run `python -m pytest "
            "--require-gpu` on a GPU"
        )
        return 1
    data = json.loads(RECORD.read_text())
    present = fingerprint()
    summary = f"{data['gpu_rows_passed']} GPU rows passed on {data['gpu']}, {data['counts']['failed']} failed"
    if data["sources_sha256"] != present:
        print(
            f"STALE: {summary}, but of other sources ({data['sources_sha256'][:12]}, now "
            f"{present[:12]})"
        )
        return 1
    if data["exit_status"] or data["counts"]["failed"] or data["counts"]["error"]:
        print(f"FAILED: {summary}; exit status {data['exit_status']}")
        return 1
    print(f"VALID: {summary}; sources {present[:12]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
