"""What a checkpoint looked like on disk, so that saving it can give back every name in its own file and dtype."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxlm.checkpoints.source import TensorInfo


@dataclasses.dataclass(frozen=True, eq=False)
class Manifest:
    """Kept by `load`, used by `write_checkpoint`; holds no weights but the ignored buffers, which are small."""

    files: Mapping[str, bytes]  # safetensors file -> its raw JSON header; empty for other formats
    tensors: Mapping[str, TensorInfo]  # every stored tensor, buffers and duplicates included
    buffers: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # not parameters, written back as read
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)  # dropped duplicate -> the tensor it equals
    keeps_dtypes: bool = False  # of tensors stored as they are: those of safetensors and .pth, not of GGUF
    index: bytes | None = None  # model.safetensors.index.json as it was
