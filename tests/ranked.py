"""What the ranks of the parity tests run; each function is the same on every rank."""

import math
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

torch.manual_seed(7)  # Some cases are drawn as they are imported.

from contract import ALL_CASES, build, inputs  # noqa: E402
from talking import request, run  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N  # noqa: E402
from wanvideo_wrapper.attention import BACKENDS  # noqa: E402
from wanvideo_wrapper.cache_methods.easycache import EasyCache  # noqa: E402
from wanvideo_wrapper.distributed.host import RankHost, ranks_of  # noqa: E402
from wanvideo_wrapper.distributed.ranks import ProcessRanks  # noqa: E402
from wanvideo_wrapper.distributed.sequence import shares, span  # noqa: E402
from wanvideo_wrapper.headless.graph import Link, Node, Prompt  # noqa: E402
from wanvideo_wrapper.headless.runner import Runner  # noqa: E402
from wanvideo_wrapper.headless.several import FollowingRunner  # noqa: E402
from wanvideo_wrapper.host import StandaloneHost, get_host, set_host  # noqa: E402
from wanvideo_wrapper.multitalk import folding  # noqa: E402
from wanvideo_wrapper.ovi.stream import SoundStream  # noqa: E402
from wanvideo_wrapper.wanvideo.attention_plan import AttentionPlan  # noqa: E402
from wanvideo_wrapper.wanvideo.conditioning import Step  # noqa: E402
from wanvideo_wrapper.wanvideo.guidance import Conditions, Denoiser, Guidance  # noqa: E402
from wanvideo_wrapper.wanvideo.modules.vae import Tile, load_vae  # noqa: E402
from wanvideo_wrapper.wanvideo.request import ImageEmbeds  # noqa: E402
from wanvideo_wrapper.wanvideo.sampling import sample  # noqa: E402
from wanvideo_wrapper.wanvideo.shard import ALONE  # noqa: E402
from wanvideo_wrapper.wanvideo.step_cache import StepMemories  # noqa: E402
from wanvideo_wrapper.wanvideo.tokens import BlockInputs  # noqa: E402

CPU = torch.device("cpu")
HEADS = 4


def built(case):
    config = replace(case.config, num_heads=HEADS)
    return build(case.extension, config=config)[1]


def one_step(model, *payloads, ranks, batch=1, channels=16):
    with model.shared_by(ranks), torch.no_grad():
        return model(inputs(*payloads, batch=batch, channels=channels))


def difference(shared, alone):
    """Relative to what `alone` makes in one process, and a sum that is the same on every rank.

    Only the first rank makes it: the others would make the same again, on the same core.
    """
    if dist.get_rank():
        return None, float(shared.sum())
    want = alone()
    return float((shared - want).norm() / want.norm()), float(shared.sum())


def case_difference(name):
    """Of a case's velocity."""
    case = ALL_CASES[name]
    model = built(case)
    shared = one_step(model, case.payload, ranks=ProcessRanks(CPU))
    return difference(shared, lambda: one_step(model, case.payload, ranks=ALONE))


def sound_differences():
    """Of Ovi's velocities with guidance, the video's and the sound's of each pass."""
    case = ALL_CASES["ovi"]
    generator = torch.Generator().manual_seed(4)
    prompts = {name: torch.randn(4, 8, generator=generator) for name in ("positive", "negative")}
    latents = torch.randn(16, 3, 4, 4, generator=generator)
    found = []
    for ranks in (ALONE, ProcessRanks(CPU)):
        stream = SoundStream(case.payload.stream.audio)
        payloads = (replace(case.payload, stream=stream),)
        model = built(case)
        with model.shared_by(ranks), torch.no_grad():
            rule = Guidance(cfg=(3.0,), payloads=payloads)
            conditions = Conditions(**prompts, payloads=payloads)
            denoiser = Denoiser(model, conditions, guidance=rule, device=CPU, dtype=torch.float32)
            picture = denoiser(latents, torch.tensor(500.0), Step(index=0, total=4, in_run=0))
        found.append({"video": picture, **{str(sorted(names)): v for names, v in stream.velocities.items()}})
    alone, shared = found
    assert len(alone) == 3 and set(alone) == set(shared)
    return {name: float((shared[name] - v).norm() / v.norm()) for name, v in alone.items()}


