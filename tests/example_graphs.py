"""The graphs of example_workflows: `python tests/example_graphs.py` writes them and their thumbnails."""

import json
from pathlib import Path

from graph_builder import Graph
from graph_thumbnails import thumbnail
from wanvideo_wrapper.headless.published_files import published

FOLDER = Path(__file__).resolve().parents[1] / "example_workflows"
UMT5, VAE = "umt5-xxl-enc-bf16.safetensors", "Wan2_1_VAE_bf16.safetensors"
CLIP, WAV2VEC = "clip_vision_h.safetensors", "wav2vec2-chinese-base_fp16.safetensors"
T2V, I2V = "Wan2_1-T2V-14B_fp8_e4m3fn_scaled_KJ.safetensors", "Wan2_1-I2V-14B-480P_fp8_e4m3fn.safetensors"
TALKING_I2V = "wan2.1-i2v-14b-480p-Q8_0.gguf"
A14B = "Wan2_2-I2V-A14B-{}_fp8_e4m3fn_scaled_KJ.safetensors"
TALK = "Wan2_1-InfiniteTalk_{}_Q8.gguf"
VACE = "Wan2_1-VACE_module_14B_fp8_e4m3fn.safetensors"
LORA_T2V = "lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16.safetensors"
LORA_I2V = "lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors"
NEGATIVE = "blurred, overexposed, static, subtitles, deformed hands, many people in the background, walking backwards"
FOLDERS = {
    UMT5: "text_encoders", VAE: "vae", CLIP: "clip_vision", WAV2VEC: "wav2vec2", LORA_T2V: "loras", LORA_I2V: "loras",
}  # fmt: skip


def note(title, text, *files):
    """What a graph does, in letters of headings as ComfyUI's other ones are half as large, and the files it needs."""
    lines = [f"# {title}", "", *(f"## {paragraph}\n" for paragraph in text.split("\n\n"))]
    if files:
        lines += ["## Put these files below `ComfyUI/models`, in any subfolder, and press R:", ""]
    for name in files:
        row = published(name)
        lines.append(f"- `{FOLDERS.get(name, 'diffusion_models')}`: [{name}]({row.url(name)}) ({row.gigabytes:g} GB)")
    if UMT5 in files:
        lines += ["", "The tokenizer of the text encoder is fetched once, or taken from `spiece.model` beside it."]
    return "\n".join(lines)


def prompts(graph, text, **widgets):
    return graph.add(
        "WanVideoTextEncodeCached", model_name=UMT5, positive_prompt=text, negative_prompt=NEGATIVE, **widgets
    )


def save(graph, images, fps, prefix, audio=None):
    sound = {} if audio is None else {"audio": audio}
    video = graph.add("CreateVideo", images=images, fps=fps, **sound)
    graph.add("SaveVideo", video=video, filename_prefix=prefix)


def demo():
    graph = Graph("demo_infinitetalk", note(
        "A talking portrait",
        "Press Run: the tiny models, the portrait and the sentence come with the pack. Half a minute to two minutes "
        "later Save Video shows the video, with sound: press its play button. The preview on the sampler has false "
        "colors, as the latents of these models are not Wan's. They know drawn faces only (`demo/MODEL_CARD.md`). "
        "`num_frames` 143 takes the whole sentence instead of its first four seconds.\n\n"
        "Your own: Load Image and Load Audio in the place of *WanVideo Demo Inputs*, 25 frames a second.",
    ))  # fmt: skip
    demo_inputs = graph.add("WanVideoDemoInputs")
    portrait, speech = (demo_inputs, "portrait"), (demo_inputs, "speech")
    module = graph.add("MultiTalkModelLoader", model="tiny_infinitetalk.safetensors")
    model = graph.add(
        "WanVideoModelLoader", model="tiny_wan_i2v.safetensors", base_precision="fp32", multitalk_model=module
    )
    vae = graph.add("WanVideoVAELoader", model_name="tiny_wan_vae.safetensors", precision="fp32")
    text = graph.add(
        "WanVideoTextEncodeCached", model_name="tiny_umt5.safetensors", precision="fp32", use_disk_cache=False,
        positive_prompt="a person talks to the camera, the person keeps still",
        negative_prompt="blurred, static picture",
    )  # fmt: skip
    clip = graph.add("LoadWanVideoClipTextEncoder", model_name="tiny_clip_vision.safetensors", precision="fp32")
    seen = graph.add("WanVideoClipVisionEncode", clip_vision=clip, image_1=portrait)
    ear = graph.add("Wav2VecModelLoader", model="tiny_wav2vec2.safetensors", base_precision="fp32")
    heard = graph.add("MultiTalkWav2VecEmbeds", wav2vec_model=ear, audio_1=speech, num_frames=100)
    loop = graph.add(
        "WanVideoImageToVideoMultiTalk", vae=vae, start_image=portrait, clip_embeds=seen, width=128, height=128,
        frame_window_size=33, motion_frame=9, mode="infinitetalk",
    )  # fmt: skip
    samples = graph.add(
        "WanVideoSampler", model=model, image_embeds=loop, text_embeds=text, multitalk_embeds=heard, steps=12, cfg=1.0,
        shift=3.0, seed=42, scheduler="euler",
    )  # fmt: skip
    images = graph.add("WanVideoPassImagesFromSamples", samples=samples)
    save(graph, images, 25.0, "wanvideo_demo", (heard, "audio"))
    return graph


