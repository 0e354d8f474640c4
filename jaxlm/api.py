"""`load` and `init`: from a checkpoint, or from a config alone, to a `Model`."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxlm import inputs
from jaxlm.checkpoints import files
from jaxlm.checkpoints.export import staged, write_checkpoint
from jaxlm.checkpoints.load import Progress, examine, flatten, streamed, unflatten
from jaxlm.checkpoints.load import load as load_arrays
from jaxlm.kernels.attention import IMPLS
from jaxlm.model import LAYERS, Model, tensor_names
from jaxlm.models.decoder import Runtime
from jaxlm.models.registry import Family, family
from jaxlm.models.view import Weights
from jaxlm.opening import open_checkpoint, write_files
from jaxlm.parallel.mesh import AXES, make_mesh
from jaxlm.parallel.sharding import shardings

log = logging.getLogger(__name__)

__all__ = ["Model", "init", "load"]


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    ignore_fields: Sequence[str] = (),
    mesh: str | Mesh | None = None,
    layers: str = "auto",
    attention: str | None = None,
    progress: Progress | None = None,
) -> Model:
    """A model from a checkpoint directory (config.json and safetensors), a file (.gguf; .pth of RWKV), or "org/name" on
    the hub.

    For the hub, where no directory has that name: revision, a branch, tag or commit; token, default HF_TOKEN;
    cache_dir, default huggingface_hub's; local_files_only=True makes no request. A path takes none of these.
    dtype: of the parameters and the computation; default the checkpoint's on an accelerator, float32 on a CPU. A field
    of config.json or a tensor that is unknown or missing is a ValueError naming it; ignore_fields names fields to pass
    over. tokenizer: a source, or a file (tokenizer.json, rwkv_vocab_v20230424.txt), in place of the checkpoint's own.
    layers: "stacked" runs them in scans, "unrolled" one by one, "auto" unrolled on a single CPU device.
    attention names an implementation, default the best that can. progress is told (bytes done, bytes in all).
    mesh: "fsdp=4,tensor=2", or a mesh of ours (`make_mesh`), over whose devices the parameters are laid out; each host
    reads what its own devices hold. Dimensions that do not divide stay whole, and are listed in a warning.
    """
    inputs.choice("dtype", dtype, (None, *inputs.DTYPES))
    inputs.choice("layers", layers, LAYERS)
    inputs.choice("attention", attention, (None, *IMPLS))
    placed = _mesh(mesh, layers)
    opened = open_checkpoint(
        source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    ).with_tokenizer(tokenizer)
    fam = family(opened.model_type)
    config = fam.config(opened.hf_config, tuple(ignore_fields))
    shapes = parameter_shapes(fam, config)
    into = None if placed is None else flatten(parameter_shardings(fam, config, placed))
    if dtype is None and jax.default_backend() == "cpu":
        dtype = "float32"
    tensors = opened.source()
    try:
        names = tensor_names(fam, config, shapes, tensors.tensors)
        arrays, manifest = load_arrays(
            tensors,
            names,
            shapes,
            where=opened.where,
            buffers=fam.buffers,
            dtype=dtype,
            progress=progress,
            shardings=into,
        )
    finally:
        tensors.close()
    return Model(
        family=fam,
        config=config,
        weights=Weights(config, unflatten(arrays)),
        hf_config=opened.hf_config,
        generation_config=opened.generation_config,
        runtime=Runtime(dtype=dtype, attention=attention),
        layers=layers,
        mesh=placed,
        opened=opened,
        manifest=manifest,
    )


def init(
    config: str | Path | Mapping[str, Any],
    *,
    key: jax.Array | None = None,
    dtype: str = "float32",
    mesh: str | Mesh | None = None,
    layers: str = "auto",
    ignore_fields: Sequence[str] = (),
) -> Model:
    """A model from scratch: fresh parameters for a config.json (a path to it, or its contents).

    mesh: as for `load`; no device ever holds more than its part. The numbers do not depend on it.
    """
    inputs.choice("dtype", dtype, inputs.DTYPES)
    inputs.choice("layers", layers, LAYERS)
    placed = _mesh(mesh, layers)
    hf = dict(config) if isinstance(config, Mapping) else files.read_json(_config_path(Path(config)))
    if "model_type" not in hf:
        raise ValueError("config.json has no 'model_type', which names the architecture")
    fam = family(hf["model_type"])
    made = fam.config(hf, tuple(ignore_fields))
    dtypes = unflatten(tensor_names(fam, made, parameter_shapes(fam, made), ()).dtypes(dtype))
    cast = lambda key: jax.tree.map(lambda a, dtype: a.astype(dtype), fam.backbone.init(made, key), dtypes)
    into: dict[str, Any] = {} if placed is None else {"out_shardings": parameter_shardings(fam, made, placed)}
    params = jax.jit(cast, **into)(jax.random.key(0) if key is None else key)
    return Model(
        family=fam,
        config=made,
        weights=Weights(made, params),
        hf_config=hf,
        generation_config={},
        runtime=Runtime(dtype=dtype),
        layers=layers,
        mesh=placed,
    )


def convert(
    source: str | Path,
    directory: str | Path,
    *,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    ignore_fields: Sequence[str] = (),
    progress: Progress | None = None,
) -> None:
    """Any source that `load` takes, and a training run, written as `Model.save` writes it; one tensor in memory.

    tokenizer: as for `load`. dtype None gives every tensor of safetensors and .pth back in its own, bit for bit; of
    anything else, in float32.
    """
    inputs.choice("dtype", dtype, (None, *inputs.DTYPES))
    opened = open_checkpoint(source).with_tokenizer(tokenizer)
    fam = family(opened.model_type)
    config = fam.config(opened.hf_config, tuple(ignore_fields))
    tensors = opened.source()
    try:
        names = tensor_names(fam, config, parameter_shapes(fam, config), tensors.tensors)
        manifest = examine(tensors, names, where=opened.where, buffers=fam.buffers)
        wanted, read = streamed(tensors, names, manifest, dtype)
        with staged(directory, overwrite) as staging:
            write_checkpoint(staging, wanted, read, manifest, progress=progress)
            write_files(staging, opened.hf_config, opened.generation_config, opened, dtype)
    finally:
        tensors.close()


def parameter_shapes(fam: Family, config: Any) -> dict[str, tuple[int, ...]]:
    """{path: shape} of every parameter, without making any."""
    tree = jax.eval_shape(lambda: fam.backbone.init(config, jax.random.key(0)))
    return {path: leaf.shape for path, leaf in flatten(tree).items()}


def parameter_shardings(fam: Family, config: Any, mesh: Mesh) -> dict[str, Any]:
    """The tree of every parameter's sharding; dimensions that do not divide over the mesh are logged by name."""
    tree = jax.eval_shape(lambda: fam.backbone.init(config, jax.random.key(0)))
    made, whole = shardings(fam.backbone.logical_axes(config), tree, mesh)
    if whole:
        listed = ", ".join(f"{one.path} ({one.axis}={one.size} over {one.over})" for one in whole)
        log.warning("these dimensions do not divide over the mesh and stay whole: %s", listed)
    return made


def _mesh(mesh: str | Mesh | None, layers: str) -> Mesh | None:
    if mesh is not None and layers == "unrolled":
        raise ValueError("layers='unrolled' is a form for one device; on a mesh layers are stacked")
    if isinstance(mesh, Mesh) and mesh.axis_names != AXES:
        raise ValueError(
            f"mesh has the axes {mesh.axis_names}, expected {AXES}: jaxlm.parallel.mesh.make_mesh makes one"
        )
    return make_mesh(mesh) if isinstance(mesh, str) else mesh


def _config_path(path: Path) -> Path:
    path = path / files.CONFIG if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config.json")
    return path
