"""Mixture of experts: a float32 router, and experts reached by dispatch.py."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.models.config import MoeConfig
from jaxlm.models.dispatch import Dispatch, dispatch
from jaxlm.models.layers import ACTIVATIONS, Einsum, Leaf, Matrices
from jaxlm.models.mlp import Mlp


class Moe(nn.Module):
    """Top-k experts per token plus an optional shared one. Without a capacity (dispatch.py) nothing is dropped, so a
    token's result never depends on its neighbours. Returns the router's statistics for the load-balancing loss beside
    the output."""

    config: MoeConfig
    d_model: int
    std: float
    capacity: float | None = None

    @nn.compact
    def __call__(self, x: Array, valid: Array | None = None) -> tuple[Array, dict[str, Array]]:
        c = self.config
        weights, chosen, probs = Router(c, self.d_model, self.std, name="router")(x)
        experts = Experts(c, self.d_model, self.std, self.capacity, name="experts")
        y, dropped = experts(x, weights, chosen, valid)
        if c.shared is not None:
            shared = Mlp(c.shared, self.d_model, self.std, name="shared")(x)
            if c.shared_gate:
                gate = Einsum("BTD,DO->BTO", (self.d_model, 1), ("embed", None), std=self.std, name="shared_gate")(x)
                shared = shared * jax.nn.sigmoid(gate)
            y = y + shared
        return y, _statistics(probs, chosen, c.n_experts, valid) | {"router_dropped": dropped}


class Router(Leaf):
    """Scores in float32 whatever the compute dtype: a bfloat16 router picks other experts."""

    config: MoeConfig
    d_model: int
    std: float

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array, Array]:
        """x [B, T, D] -> weights [B, T, k] float32, experts [B, T, k] int32, probabilities [B, T, E] float32."""
        c = self.config
        eqn, axes = "BTD,DE->BTE", ("embed", None)
        logits = Einsum(eqn, (self.d_model, c.n_experts), axes, std=self.std, name="gate")(x.astype(jnp.float32))
        probs = jax.nn.softmax(logits, axis=-1)
        weights, chosen = jax.lax.top_k(probs, c.top_k)
        if c.renormalise:
            weights = weights / weights.sum(-1, keepdims=True)
        return weights, chosen, probs


class Experts(nn.Module):
    """The experts' matrices, and the way to them."""

    config: MoeConfig
    d_model: int
    std: float
    capacity: float | None = None

    @nn.compact
    def __call__(self, x: Array, weights: Array, chosen: Array, valid: Array | None) -> tuple[Array, Array]:
        c = self.config
        wide, narrow = (self.d_model, c.expert.d_ff), (c.expert.d_ff, self.d_model)
        shapes = {"up": wide, "down": narrow} | ({"gate": wide} if c.expert.gated else {})
        axes = {wide: ("experts", "embed", "mlp"), narrow: ("experts", "mlp", "embed")}
        matrices = {
            name: Matrices((c.n_experts, *shape), axes[shape], self.std, name=name)() for name, shape in shapes.items()
        }
        how = Dispatch(c.n_experts, ACTIVATIONS[c.expert.act], self.capacity)
        return dispatch(x, weights, chosen, matrices, how, valid)


def _statistics(probs: Array, chosen: Array, n_experts: int, valid: Array | None) -> dict[str, Array]:
    """Sums over valid tokens: how often each expert was each choice [k, E], its probability [E], and the count."""
    keep = jnp.ones(probs.shape[:2]) if valid is None else valid.astype(jnp.float32)
    picks = jax.nn.one_hot(chosen, n_experts) * keep[..., None, None]  # [B, T, k, E]
    totals = picks.sum((0, 1)), (probs * keep[..., None]).sum((0, 1)), keep.sum()
    return dict(zip(("router_picks", "router_probs", "router_tokens"), totals, strict=True))


def load_balancing_loss(picks: Array, probs: Array, tokens: Array) -> Array:
    """E sum_e f_e P_e over all layers' tokens together (Switch Transformer, arXiv 2101.03961, equations 4-6, as
    transformers sums it over the k choices); picks [L, k, E], probs [L, E], tokens [L]."""
    total = tokens.sum()
    return picks.shape[-1] * jnp.sum(picks.sum(0) / total * (probs.sum(0) / total))