def text_to_video():
    graph = Graph("text_to_video", note(
        "Text to video, Wan 2.1 14B, 6 steps", "81 frames of 832x480 are 5 seconds at 16 frames a second.",
        T2V, LORA_T2V, UMT5, VAE,
    ))  # fmt: skip
    lora = graph.add("WanVideoLoraSelect", lora=LORA_T2V)
    model = graph.add("WanVideoModelLoader", model=T2V, quantization="fp8_e4m3fn_scaled", lora=lora)
    text = prompts(graph, "a paper boat drifts down a brook between mossy stones, morning light, close shot")
    embeds = graph.add("WanVideoEmptyEmbeds", width=832, height=480, num_frames=81)
    samples = graph.add(
        "WanVideoSampler", model=model, image_embeds=embeds, text_embeds=text, steps=6, cfg=1.0, shift=5.0, seed=1,
        scheduler="dpm++_sde",
    )  # fmt: skip
    vae = graph.add("WanVideoVAELoader", model_name=VAE)
    save(graph, graph.add("WanVideoDecode", vae=vae, samples=samples), 16.0, "text_to_video")
    return graph


def animated(graph, model, *, steps, shift, clip=True, tiled=False, second=None):
    """From a picture to the video's file. second: a model that takes over, the step where it does."""
    picture = graph.add("LoadImage", image="example.png")
    vae = graph.add("WanVideoVAELoader", model_name=VAE)
    given = {}
    if clip:
        eye = graph.add("LoadWanVideoClipTextEncoder", model_name=CLIP)
        given["clip_embeds"] = graph.add("WanVideoClipVisionEncode", clip_vision=eye, image_1=picture)
    text = prompts(graph, "the camera moves slowly towards the subject, which begins to move", device="gpu")
    embeds = graph.add(
        "WanVideoImageToVideoEncode", vae=vae, start_image=picture, width=832, height=480, num_frames=81,
        tiled_vae=tiled, **given,
    )  # fmt: skip
    widgets = {"steps": steps, "cfg": 1.0, "shift": shift, "seed": 1, "scheduler": "dpm++_sde"}
    shared = {"image_embeds": embeds, "text_embeds": text, **widgets}
    if second is None:
        samples = graph.add("WanVideoSampler", model=model, **shared)
    else:
        other, step = second
        first = graph.add("WanVideoSampler", "High noise", model=model, end_step=step, **shared)
        samples = graph.add("WanVideoSampler", "Low noise", model=other, samples=first, start_step=step, **shared)
    images = graph.add("WanVideoDecode", vae=vae, samples=samples, enable_vae_tiling=tiled)
    save(graph, images, 16.0, graph.name)
    return graph


def picture_to_video():
    graph = Graph("picture_to_video", note(
        "Picture to video, Wan 2.1 14B, 4 steps", "Choose a picture in Load Image and say what happens in the prompt.",
        I2V, LORA_I2V, CLIP, UMT5, VAE,
    ))  # fmt: skip
    lora = graph.add("WanVideoLoraSelect", lora=LORA_I2V)
    model = graph.add("WanVideoModelLoader", model=I2V, quantization="fp8_e4m3fn", lora=lora)
    return animated(graph, model, steps=4, shift=5.0)


