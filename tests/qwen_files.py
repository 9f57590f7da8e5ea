"""Tiny Qwen2.5 models, with and without eyes, and a tokenizer of single bytes with Qwen's marks."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from wanvideo_wrapper.demo.tiny import Tiny

MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
WIDTH, HEADS, PAIRS, LAYERS, HIDDEN = 64, 4, 2, 2, 48
VOCABULARY = 256 + len(MARKS)


def save_tokenizer(path, marks=MARKS):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    path.parent.mkdir(parents=True, exist_ok=True)
    fast.save(str(path))
    return fast


def language_model(*, tied=False, seed=0):
    """Hugging Face's names and shapes."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    keys = WIDTH * PAIRS // HEADS
    tensors = {"model.embed_tokens.weight": random(VOCABULARY, WIDTH) * 8, "model.norm.weight": 1 + random(WIDTH)}
    if not tied:
        tensors["lm_head.weight"] = random(VOCABULARY, WIDTH) * 4
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name, rows in (("q", WIDTH), ("k", keys), ("v", keys)):
            tensors[f"{at}self_attn.{name}_proj.weight"] = random(rows, WIDTH) * 3
            tensors[f"{at}self_attn.{name}_proj.bias"] = random(rows)
        tensors[f"{at}self_attn.o_proj.weight"] = random(WIDTH, WIDTH)
        for name, shape in (("gate", (HIDDEN, WIDTH)), ("up", (HIDDEN, WIDTH)), ("down", (WIDTH, HIDDEN))):
            tensors[f"{at}mlp.{name}_proj.weight"] = random(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = 1 + random(WIDTH)
    return Tiny(tensors=tensors, metadata={"wanvideo.num_heads": str(HEADS)})


def norm(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x, places):
    """Heads [N, H, D] in float64 at places [3, N]: pairs i and i + D/2 turn; a third of them each by another axis."""
    size = x.shape[-1]
    frequencies = 1e6 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    axis = torch.tensor([0] * (size // 8) + [1] * (3 * size // 16) + [2] * (size // 2 - size // 8 - 3 * size // 16))
    angles = places[axis].T * frequencies
    one, other = x[..., : size // 2], x[..., size // 2 :]
    cosine, sine = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat((one * cosine - other * sine, other * cosine + one * sine), -1)


def hidden_states(tensors, x, places):
    """Embedded tokens [N, C] float64 at places [3, N] -> the last hidden states, normed."""
    w = {key: value.double() for key, value in tensors.items()}
    mask = torch.full((len(x), len(x)), -torch.inf, dtype=torch.float64).triu(1)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        y = norm(x, w[f"{at}input_layernorm.weight"])
        q, k, v = (
            (y @ w[f"{at}self_attn.{n}_proj.weight"].T + w[f"{at}self_attn.{n}_proj.bias"]).unflatten(-1, (-1, 16))
            for n in "qkv"
        )
        q, k = turned(q, places), turned(k, places)
        k, v = (part.repeat_interleave(HEADS // PAIRS, 1) for part in (k, v))
        scores = torch.einsum("nhd,mhd->hnm", q, k) / 4 + mask
        y = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v).flatten(1)
        x = x + y @ w[f"{at}self_attn.o_proj.weight"].T
        y = norm(x, w[f"{at}post_attention_layernorm.weight"])
        gate, up = (y @ w[f"{at}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate / (1 + (-gate).exp()) * up) @ w[f"{at}mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"])
