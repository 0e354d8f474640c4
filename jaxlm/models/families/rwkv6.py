"""RWKV-6 (Finch): the decays, and how tokens blend, follow from the token."""

from jaxlm.checkpoints.rules import AnyRule
from jaxlm.models import rwkv, rwkv_config, rwkv_names
from jaxlm.models.rwkv_config import RwkvConfig

BACKBONE = rwkv
BASE = "rwkv."
SPELLINGS = (rwkv_names.blinkdl, rwkv_names.candle)
config = rwkv_config.rwkv6


def rules(config: RwkvConfig) -> tuple[AnyRule, ...]:
    return rwkv_names.blinkdl(config) if config.names else rwkv_names.hf(config)
