from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from workbench.activations.shardfile import read_tensor, safetensors_parts
from workbench.core.errors import CorruptFileError
from workbench.engine.local import LocalFolder


def _tensors() -> dict[str, torch.Tensor]:
    return {
        "token": torch.arange(7).int(),
        "position": torch.arange(7).short(),
        "resid_post.1": torch.randn(7, 5).bfloat16(),
        "mlp_out.0": torch.randn(9, 3).bfloat16()[2:],
        "z.0.h1": torch.randn(3, 7).bfloat16().T,
        "é/scale": torch.randn(7).half(),
        "levels": torch.randint(-127, 128, (7, 3)).to(torch.int8),
        "empty": torch.zeros(0, 3).int(),
    }


def test_the_bytes_are_those_of_the_safetensors_library() -> None:
    tensors = _tensors()
    for names in (tuple(tensors), ("token",), ("levels", "é/scale")):
        some = {name: tensors[name] for name in names}
        expected = safetensors.torch.save({name: t.contiguous() for name, t in some.items()})
        assert b"".join(safetensors_parts(some)) == expected


def test_one_tensor_is_read_alone(tmp_path: Path) -> None:
    tensors, folder = _tensors(), LocalFolder(tmp_path)
    folder.write("x.safetensors", safetensors_parts(tensors))
    for name, t in tensors.items():
        if t.numel():
            assert torch.equal(read_tensor(folder, "x.safetensors", name), t)
    with pytest.raises(CorruptFileError, match=r"x\.safetensors has no readable tensor 'toke'"):
        read_tensor(folder, "x.safetensors", "toke")
    folder.write("x.safetensors", [b"no"])
    with pytest.raises(CorruptFileError, match=r"repair=True"):
        read_tensor(folder, "x.safetensors", "token")
