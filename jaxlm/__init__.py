"""Hugging Face checkpoints in JAX: `load`, `init` and `Model`.

The names are imported at first use, so that `import jaxlm` costs nothing that `import jax` does not.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxlm.api import Model, init, load

__version__ = "0.1.0"
__all__ = ["Model", "__version__", "init", "load"]


def __getattr__(name: str):
    if name in ("Model", "init", "load"):
        from jaxlm import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
