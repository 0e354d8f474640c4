"""RWKV-5 (Eagle): a matrix-valued state for each head, with constant decays."""

from jaxlm.checkpoints.rules import AnyRule
from jaxlm.models import rwkv, rwkv_config, rwkv_names
from jaxlm.models.rwkv_config import RwkvConfig

BACKBONE = rwkv
BASE = "rwkv."
SPELLINGS = (rwkv_names.blinkdl,)
config = rwkv_config.rwkv5


def rules(config: RwkvConfig) -> tuple[AnyRule, ...]:
    return rwkv_names.blinkdl(config) if config.names else rwkv_names.hf(config)
