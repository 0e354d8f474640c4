"""Prefill and a decoding step as abstract programs, for plans: the real functions over shapes alone."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxlm.generation import loop
from jaxlm.generation.sampling import Sampling
from jaxlm.models.decoder import Runtime
from jaxlm.models.registry import Family
from jaxlm.parallel.flops import flops_of
from jaxlm.parallel.plan import Program, place, without_shardings
from jaxlm.parallel.sharding import shardings, spec

NEW = 128  # tokens that a state has room for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """`batch` prompts of `seq` tokens, weights and cache in `precision`."""

    family: Family
    config: Any
    batch: int
    seq: int
    precision: str = "bfloat16"
    attention: str | None = None

    def plan(self) -> loop.Plan:
        """The static part of the generation."""
        return loop.Plan(
            backbone=self.family.backbone,
            config=self.config,
            runtime=Runtime(dtype=self.precision, attention=self.attention),
            sampling=Sampling(temperature=0.0),
            eos=(0,),
            pad=0,
            capacity=NEW,
            length=self.seq + NEW,
            rope_len=self.seq + NEW,
        )

    def prefill(self, mesh: Mesh | AbstractMesh) -> Program:
        """Reads all prompts, and draws their first tokens."""
        params, row = self._params(mesh), self._rows(mesh)
        tokens, lengths = row((self.batch, self.seq), "batch", None), row((self.batch,), "batch")
        args = (params, tokens, lengths, self._key(mesh))
        kinds = {"parameters": params, "batch": (tokens, lengths)}
        count = self.batch * self.seq
        return Program("prefill", loop.prefill, args, kinds, self._flops(loop.prefill, *args), count, (self.plan(),))

    def decode(self, mesh: Mesh | AbstractMesh) -> Program:
        """Draws one more token for each row, the cache nearly full."""
        params, row = self._params(mesh), self._rows(mesh)
        shape = jax.ShapeDtypeStruct
        state = jax.eval_shape(
            lambda *args: loop.prefill(self.plan(), *args),
            without_shardings(params),
            shape((self.batch, self.seq), jnp.int32),
            shape((self.batch,), jnp.int32),
            jax.eval_shape(lambda: jax.random.key(0)),
        )
        names = {"cache": ("layers", "batch", None, "kv_heads", None), "rows": ("batch", None)}
        own = getattr(self.family.backbone, "CACHE_AXES", {})  # of leaves that are not keys and values

        def placed(path, leaf):
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return self._key(mesh)
            in_cache = str(getattr(path[0], "key", "")) == "cache"
            axes = own.get(str(getattr(path[-1], "key", ""))) if in_cache else None
            axes = axes or names["cache" if in_cache else "rows"]
            return row(leaf.shape, *axes[: leaf.ndim], dtype=leaf.dtype)

        state = jax.tree_util.tree_map_with_path(placed, state)
        args = (params, state, row((), dtype=jnp.int32))
        kinds = {"parameters": params, "cache": state["cache"]}
        return Program(
            "decode step", loop.decode, args, kinds, self._flops(loop.decode, *args), self.batch, (self.plan(),)
        )

    def _params(self, mesh) -> Any:
        backbone = self.family.backbone
        made = jax.eval_shape(lambda: backbone.init(self.config, jax.random.key(0)))
        made = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, self.precision), made)
        return place(made, shardings(backbone.logical_axes(self.config), made, mesh)[0])

    def _rows(self, mesh):
        def row(shape, *axes, dtype=jnp.int32):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(axes, shape, mesh)[0]))

        return row

    def _key(self, mesh) -> jax.ShapeDtypeStruct:
        key = jax.eval_shape(lambda: jax.random.key(0))
        return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def _flops(self, function, *args) -> float:
        return flops_of(functools.partial(function, self.plan()), *without_shardings(args)).total
