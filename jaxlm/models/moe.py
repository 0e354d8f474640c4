"""Mixture of experts: a float32 router, and sorted dropless dispatch through grouped products."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.models.config import MoeConfig
from jaxlm.models.layers import ACTIVATIONS, Einsum, Leaf, RaggedDot
from jaxlm.models.mlp import Mlp


class Moe(nn.Module):
    """Top-k experts per token plus an optional shared one. Nothing is dropped, so a token's result never depends on
    its neighbours. Returns the router's statistics for the load-balancing loss beside the output."""

    config: MoeConfig
    d_model: int
    std: float

    @nn.compact
    def __call__(self, x: Array, valid: Array | None = None) -> tuple[Array, dict[str, Array]]:
        c = self.config
        rows = x.reshape(-1, self.d_model)  # [M, D]
        weights, chosen, probs = Router(c, self.d_model, self.std, name="router")(rows)
        y = Experts(c, self.d_model, self.std, name="experts")(rows, weights, chosen)
        y = y.reshape(x.shape)
        if c.shared is not None:
            shared = Mlp(c.shared, self.d_model, self.std, name="shared")(x)
            if c.shared_gate:
                gate = Einsum("BTD,DO->BTO", (self.d_model, 1), ("embed", None), std=self.std, name="shared_gate")(x)
                shared = shared * jax.nn.sigmoid(gate)
            y = y + shared
        return y, _statistics(probs, chosen, c.n_experts, valid)


class Router(Leaf):
    """Scores in float32 whatever the compute dtype: a bfloat16 router picks other experts."""

    config: MoeConfig
    d_model: int
    std: float

    @nn.compact
    def __call__(self, rows: Array) -> tuple[Array, Array, Array]:
        """rows [M, D] -> weights [M, k] float32, experts [M, k] int32, probabilities [M, E] float32."""
        c = self.config
        eqn, axes = "MD,DE->ME", ("embed", None)
        logits = Einsum(eqn, (self.d_model, c.n_experts), axes, std=self.std, name="gate")(rows.astype(jnp.float32))
        probs = jax.nn.softmax(logits, axis=-1)
        weights, chosen = jax.lax.top_k(probs, c.top_k)
        if c.renormalise:
            weights = weights / weights.sum(-1, keepdims=True)
        return weights, chosen, probs


class Experts(nn.Module):
    config: MoeConfig
    d_model: int
    std: float

    @nn.compact
    def __call__(self, rows: Array, weights: Array, chosen: Array) -> Array:
        """Rows sorted by expert, one grouped product per matrix, then each token's k results weighted and summed."""
        c, (m, k) = self.config, chosen.shape
        order = jnp.argsort(chosen.reshape(-1), stable=True)  # [M k]
        sizes = jnp.bincount(chosen.reshape(-1), length=c.n_experts).astype(jnp.int32)
        x = rows[order // k]  # [M k, D]
        up_shape, up_axes = (c.n_experts, self.d_model, c.expert.d_ff), ("experts", "embed", "mlp")
        h = RaggedDot(up_shape, up_axes, self.std, name="up")(x, sizes)
        if c.expert.gated:
            gate = RaggedDot(up_shape, up_axes, self.std, name="gate")(x, sizes)
            h = ACTIVATIONS[c.expert.act](gate) * h
        else:
            h = ACTIVATIONS[c.expert.act](h)
        down_shape, down_axes = (c.n_experts, c.expert.d_ff, self.d_model), ("experts", "mlp", "embed")
        y = RaggedDot(down_shape, down_axes, self.std, name="down")(h, sizes)
        y = jnp.zeros_like(y).at[order].set(y, unique_indices=True).reshape(m, k, self.d_model)
        return jnp.einsum("MKD,MK->MD", y.astype(jnp.float32), weights).astype(rows.dtype)


def _statistics(probs: Array, chosen: Array, n_experts: int, valid: Array | None) -> dict[str, Array]:
    """Sums over valid tokens: how often each expert was each choice [k, E], its probability [E], and the count."""
    keep = jnp.ones(probs.shape[0]) if valid is None else valid.reshape(-1).astype(jnp.float32)
    picks = jax.nn.one_hot(chosen, n_experts) * keep[:, None, None]  # [M, k, E]
    return {"router_picks": picks.sum(0), "router_probs": (probs * keep[:, None]).sum(0), "router_tokens": keep.sum()}


def load_balancing_loss(picks: Array, probs: Array, tokens: Array) -> Array:
    """E sum_e f_e P_e over all layers' tokens together (Switch Transformer, arXiv 2101.03961, equations 4-6, as
    transformers sums it over the k choices); picks [L, k, E], probs [L, E], tokens [L]."""
    total = tokens.sum()
    return picks.shape[-1] * jnp.sum(picks.sum(0) / total * (probs.sum(0) / total))
