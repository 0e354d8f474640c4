"""RWKV-7 (Goose): a generalised delta rule, which corrects the state along a key before it writes."""

from jaxlm.checkpoints.rules import AnyRule
from jaxlm.models import rwkv, rwkv_config, rwkv_names
from jaxlm.models.rwkv_config import RwkvConfig

BACKBONE = rwkv
BASE = "model."
# Made with every layer, but the first has no earlier values to blend with.
BUFFERS = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")
SPELLINGS = (rwkv_names.fla_joined, rwkv_names.blinkdl)
config = rwkv_config.rwkv7


def rules(config: RwkvConfig) -> tuple[AnyRule, ...]:
    return rwkv_names.blinkdl(config) if config.names else rwkv_names.fla(config)
