"""Tooltips of inputs that several nodes have; a node's own comes first."""

from __future__ import annotations

from collections.abc import Mapping

Rows = Mapping[str, tuple[object, ...]]

BY_TYPE: Mapping[str, str] = {
    "AUDIO": "Sound, from Load Audio",
    "BLOCKSWAPARGS": "Lets blocks wait in main memory; from WanVideo Block Swap",
    "CACHEARGS": "Leaves steps out; from WanVideo TeaCache, MagCache or EasyCache",
    "CLIP_VISION": "From WanVideo CLIP Text Encoder Loader or Load CLIP Vision",
    "EXPERIMENTALARGS": "From WanVideo Experimental Args",
    "FANTASYPORTRAITMODEL": "FantasyPortrait's weights beside the model's; from its loader",
    "FANTASYTALKINGMODEL": "FantasyTalking's weights beside the model's; from its loader",
    "FANTASYTALKING_EMBEDS": "Speech for FantasyTalking, which the model must have been loaded with",
    "FETAARGS": "From WanVideo Enhance-A-Video",
    "FLOWEDITARGS": "FlowEdit is gone from the original, too: leave it empty",
    "FREEINITARGS": "Samples several times from better noise; from WanVideo FreeInit Args",
    "IMAGE": "Pictures, or the frames of a video",
    "LATENT": "Latents of a video",
    "LOOPARGS": "Makes a video that can repeat; from WanVideo Loop Args",
    "MASK": "1 where the node acts",
    "MULTIGPUARGS": "Lets several GPUs make the video; from WanVideo Multi GPU",
    "MULTITALKMODEL": "Speech weights beside the model's; from Multi/InfiniteTalk Model Loader",
    "MULTITALK_EMBEDS": "Speech; from Multi/InfiniteTalk Wav2vec2 Embeds",
    "SAMPLER_ARGS": "From WanVideo Sampler Settings",
    "SIGMAS": "A schedule of noise levels in the place of steps and shift",
    "SLGARGS": "Leaves blocks out of the negative pass; from WanVideo SLG",
    "UNI3C_EMBEDS": "Camera motion; from WanVideo Uni3C Embeds",
    "UNIANIMATE_POSE": "Drawn poses; from WanVideo UniAnimate Pose Input",
    "VACEPATH": "A module beside the model; from WanVideo VACE Module Select or WanVideo Extra Model Select",
    "VRAM_MANAGEMENTARGS": "Lets a share of the blocks wait in main memory; from WanVideo VRAM Management",
    "WANCOMPILEARGS": "Compiles the blocks; from WanVideo Torch Compile Settings",
    "WANTEXTENCODER": "From WanVideo T5 Text Encoder Loader",
    "WANVAE": "From WanVideo VAE Loader; the VAE of the model",
    "WANVIDCONTEXT": "Samples a long video in windows; from WanVideo Context Options",
    "WANVIDEOMODEL": "From WanVideo Model Loader",
    "WANVIDEOSCHEDULER": "Noise levels and solver; from WanVideo Scheduler v2",
    "WANVIDEOTEXTEMBEDS": "The prompts; from WanVideo TextEncode",
    "WANVIDIMAGE_CLIPEMBEDS": "What CLIP sees in pictures; from WanVideo ClipVision Encode",
    "WANVIDIMAGE_EMBEDS": "Size, length and pictures; from WanVideo Empty Embeds or a node that encodes pictures",
    "WANVIDLORA": "LoRAs; from WanVideo Lora Select",
    "WANVIDSAMPLEREXTRAARGS": "Options that are seldom needed; from WanVideoSampler v2 Extra Args",
    "WAV2VECMODEL": "From Wav2vec2 Model Loader",
}
BY_NAME: Mapping[str, str] = {
    "attention_mode": "sdpa runs everywhere; `wanvideo doctor` lists what else runs here",
    "backend": "inductor makes faster kernels; cudagraphs replays launches",
    "base_precision": "Of activations, and of weights that the file holds in 16 or 32 bits; fp16_fast adds up in fp16",
    "block_swap_debug": "Changes nothing: the log says what is swapped",
    "cfg": "How much the prompt counts; 1 runs without the negative prompt, in half the time",
    "denoise_strength": "Below 1 it starts later in the schedule, so that samples show through",
    "dynamo_cache_size_limit": "Of compiled variants of a function; more are run without compiling",
    "dynamo_recompile_limit": "The same limit under its newer name",
    "force_parameter_static_shapes": "Compile for the sizes of the weights, which do not change",
    "height": "In pixels; rounded down to a multiple of 16, for the 5B of 32",
    "load_device": "Where it waits: offload_device is main memory",
    "mode": "What the compiler tries; max-autotune compiles for minutes",
    "precision": "What it computes in; bf16 takes half the memory of fp32",
    "quantization": "fp8 takes half the memory of 16 bits",
    "seed": "The same seed gives the same video",
    "start_step": "The first step that runs, counted from 0; for the second of two samplers",
    "steps": "More steps are slower and finer; models with a distillation LoRA need 4 to 8",
    "use_non_blocking": "Changes nothing: copies always run beside the computation",
    "vace_blocks_to_swap": "The same for the blocks of a VACE module",
    "width": "In pixels; rounded down to a multiple of 16, for the 5B of 32",
}


def with_tips(declared: Mapping[str, Rows], otherwise: str = "") -> dict[str, dict[str, tuple[object, ...]]]:
    """INPUT_TYPES with a tooltip for every input that one is known of, or `otherwise`."""
    shown = {section: rows for section, rows in declared.items() if section in ("required", "optional")}
    tipped = {section: {n: _row(n, r, otherwise) for n, r in rows.items()} for section, rows in shown.items()}
    return {**declared, **tipped}


def _row(name: str, row: tuple[object, ...], otherwise: str) -> tuple[object, ...]:
    kind, *rest = row
    options = rest[0] if rest else {}
    by_type = BY_TYPE.get(kind) if isinstance(kind, str) else None
    tip = options.get("tooltip") or by_type or BY_NAME.get(name, otherwise)
    return (kind, {**options, "tooltip": tip}) if tip else row
