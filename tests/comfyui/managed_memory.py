"""This pack's models and ComfyUI's in ComfyUI's memory management, on a GPU that is only counted; prints it all.

python managed_memory.py FOLDER COMFYUI_PATH [options of main.py]: FOLDER has tiny_t2v.safetensors.

The GPU is the device "cpu:0", which torch serves and ComfyUI takes for another than "cpu".
"""

import json
import sys

import launch

GB = 10**9


history = []


class Ledger:
    """The memory of the GPU: what lies there is told by those who move it."""

    def __init__(self, total):
        self.total, self.placed, self.patchers = total, {}, []

    def free(self):
        others = sum(patcher.loaded_size() for patcher in self.patchers)
        return self.total - others - sum(self.placed.values())

    def place(self, name, size, gpu):
        """What a model of this pack calls to be moved. size: of what will be on the GPU."""

        def move(device):
            history.append((name, str(device), self.free()))
            self.placed[name] = size if device == gpu else 0

        return move


def setup(root):
    """ComfyUI's management with the ledger as its GPU."""
    sys.path.insert(0, root)
    import comfy.options

    comfy.options.enable_args_parsing()
    from comfy.cli_args import args

    # On the command line 0.3.64 takes --cpu or --lowvram, not both.
    args.cpu = True
    import comfy.model_management as management
    import folder_paths  # noqa: F401
    import torch

    gpu = torch.device("cpu:0")
    management.get_torch_device = lambda: gpu
    # On a CPU ComfyUI turns its options for little memory off.
    management.vram_state = management.set_vram_to
    management.is_device_cpu = lambda device: device == torch.device("cpu")
    management.soft_empty_cache = lambda *_, **__: None
    return management, gpu


def with_ledger(management, total):
    ledger = Ledger(total)
    management.get_total_memory = lambda *_, **__: total
    management.get_free_memory = lambda device=None, torch_free_too=False: (
        (ledger.free(), 0) if torch_free_too else ledger.free()
    )
    return ledger


def other(ledger, gpu, size):
    """A model of ComfyUI's own, of true weights."""
    import torch
    from comfy.model_patcher import ModelPatcher

    model = torch.nn.ModuleList(torch.nn.Linear(1000, size // 4_000 // 4, bias=False) for _ in range(4))
    patcher = ModelPatcher(model, gpu, torch.device("cpu"))
    ledger.patchers.append(patcher)
    return patcher


def ours(ledger, gpu, host, *, name="ours", size):
    import torch

    place = ledger.place(name, size, gpu)
    return host.manage(torch.nn.Linear(2, 2), place=place, resident=lambda: size)


def evictions(management, gpu, host):
    """Both ways, with room and without; sizes in bytes."""
    told = {}
    for name, total in (("room", 6 * GB), ("tight", 19 * GB // 10)):
        history.clear()
        ledger = with_ledger(management, total)
        others = [other(ledger, gpu, 200_000_000) for _ in range(2)]
        for patcher in others:
            management.load_models_gpu([patcher])
        mine = ours(ledger, gpu, host, size=400_000_000)
        before = [patcher.loaded_size() for patcher in others]
        mine.acquire(300_000_000)
        after = [patcher.loaded_size() for patcher in others]
        told[name] = {"before": before, "after": after, "free_at_arrival": history[-1][2]}
        arriving = other(ledger, gpu, 600_000_000)
        management.load_models_gpu([arriving])
        told[name] |= {"moves": [move[1] for move in history], "arrived": arriving.loaded_size()}
        mine.acquire(300_000_000)
        mine.release()
        told[name]["again"] = [move[1] for move in history][len(told[name]["moves"]) :]
        told[name]["listed"] = len([m for m in management.current_loaded_models if m.model is mine._patcher])
        management.unload_all_models()
    return told


def loaders(management, gpu, host, folder):
    """What load_device and force_offload do to the list of models on the GPU, by the nodes themselves."""
    import folder_paths
    import torch
    from wanvideo_wrapper import NODE_CLASS_MAPPINGS as N
    from wanvideo_wrapper.wanvideo.request import TextEmbeds

    with_ledger(management, 6 * GB)
    folder_paths.add_model_folder_path("diffusion_models", folder)
    told = {}

    def listed(model):
        return any(loaded.model is model.managed._patcher for loaded in management.current_loaded_models)

    load = N["WanVideoModelLoader"]().loadmodel
    for device in ("offload_device", "main_device"):
        (model,) = load("tiny_t2v.safetensors", "fp32", device, "disabled")
        told[device] = listed(model)
    embeds = N["WanVideoEmptyEmbeds"]().process(9, 32, 32)[0]
    text = TextEmbeds(positive=(torch.randn(4, model.transformer.config.text_dim),), negative=())
    for offload in (False, True):
        N["WanVideoSampler"]().process(
            model, embeds, steps=1, cfg=1.0, shift=5.0, seed=1, force_offload=offload, scheduler="euler",
            riflex_freq_index=0, text_embeds=text,
        )  # fmt: skip
        told[f"force_offload {offload}"] = listed(model)
    sizes = {}
    for share in (0.0, 0.5, 1.0):
        (arguments,) = N["WanVideoVRAMManagement"]().setargs(share)
        (model,) = load("tiny_t2v.safetensors", "fp32", "offload_device", "disabled", vram_management_args=arguments)
        sizes[share] = model.managed._patcher.model_size()
    return told | {"resident": list(sizes.values())}


def main(folder, root, *options):
    sys.argv = ["main.py", *options]
    management, gpu = setup(root)
    from wanvideo_wrapper.host import get_host

    host = get_host()
    assert host.name == "comfyui"
    told = {"mode": host.memory_mode(), "reserved": host.reserved_memory()}
    told["evictions"] = evictions(management, gpu, host)
    if not options:
        told["loaders"] = loaders(management, gpu, host, folder)
    sys.stdout.write(f"\n{json.dumps(told)}")


if __name__ == "__main__":
    kept = launch.declare_torchvision()
    main(*sys.argv[1:])
