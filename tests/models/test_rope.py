"""The frequencies of every RoPE against transformers', for real sizes: an error there grows with the position."""

import itertools
import logging

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jaxlm.models import fields
from jaxlm.models.reader import Reader

logging.getLogger("transformers").setLevel(logging.ERROR)
CONTEXT = 8192
SIZES = list(itertools.product((10_000.0, 500_000.0, 1_000_000.0, 317.0), (12, 64, 128)))
SCALINGS = {
    "default": {},
    "linear": {"factor": 3.7},
    "dynamic": {"factor": 3.7},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 3.7},
    "longrope": {"factor": 3.7},
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [100, CONTEXT + 4097])
def test_frequencies_equal_transformers_to_the_last_place(name, length):
    """Within two units in the last place: the power in torch is itself off by one for some sizes."""
    for theta, dim in SIZES:
        scaling = SCALINGS[name] | {"rope_type": name, "rope_theta": theta}
        if name in ("llama3", "yarn", "longrope"):
            scaling["original_max_position_embeddings"] = CONTEXT
        if name == "longrope":
            factors = lambda end, dim=dim: list(np.linspace(1, end, dim // 2))
            scaling |= {"short_factor": factors(2.0), "long_factor": factors(9.0)}
        context = CONTEXT if name == "dynamic" else CONTEXT * 4
        hf = {"hidden_size": 2 * dim, "num_attention_heads": 2, "head_dim": dim, "max_position_embeddings": context}
        rope = fields.rope(Reader(hf | {"rope_parameters": scaling}))
        config = LlamaConfig(**hf, rope_parameters=dict(scaling))
        if name == "default":
            want, factor = 1 / theta ** (torch.arange(0, dim, 2).float() / dim), 1.0
        else:
            want, factor = ROPE_INIT_FUNCTIONS[name](config, "cpu", seq_len=torch.tensor(length))
        np.testing.assert_allclose(rope.frequencies(length), want.numpy(), rtol=2e-7, err_msg=f"{theta=} {dim=}")
        assert rope.attention_factor == pytest.approx(factor, rel=1e-7)