def two_models():
    files = [A14B.format("HIGH"), A14B.format("LOW")]
    graph = Graph("two_models_a14b", note(
        "Picture to video, Wan 2.2 A14B, two models",
        "The first sampler ends at step 2 of 4, the second goes on from there. `steps`, `shift`, `scheduler` and "
        "`seed` of the two are the same.", *files, LORA_I2V, UMT5, VAE,
    ))  # fmt: skip
    models = []
    for name, strength in zip(files, (3.0, 1.0), strict=True):
        lora = graph.add("WanVideoLoraSelect", lora=LORA_I2V, strength=strength)
        models.append(graph.add("WanVideoModelLoader", model=name, quantization="fp8_e4m3fn_scaled", lora=lora))
    return animated(graph, models[0], steps=4, shift=8.0, clip=False, second=(models[1], 2))


def eight_gigabytes():
    graph = Graph("eight_gigabytes", note(
        "Picture to video on a GPU of 8 GB",
        "All 40 blocks wait in main memory and are brought to the GPU one by one; lower `blocks_to_swap` as long as "
        "the run fits. VAE tiling is on. Counted, not measured on a card of this size.", I2V, LORA_I2V, CLIP, UMT5, VAE,
    ))  # fmt: skip
    swap = graph.add("WanVideoBlockSwap", blocks_to_swap=40, prefetch_blocks=1)
    lora = graph.add("WanVideoLoraSelect", lora=LORA_I2V, merge_loras=False)
    model = graph.add(
        "WanVideoModelLoader", model=I2V, quantization="fp8_e4m3fn", lora=lora, block_swap_args=swap
    )
    return animated(graph, model, steps=4, shift=5.0, tiled=True)


def fp4_sage3():
    graph = Graph("fp4_sage3", note(
        "FP4 weights and SageAttention 3",
        "For GPUs of the Blackwell generation with `sageattn3` and `sageattention` installed; `wanvideo doctor` says "
        "whether both run. Elsewhere: `quantization` fp8_e4m3fn, `attention_mode` sdpa.\n\nThe FP8 file is converted "
        "when it is loaded; a file in NVFP4 goes in its place.", I2V, LORA_I2V, CLIP, UMT5, VAE,
    ))  # fmt: skip
    lora = graph.add("WanVideoLoraSelect", lora=LORA_I2V, merge_loras=False)
    model = graph.add(
        "WanVideoModelLoader", model=I2V, quantization="fp4_scaled_fast", attention_mode="sageattn_3", lora=lora
    )
    return animated(graph, model, steps=4, shift=5.0)


def talking(name, title, text, module, voices):
    """InfiniteTalk with one or two voices."""
    files = (TALKING_I2V, module, LORA_I2V, WAV2VEC, CLIP, UMT5, VAE)
    graph = Graph(name, note(title, text, *files))
    size = {"width": 832, "height": 480}
    lora = graph.add("WanVideoLoraSelect", lora=LORA_I2V, merge_loras=False)
    talk = graph.add("MultiTalkModelLoader", model=module)
    swap = graph.add("WanVideoBlockSwap", blocks_to_swap=20)
    model = graph.add(
        "WanVideoModelLoader", model=TALKING_I2V, lora=lora, block_swap_args=swap, multitalk_model=talk
    )
    picture = graph.add("LoadImage", image="example.png")
    ear = graph.add("Wav2VecModelLoader", model=WAV2VEC)
    sounds = {f"audio_{n}": graph.add("LoadAudio", audio=file) for n, file in enumerate(voices, 1)}
    masks = {"ref_target_masks": halves(graph, **size)} if len(voices) > 1 else {}
    heard = graph.add("MultiTalkWav2VecEmbeds", wav2vec_model=ear, num_frames=1000, **sounds, **masks)
    eye = graph.add("LoadWanVideoClipTextEncoder", model_name=CLIP)
    seen = graph.add("WanVideoClipVisionEncode", clip_vision=eye, image_1=picture)
    vae = graph.add("WanVideoVAELoader", model_name=VAE)
    embeds = graph.add(
        "WanVideoImageToVideoMultiTalk", vae=vae, start_image=picture, clip_embeds=seen, frame_window_size=81,
        motion_frame=9, mode="infinitetalk", **size,
    )  # fmt: skip
    samples = graph.add(
        "WanVideoSampler", model=model, image_embeds=embeds, text_embeds=prompts(graph, "people talk to the camera"),
        multitalk_embeds=heard, steps=6, cfg=1.0, shift=11.0, seed=1, scheduler="dpm++_sde",
    )  # fmt: skip
    images = graph.add("WanVideoPassImagesFromSamples", samples=samples)
    save(graph, images, 25.0, name, (heard, "audio"))
    return graph