def uneven_difference():
    """Of a plain model, and how many tokens each rank has."""
    model = build(config=replace(ALL_CASES["slg"].config, dim=40, num_heads=5))[0]
    given = replace(inputs(), latents=torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(8)))
    ranks = ProcessRanks(CPU)
    heads = torch.randn(2, 29, 5, 8, generator=torch.Generator().manual_seed(9))
    shard = ranks.shard((3, 2, 3), 29)
    for in_order in (False, True):
        every = shard.heads(shard.take(heads), in_order=in_order)()
        assert torch.equal(shard.tokens(every, heads=5, in_order=in_order), shard.take(heads))
        start, stop = span(shares(5, dist.get_world_size()), dist.get_rank())
        assert not in_order or torch.equal(every, heads[:, :, start:stop])
    assert torch.equal(shard.rest(18).appended(shard.take(heads)[:, shard.count(18) :]), heads[:, 18:])
    with torch.no_grad():
        alone = model(given)
        with model.shared_by(ranks):
            shared = model(given)
    return float((shared - alone).norm() / alone.norm()), shard.lengths


def refusal_behind_others(name):
    """What is said of tokens that a system's own blocks read, behind references of another system."""
    case, phantom = ALL_CASES[name], ALL_CASES["phantom"]
    model = build(phantom.extension, case.extension, config=replace(case.config, num_heads=HEADS))[1]
    try:
        one_step(model, phantom.payload, case.payload, ranks=ProcessRanks(CPU))
    except ValueError as error:
        return str(error)
    return ""


class Order(TorchDispatchMode):
    """Notes projections to heads, attention, and what is sent and waited for."""

    NAMES = {"addmm": "projection", "all_to_all_single": "send", "wait_tensor": "wait", "sdpa": "attention"}

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (name := func.name().rpartition("::")[2]) in self.NAMES:
            self.seen.append(self.NAMES[name])
        return func(*args, **(kwargs or {}))


def order_of_work():
    """Of a block's self-attention."""
    model = built(ALL_CASES["slg"])
    attention, ranks = model.blocks[0].self_attn, ProcessRanks(CPU)
    x, shard = torch.randn(1, 12, 24), ranks.shard((3, 2, 2), 12)
    rope = model.rope((3, 2, 2))
    given = BlockInputs(None, None, shard.take(rope, dim=0), None, (3, 1, 2), shard=shard)
    with torch.no_grad(), Order() as order:
        attention(shard.take(x), given, (), model.blocks[0])
    return order.seen


def refusal(name):
    """What is said where a case cannot be shared."""
    case = ALL_CASES[name]
    try:
        one_step(built(case), case.payload, ranks=ProcessRanks(CPU))
    except ValueError as error:
        return str(error)
    return None


def compiled_difference(name):
    """The same with a block that is traced as one graph."""
    case = ALL_CASES[name]
    model = built(case)
    ranks = ProcessRanks(CPU)
    plain = one_step(model, case.payload, ranks=ranks)
    model.blocks[1].compile(backend="eager", fullgraph=True)
    compiled = one_step(model, case.payload, ranks=ranks)
    return float((compiled - plain).norm() / plain.norm())


def batch_difference():
    """Two rows that share a forward."""
    model = built(ALL_CASES["multitalk"])
    alone, shared = (one_step(model, ranks=ranks, batch=2) for ranks in (ALONE, ProcessRanks(CPU)))
    return float((shared - alone).norm() / alone.norm())


