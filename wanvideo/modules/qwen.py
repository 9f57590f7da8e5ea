"""Qwen2.5, the language model that extends prompts: transformers' Qwen2ForCausalLM of any size.

Source: Qwen/Qwen2.5 (architecture, form of a conversation), Wan-Video/Wan2.2 (its use for prompts).
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...quiet_imports import kernels_hidden
from ..assign import assign, head_count, layer_count
from ..checkpoint import Checkpoint, open_checkpoint
from .qwen_tokenizer import END, END_OF_TEXT, START, QwenTokenizer, find_qwen_tokenizer

if TYPE_CHECKING:
    from ...host import Host

# Channels of a head, but for the model of 0.5B, which is this wide and has heads of 64.
HEAD_SIZE, SMALLEST, SMALLEST_HEAD = 128, 896, 64
ROPE_BASE, LONGEST, EPSILON = 1_000_000.0, 32768, 1e-6
# How the next token is drawn; those of Wan's prompt extension.
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}


class Qwen:
    """A loaded Qwen2.5 under the host's memory management (socket QWENMODEL)."""

    def __init__(self, model: nn.Module, tokenizer: QwenTokenizer, *, host: Host) -> None:
        self.model = model
        self.managed = host.manage(model)
        self._tokenizer = tokenizer
        self._host = host

    @torch.no_grad()
    def answer(
        self, system: str, prompt: str, *, most: int, seed: int, device: torch.device | None = None
    ) -> str:
        """What the model answers to `prompt` under the instructions `system`, at most `most` tokens.

        device: where to compute, None: the host's. The seed gives the same answer on the same kind of device.
        """
        if device is None:
            device = self.managed.acquire()
        else:
            self.model.to(device)
        said = (("system", system), ("user", prompt))
        text = "".join(f"{START}{who}\n{what}{END}\n" for who, what in said) + f"{START}assistant\n"
        ids = torch.tensor([self._tokenizer.encode(text)], device=device)
        ends = [self._tokenizer.id_of(mark) for mark in (END, END_OF_TEXT)]
        with ExitStack() as stack:
            progress = stack.enter_context(self._host.progress(most, "Extending the prompt"))
            # `generate` draws from the generators of the whole process, which belong to others.
            stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
            torch.manual_seed(seed)

            def watch(so_far: Tensor, scores: object) -> Tensor:
                """Asks after each token whether to stop: only where the user cancelled, which raises."""
                self._host.check_cancelled()
                progress.update(so_far.shape[1] - ids.shape[1])
                return torch.zeros(so_far.shape[0], dtype=torch.bool, device=so_far.device)

            written = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, stopping_criteria=[watch],
                eos_token_id=[end for end in ends if end is not None], pad_token_id=ends[0], **SAMPLING,
            )  # fmt: skip
        return self._tokenizer.decode(written[0, ids.shape[1] :].tolist())


def load_qwen(path: Path, *, dtype: torch.dtype, host: Host) -> Qwen:
    """Load a Qwen2.5 of any size under Hugging Face's names; of a model that sees pictures, its language model.

    FP8 files are expanded to `dtype`. Raises ValueError for another kind of file, FileNotFoundError where there is no
    tokenizer.
    """
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = _build(checkpoint)
    names = {name: name for name, _ in model.named_parameters()}
    tokenizer = find_qwen_tokenizer(path, [path.parent, host.models_dir("text_encoders")])
    assign(model, checkpoint, names, dtype=dtype, what="Qwen2.5 language model")
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    # Its frequencies are in no file.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return Qwen(model, tokenizer, host=host)


def _build(checkpoint: Checkpoint) -> nn.Module:
    with kernels_hidden("transformers"):
        from transformers import Qwen2Config, Qwen2ForCausalLM

    shapes, layer = checkpoint.shapes, "model.layers.0"
    if "model.embed_tokens.weight" not in shapes or f"{layer}.self_attn.q_proj.bias" not in shapes:
        raise ValueError(
            f"{checkpoint.path.name} is no Qwen2.5 language model: choose a file such as "
            "Qwen2.5_7B_instruct_bf16.safetensors."
        )
    vocabulary, width = shapes["model.embed_tokens.weight"]
    heads = head_count(checkpoint, width, SMALLEST_HEAD if width == SMALLEST else HEAD_SIZE)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=shapes[f"{layer}.mlp.gate_proj.weight"][0],
            num_hidden_layers=layer_count(shapes, "model.layers."),
            num_attention_heads=heads,
            num_key_value_heads=shapes[f"{layer}.self_attn.k_proj.weight"][0] * heads // width,
            rope_theta=ROPE_BASE,
            rms_norm_eps=EPSILON,
            max_position_embeddings=LONGEST,
            tie_word_embeddings="lm_head.weight" not in shapes,
        )
    )
