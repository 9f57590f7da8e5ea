"""Stand-ins for the attention packages that need a GPU: contracts enforced, exact arithmetic, K changed in place."""

import sys
import types

import pytest
import sage3_stand_in
import torch
from wanvideo_wrapper.attention_backends import contract


def exact(q, k, v):
    """[B, H, L, D], in float32."""
    scores = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v.float()).to(q.dtype)


def check(*tensors):
    """What compiled kernels need of each tensor."""
    for t in tensors:
        assert t.dtype in (torch.bfloat16, torch.float16)
        assert t.is_contiguous() and t.data_ptr() % 16 == 0


def sageattn(q, k, v, tensor_layout="HND"):
    """SageAttention 1.0.6 and 2: K loses its mean in place."""
    assert tensor_layout == "NHD"
    check(q, k, v)
    k -= k.mean(dim=1, keepdim=True)
    return exact(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def sageattn_fp8(q, k, v, tensor_layout="HND", qk_quant_gran="per_thread"):
    """SageAttention 2's 8-bit kernel on Ada and Hopper; its own `sageattn` calls it so."""
    assert qk_quant_gran == ("per_warp" if contract.capability(q.device)[0] == 12 else "per_thread")
    return sageattn(q, k, v, tensor_layout)


def sageattn_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """Sequences one after the other, [tokens, H, D]."""
    check(q, k, v)
    assert q.shape[-1] in (64, 128)
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    k -= k.mean(dim=0, keepdim=True)
    parts = []
    for i in range(len(cu_seqlens_q) - 1):
        at_q, at_k = slice(*cu_seqlens_q[i : i + 2].tolist()), slice(*cu_seqlens_k[i : i + 2].tolist())
        parts.append(exact(*(t.transpose(0, 1) for t in (q[at_q], k[at_k], v[at_k]))).transpose(0, 1))
    return torch.cat(parts)


def flash_attn_func(q, k, v):
    """FlashAttention: [B, L, H, D]."""
    check(q, k, v)
    return exact(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def flash_3(q, k, v):
    """Older builds of FlashAttention 3 return the log-sum-exp too."""
    return flash_attn_func(q, k, v), torch.zeros(())


PACKAGES = {
    "sageattention": {
        "sageattn": sageattn,
        "sageattn_varlen": sageattn_varlen,
        "sageattn_qk_int8_pv_fp8_cuda": sageattn_fp8,
        "sageattn_qk_int8_pv_fp8_cuda_sm90": sageattn_fp8,
    },
    "sageattn3": {"sageattn3_blackwell": sage3_stand_in.sageattn3_blackwell},
    "flash_attn": {"flash_attn_func": flash_attn_func},
    "flash_attn_interface": {"flash_attn_func": flash_3},
}


def install(monkeypatch, packages=PACKAGES):
    """Let these packages be imported."""
    for name, functions in packages.items():
        module = types.ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)


def pretend(monkeypatch, capability):
    """Let every device have this compute capability."""
    monkeypatch.setattr(contract, "capability", lambda device: capability)


@pytest.fixture
def blackwell(monkeypatch):
    """All packages on a GPU of compute capability 12.0, which computes on the CPU."""
    install(monkeypatch)
    pretend(monkeypatch, (12, 0))