def halves(graph, *, width, height):
    """Masks of the left and the right half of the picture."""
    black = graph.add("EmptyImage", "Nobody", width=width, height=height, color=0)
    white = graph.add("EmptyImage", "Half of the picture", width=width // 2, height=height, color=0xFFFFFF)
    sides = [
        graph.add("ImageCompositeMasked", title, destination=black, source=white, x=x, y=0)
        for title, x in (("First speaker", 0), ("Second speaker", width // 2))
    ]
    both = graph.add("ImageBatch", image1=sides[0], image2=sides[1])
    return graph.add("ImageToMask", image=both, channel="red")


def vace():
    graph = Graph("vace_picture_to_video", note(
        "VACE: a text-to-video model that begins with a picture",
        "*WanVideo VACE Start To End Frame* makes frames and masks of a start picture, an end picture, or both; "
        "`ref_images` of *WanVideo VACE Encode* takes what the video shall show, `input_frames` a control video.",
        T2V, VACE, LORA_T2V, UMT5, VAE,
    ))  # fmt: skip
    module = graph.add("WanVideoVACEModelSelect", vace_model=VACE)
    lora = graph.add("WanVideoLoraSelect", lora=LORA_T2V)
    model = graph.add(
        "WanVideoModelLoader", model=T2V, quantization="fp8_e4m3fn_scaled", lora=lora, extra_model=module
    )
    picture = graph.add("LoadImage", image="example.png")
    frames = graph.add("WanVideoVACEStartToEndFrame", num_frames=81, empty_frame_level=0.5, start_image=picture)
    vae = graph.add("WanVideoVAELoader", model_name=VAE)
    embeds = graph.add(
        "WanVideoVACEEncode", vae=vae, width=832, height=480, num_frames=81, input_frames=frames,
        input_masks=(frames, "masks"),
    )  # fmt: skip
    samples = graph.add(
        "WanVideoSampler", model=model, image_embeds=embeds, text_embeds=prompts(graph, "the scene comes to life"),
        steps=6, cfg=1.0, shift=5.0, seed=1, scheduler="dpm++_sde",
    )  # fmt: skip
    save(graph, graph.add("WanVideoDecode", vae=vae, samples=samples), 16.0, "vace")
    return graph


def doctor():
    graph = Graph("doctor", note(
        "What runs on this machine",
        "Press Run: every quantization and attention option, whether it runs, why not and how to get it. The self-test "
        "runs each of them on tiny inputs, in about a minute.",
    ))  # fmt: skip
    graph.add("PreviewAny", source=graph.add("WanVideoDoctor"))
    return graph


def all_graphs():
    one = talking(
        "infinitetalk_one_speaker", "InfiniteTalk, one speaker",
        "A picture and a voice. `num_frames` is the longest video, 25 a second; it ends with the sound.",
        TALK.format("Single"), ["speech.wav"],
    )  # fmt: skip
    two = talking(
        "infinitetalk_two_speakers", "InfiniteTalk, two speakers",
        "The left half of the picture speaks with the first voice, the right half with the second: for other places "
        "give two masks to `ref_target_masks`. `multi_audio_type`: para for at once, add for in turn.",
        TALK.format("Multi"), ["speech.wav", "speech_2.wav"],
    )  # fmt: skip
    tasks = [text_to_video(), picture_to_video(), two_models(), one, two, vace(), eight_gigabytes(), fp4_sage3()]
    return [demo(), *tasks, doctor()]


def main():
    for graph in all_graphs():
        text = json.dumps(graph.saved(), indent=1, ensure_ascii=False)
        (FOLDER / f"{graph.name}.json").write_text(f"{text}\n", encoding="utf-8")
        # The demo's is a frame of its video.
        if graph.name != "demo_infinitetalk":
            thumbnail(graph).save(FOLDER / f"{graph.name}.jpg", quality=90)


if __name__ == "__main__":
    main()
