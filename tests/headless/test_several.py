"""What ranks run of a workflow, and which models of one run the next one takes."""

from types import SimpleNamespace

from wanvideo_wrapper.headless.graph import Link, Node, Prompt
from wanvideo_wrapper.headless.runner import Runner
from wanvideo_wrapper.headless.several import FollowingRunner
from wanvideo_wrapper.host import StandaloneHost

RAN = []


def node_class(name, returns, takes=(), output=False):
    class Made:
        FUNCTION = "go"
        RETURN_TYPES = returns
        OUTPUT_NODE = output

        @classmethod
        def INPUT_TYPES(cls):
            needed = {kind.lower(): (kind, {}) for kind in takes}
            tiles = {"enable_vae_tiling": ("BOOLEAN", {"default": False})} if "WANVAE" in takes else {}
            return {"required": {**needed, "seed": ("INT", {"default": 0})}, "optional": tiles}

        def go(self, **inputs):
            RAN.append(name)
            return tuple(f"{name} of {inputs['seed']}" for _ in returns)

    return Made


CLASSES = {
    "Load": node_class("Load", ("WANVIDEOMODEL",)),
    "Vae": node_class("Vae", ("WANVAE",)),
    "Picture": node_class("Picture", ("IMAGE",)),
    "Sample": node_class("Sample", ("LATENT",), ("WANVIDEOMODEL", "IMAGE")),
    "Decode": node_class("Decode", ("IMAGE",), ("WANVAE", "LATENT")),
    "Save": node_class("Save", (), ("IMAGE",), output=True),
    "Show": node_class("Show", (), ("IMAGE",), output=True),
}


def prompt(model=0, seed=0, tiled=False):
    tiles = {"enable_vae_tiling": True} if tiled else {}
    links = {
        "load": ("Load", {"seed": model}), "picture": ("Picture", {"seed": 0}),
        "sample": ("Sample", {"wanvideomodel": Link("load", 0), "image": Link("picture", 0), "seed": seed}),
        "vae": ("Vae", {"seed": 0}),
        "decode": ("Decode", {"wanvae": Link("vae", 0), "latent": Link("sample", 0), "seed": 0} | tiles),
        "save": ("Save", {"image": Link("decode", 0), "seed": 0}),
        "show": ("Show", {"image": Link("picture", 0), "seed": 0}),
    }  # fmt: skip
    return Prompt({name: Node(name, kind, "", inputs) for name, (kind, inputs) in links.items()}, {})


class Sharing(StandaloneHost):
    """One of several processes, as far as a runner asks."""

    def __init__(self):
        super().__init__(device="cpu")
        self.ranks = SimpleNamespace(video_is_read=False)


def ran(kind, *arguments, **more):
    RAN.clear()
    kind(prompt(**more), CLASSES, Sharing(), *arguments).run()
    return set(RAN)


def test_ranks_that_follow_run_samplers_and_what_these_need():
    assert ran(Runner) == set(CLASSES)
    assert ran(FollowingRunner) == {"Load", "Picture", "Sample"}
    assert ran(FollowingRunner, tiled=True) == {"Load", "Picture", "Sample", "Vae", "Decode"}


def test_a_model_is_loaded_once_for_runs_that_share_it_and_dropped_for_others():
    loaded = {}
    assert {"Load", "Vae"} <= ran(Runner, loaded)
    assert set(loaded.values()) == {("Load of 0",), ("Vae of 0",)}
    assert ran(Runner, loaded, seed=1) == set(CLASSES) - {"Load", "Vae"}
    assert "Vae" not in ran(Runner, loaded, model=2)
    assert set(loaded.values()) == {("Load of 2",), ("Vae of 0",)}
