"""What holds for every test: on the CPU unless asked, no display, checked annotations, no hidden skips."""

import os
import pathlib

# Before anything imports jax or matplotlib: both read these once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["MPLBACKEND"] = "Agg"
# Most of the time goes into compiling: what one test has compiled is there for the others, for the programs that they
# start, which look below $LOLO_CACHE, and for the next run.
os.environ.setdefault("LOLO_CACHE", str(pathlib.Path(__file__).parent.parent / ".pytest_cache"))
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(os.environ["LOLO_CACHE"], "jax")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jaxtyping
import pytest

# Checks shapes and types of lolo's functions while the tests call them. It acts on each module when that is
# imported, and imports none itself: the tests run where torch is absent.
jaxtyping.install_import_hook(["lolo"], "beartype.beartype")


def pytest_configure(config):
    if os.environ.get("LOLO_REQUIRE_ALL") == "1":
        config.pluginmanager.register(RequireAll(), "lolo-require-all")


class RequireAll:
    """Fails the run if a selected test, or a whole file, was skipped; an expected failure is not a skip.

    A file that skips itself while it is read counts whatever its marks: they are not known by then.
    """

    def __init__(self):
        self.skipped = []  # (name, reason)

    def pytest_collectreport(self, report):
        self.note(report)

    def pytest_runtest_logreport(self, report):
        self.note(report)

    def note(self, report):
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.skipped.append((report.nodeid, reason))

    def pytest_sessionfinish(self, session, exitstatus):
        if self.skipped and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if not self.skipped:
            return
        terminalreporter.section("skipped, but LOLO_REQUIRE_ALL=1 allows no skips", sep="=", red=True)
        for name, reason in self.skipped:
            terminalreporter.write_line(f"{name}: {reason}")