def folded_difference():
    """Of speech whose products are folded on every rank, and for how many places each of them did."""
    case, places, softmax = ALL_CASES["multitalk"], set(), folding.head_softmax

    def noted(weights, *more):
        places.add(weights.shape[1])
        softmax(weights, *more)

    with patch.object(folding, "WORTH", math.inf), patch.object(folding, "head_softmax", noted):
        model = built(case)
        shared = one_step(model, case.payload, ranks=ProcessRanks(CPU))
        here = sorted(places)
        alone = one_step(model, case.payload, ranks=ALONE)
    return float((shared - alone).norm() / alone.norm()), here, sorted(places)


def backend_difference(name):
    """A backend that must know where tokens lie, with references behind the video."""
    case = ALL_CASES["phantom"]
    model = built(case)
    model.attention_plan = AttentionPlan(main=BACKENDS[name].make(None))
    alone, shared = (one_step(model, case.payload, ranks=ranks) for ranks in (ALONE, ProcessRanks(CPU)))
    return float((shared - alone).norm() / alone.norm())


def guided(ranks, cfgs, cache=None):
    """Velocities of steps with these scales, and how many forwards this rank ran."""
    model = built(ALL_CASES["slg"])
    generator = torch.Generator().manual_seed(4)
    prompts = {name: torch.randn(4, 8, generator=generator) for name in ("positive", "negative")}
    latents = torch.randn(16, 3, 4, 4, generator=generator)
    ran = []
    model.blocks[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with model.shared_by(ranks), torch.no_grad():
        memories = None if cache is None else StepMemories("test", lambda: cache.maker(None)(CPU), ranks)
        rule = Guidance(cfg=tuple(cfgs), payloads=())
        denoiser = Denoiser(
            model, Conditions(**prompts), guidance=rule, device=CPU, dtype=torch.float32, memories=memories
        )
        steps = [Step(index=i, total=len(cfgs), in_run=i) for i in range(len(cfgs))]
        return torch.stack([denoiser(latents * (1 - 0.001 * s.index), torch.tensor(500.0), s) for s in steps]), len(ran)


def guidance_difference(cfgs, cached=False):
    """Of guided velocities; forwards of one process and of this rank."""
    cache = EasyCache(threshold=0.5, start_step=1) if cached else None
    (alone, ran_alone), (shared, ran) = (guided(ranks, cfgs, cache) for ranks in (ALONE, ProcessRanks(CPU)))
    return float((shared - alone).norm() / alone.norm()), ran_alone, ran


def tiles(folder):
    """Spread of a tiled video and its latents, the first rank's equal to those of one process, and tiles made here."""
    vae = load_vae(folder / "vae.safetensors", dtype=torch.float32, host=StandaloneHost(device="cpu"))
    generator = torch.Generator().manual_seed(6)
    # Three tiles in a row: no rank has as many as another.
    tile, latents = Tile(x=32, y=32, stride_x=16, stride_y=16), torch.randn(16, 2, 4, 8, generator=generator)
    video = torch.randn(3, 5, 32, 64, generator=generator)
    made, want = [], None
    if not dist.get_rank():
        want = torch.cat(list(vae.decode_chunks(latents, tile=tile)), dim=1), vae.encode(video, tile=tile)
    for name in ("_decode_chunks", "_encode_chunks"):
        chunks = getattr(vae, name)
        setattr(vae, name, lambda *part, chunks=chunks: made.append(1) or chunks(*part))
    ranks = ProcessRanks(CPU)
    got = (
        torch.cat(list(vae.decode_chunks(latents, tile=tile, ranks=ranks)), dim=1),
        vae.encode(video, tile=tile, ranks=ranks),
    )
    assert want is None or all(map(torch.equal, got, want))
    return [float(t.std()) for t in got], len(made)


def decoded(folder):
    """Whether the decoding node makes the same of a ring as one process does, and tiles made for it and made here."""
    vae = load_vae(folder / "vae.safetensors", dtype=torch.float32, host=StandaloneHost(device="cpu"))
    # Three tiles of the video, three of its seam.
    samples = {"samples": torch.randn(1, 16, 3, 4, 8, generator=torch.Generator().manual_seed(6)), "looped": True}
    made, chunks = [], vae._decode_chunks
    vae._decode_chunks = lambda *part: made.append(1) or chunks(*part)
    shared, alone = RankHost(device="cpu"), StandaloneHost(device="cpu")
    shared.ranks = ProcessRanks(CPU)
    pictures, counts, before = [], [], get_host()
    for host in (alone, shared):
        set_host(host)
        pictures.append(N["WanVideoDecode"]().decode(vae, samples, True, 32, 32, 16, 16)[0])
        counts.append(len(made) - sum(counts))
    set_host(before)
    assert pictures[0].std() > 0.01
    return torch.equal(*pictures), counts


def talking(folder, output):
    """A long talking video that the first rank writes: its frames there, None elsewhere."""
    asked = request(folder, output_path=str(output), total=17)
    asked.model.transformer.ranks = ProcessRanks(CPU)
    run(asked)
    return asked.model.transformer.ranks.leads


class Vae:
    FUNCTION, RETURN_TYPES = "load", ("WANVAE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"folder": ("STRING", {})}}

    def load(self, folder):
        return (load_vae(Path(folder) / "vae.safetensors", dtype=torch.float32, host=get_host()),)


class Talk(Vae):
    """A talking video of two windows; `model` shows that it samples."""

    FUNCTION, RETURN_TYPES = "sample", ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"folder": ("STRING", {})}, "optional": {"model": ("WANVIDEOMODEL",)}}

    def sample(self, folder):
        asked = request(Path(folder), total=17)
        with asked.model.transformer.shared_by(ranks_of(get_host())):
            return (sample(asked, get_host())[0],)


