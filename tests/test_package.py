"""What `import jaxlm` costs, and that the public names are there."""

import json
import subprocess
import sys

import pytest

import jaxlm

HEAVY = {"datasets", "flax", "gguf", "jax", "numpy", "optax", "orbax", "rich", "tokenizers", "torch", "transformers",
         "tyro"}  # fmt: skip


def modules_after(statement: str) -> set[str]:
    code = f"{statement}; import json, sys; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    return set(json.loads(run.stdout))


def test_import_is_light():
    imported = modules_after("import jaxlm")
    assert not {name.split(".")[0] for name in imported} & HEAVY
    assert not [name for name in imported if name.startswith("jaxlm.")]


def test_command_line_is_light():
    imported = {name.split(".")[0] for name in modules_after("import jaxlm.cli.main")}
    assert not imported & HEAVY


def test_public_names():
    assert {"Model", "__version__", "init", "load"} <= set(dir(jaxlm))
    assert callable(jaxlm.load) and callable(jaxlm.init) and isinstance(jaxlm.Model, type)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = jaxlm.lode
