"""Devices, counting of the GPU rows that were skipped, and the record of a run on a GPU."""

import os

import hypothesis
import pytest

from lycoris_cupy.arrays import gpu_missing

hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("suite")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suite runs a process a core


def pytest_addoption(parser):
    parser.addoption(
        "--require-gpu",
        action="store_true",
        help="fail when there is no usable GPU, and record the run",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU")
    if config.getoption("--require-gpu") and gpu_missing():
        raise pytest.UsageError(f"--require-gpu was given, but {gpu_missing()}")


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])


@pytest.fixture
def on_hopper():
    """Skips where another GPU, or none, would run a kernel of Hopper."""
    from lycoris_cupy.ops.extended_gpu import hopper

    if not hopper():
        pytest.skip("the kernel is Hopper's")


def pytest_collection_modifyitems(config, items):
    reason = gpu_missing()
    if reason:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=f"GPU row: {reason}"))


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "GPU row" in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} GPU rows skipped: {gpu_missing()}", yellow=True
        )
    if config.getoption("--require-gpu"):
        from tests import gpu_evidence

        path = gpu_evidence.record(terminalreporter.stats, exitstatus)
        terminalreporter.write_line(f"recorded in {path}")