class Refine(Talk):
    """Samples on from latents; keeps the result."""

    MADE = []

    @classmethod
    def INPUT_TYPES(cls):
        return {**super().INPUT_TYPES(), "required": {"folder": ("STRING", {}), "samples": ("LATENT",)}}

    def sample(self, folder, samples):
        asked, host = request(Path(folder), base="text"), get_host()
        shape = tuple(samples["samples"].shape[1:])
        asked = replace(asked, image=ImageEmbeds(latent_shape=shape, num_frames=13), payloads=(), samples=samples)
        with asked.model.transformer.shared_by(ranks_of(host)):
            self.MADE.append(sample(asked, host)[0]["samples"])
        return ({"samples": self.MADE[-1]},)


class Keep(Vae):
    FUNCTION, RETURN_TYPES, OUTPUT_NODE = "keep", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",)}}

    def keep(self, samples):
        return ()


def refine(folder, host, runner):
    """Latents of a second sampler behind the decoded and encoded video of a talking one."""
    names = ("WanVideoDecode", "WanVideoEncode")
    classes = {cls.__name__: cls for cls in (Vae, Talk, Refine, Keep)} | {name: N[name] for name in names}
    tiles = dict(enable_vae_tiling=False, tile_x=64, tile_y=64, tile_stride_x=32, tile_stride_y=32)
    nodes = {
        "vae": ("Vae", {"folder": str(folder)}),
        "talk": ("Talk", {"folder": str(folder)}),
        "decode": ("WanVideoDecode", {"vae": Link("vae", 0), "samples": Link("talk", 0), **tiles}),
        "encode": ("WanVideoEncode", {"vae": Link("vae", 0), "image": Link("decode", 0), **tiles}),
        "refine": ("Refine", {"folder": str(folder), "samples": Link("encode", 0)}),
        "keep": ("Keep", {"samples": Link("refine", 0)}),
    }
    prompt = Prompt({name: Node(name, kind, "", given) for name, (kind, given) in nodes.items()}, {})
    Refine.MADE.clear()
    set_host(host)
    runner(prompt, classes, host).run()
    return Refine.MADE[0]


def refined(folder):
    """What every rank makes of it, and one process does."""
    before, host = get_host(), RankHost(device="cpu")
    host.ranks = ProcessRanks(CPU)
    shared = refine(folder, host, Runner if host.ranks.leads else FollowingRunner)
    found = difference(shared, lambda: refine(folder, StandaloneHost(device="cpu"), Runner))
    set_host(before)
    return found
