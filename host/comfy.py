"""The host inside ComfyUI. The only module that imports ComfyUI."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from .protocol import DEMO_MODELS, KINDS, HostAttention, Managed, MemoryMode, Place, Progress, find_in
from .residence import ModuleResidence

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

log = logging.getLogger("wanvideo")


class ComfyProgress:
    """ComfyUI's progress bar, with a picture of the current latents where ComfyUI has a previewer."""

    def __init__(self, total: int, label: str) -> None:
        from comfy.utils import ProgressBar

        self._bar = ProgressBar(total)
        self._previews = ComfyPreviews()
        self._total = total
        self._shown = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        return None

    def update(self, done: int, *, note: str = "", preview: Tensor | None = None) -> None:
        """Move the bar, show the note under the node and a picture of the preview."""
        picture = None if preview is None else self._previews.picture(preview)
        # A note on what comes next is no progress.
        if done != self._shown or picture is not None:
            self._bar.update_absolute(done, self._total, picture)
            self._shown = done
        if note:
            _show_text(note)


def _show_text(note: str) -> None:
    try:
        from comfy_execution.utils import get_executing_context
        from server import PromptServer
    except ImportError:
        # An older ComfyUI shows no text on nodes; the log has the same.
        return
    context = get_executing_context()
    if context is not None:
        PromptServer.instance.send_progress_text(note, context.node_id)


class ComfyPreviews:
    """Pictures of one run by ComfyUI's previewer, or by the one that another pack puts in its place (VideoHelperSuite).

    It is made once: it may be a decoder that is read from a file, and an animated one counts on from step to step.
    """

    def __init__(self) -> None:
        self._previewer: object = None
        self._wanted = True

    def picture(self, latents: Tensor) -> tuple[str, object, int] | None:
        """What the progress bar shows of latents [C, F, h, w]; None for nothing, and where the previewer shows itself.

        A previewer that fails makes no more pictures, and the log says so: no run is lost for them.
        """
        if not self._wanted:
            return None
        try:
            return self._shown(latents)
        # It is code of other packs, which may raise anything.
        except Exception as error:
            self._wanted = False
            log.warning(
                "This run has no previews, for the previewer failed (%s: %s). Choose another preview method in "
                "ComfyUI's settings.",
                type(error).__name__, error,
            )  # fmt: skip
            return None

    def _shown(self, latents: Tensor) -> tuple[str, object, int] | None:
        import latent_preview
        from comfy import latent_formats

        if self._previewer is None:
            form = latent_formats.Wan22() if latents.shape[0] == 48 else latent_formats.Wan21()
            self._previewer = latent_preview.get_previewer(latents.device, form)
        if self._previewer is None:
            self._wanted = False
            return None
        # ComfyUI's own show the first frame of what they get, which is the given one in image to video.
        own = type(self._previewer).__module__ == latent_preview.__name__
        middle = latents.shape[1] // 2
        video = latents[None, :, middle : middle + 1] if own else latents[None]
        return self._previewer.decode_latent_to_preview_image("JPEG", video.float())


class ComfyHost:
    """ComfyUI's folders, devices, progress, interruption and model management."""

    name = "comfyui"

    def __init__(self) -> None:
        import folder_paths

        self._paths = folder_paths
        for kind, (folder, suffixes) in KINDS.items():
            self._register(kind, folder, suffixes)
        # Last, so that no file of the user's is hidden, and new files go where they went before.
        for folder in sorted(DEMO_MODELS.glob("*")):
            folder_paths.add_model_folder_path(folder.name, str(folder))

    def _register(self, kind: str, folder: str, suffixes: tuple[str, ...]) -> None:
        """A kind beside the folders that ComfyUI and the user's extra_model_paths.yaml have for it."""
        known = self._paths.folder_names_and_paths
        if kind != folder:
            known.setdefault(kind, (list(known[folder][0]), set(suffixes)))
            return
        self._paths.add_model_folder_path(folder, os.path.join(self._paths.models_dir, folder))
        folders, endings = known[folder]
        # Kinds that ComfyUI does not know itself come without endings, and would list every file.
        known[folder] = (folders, endings or set(suffixes))

    def device(self) -> torch.device:
        """ComfyUI's compute device."""
        from comfy import model_management

        return model_management.get_torch_device()

    def offload_device(self) -> torch.device:
        """Where ComfyUI keeps diffusion models that wait."""
        from comfy import model_management

        return model_management.unet_offload_device()

    def results_device(self) -> torch.device:
        """Main memory; the GPU under --gpu-only."""
        from comfy import model_management

        return model_management.intermediate_device()

    def list_files(self, kind: str) -> list[str]:
        """ComfyUI's list, in its own spelling."""
        return self._paths.get_filename_list(kind)

    def find_file(self, kind: str, name: str) -> Path:
        """A file in any of the folders that ComfyUI knows for the kind."""
        return find_in(kind, name, [Path(folder) for folder in self._paths.get_folder_paths(kind)])

    def models_dir(self, kind: str) -> Path:
        """The first of ComfyUI's folders."""
        return Path(self._paths.get_folder_paths(kind)[0])

    def input_dir(self) -> Path:
        """ComfyUI/input."""
        return Path(self._paths.get_input_directory())

    def output_dir(self) -> Path:
        """ComfyUI/output."""
        return Path(self._paths.get_output_directory())

    def temp_dir(self) -> Path:
        """ComfyUI/temp."""
        return Path(self._paths.get_temp_directory())

    def cache_dir(self) -> Path:
        """ComfyUI/user/wanvideo_cache; ComfyUI empties its temp folder at every start."""
        return Path(self._paths.get_user_directory()) / "wanvideo_cache"

    def writable_folder(self, name: str) -> Path:
        """Any folder, as ComfyUI users expect; relative names lie in ComfyUI/output."""
        return self.output_dir() / name

    def progress(self, total: int, label: str = "") -> Progress:
        """ComfyUI's bar on the node."""
        return ComfyProgress(total, label)

    def check_cancelled(self) -> None:
        """Raises ComfyUI's InterruptProcessingException."""
        from comfy import model_management

        model_management.throw_exception_if_processing_interrupted()

    def manage(
        self, module: nn.Module, *, place: Place | None = None, resident: Callable[[], int] | None = None
    ) -> Managed:
        """Takes part in ComfyUI's memory management: loading it evicts other models, and the other way round."""
        return ComfyManaged(module, self, place, resident)

    def reserved_memory(self) -> int:
        """What --reserve-vram says, or ComfyUI's usual reserve."""
        from comfy import model_management

        return int(model_management.extra_reserved_memory())

    def memory_mode(self) -> MemoryMode:
        """--lowvram and --novram; ComfyUI takes the first also by itself, where the GPU has little memory."""
        from comfy import model_management

        states = model_management.VRAMState
        return {states.LOW_VRAM: "low", states.NO_VRAM: "none"}.get(model_management.vram_state, "normal")

    def free_memory(self) -> None:
        """ComfyUI's cache release."""
        from comfy import model_management

        model_management.soft_empty_cache()

    def make_room(self) -> None:
        """Every model of ComfyUI leaves the GPU; those that are still needed come back by themselves."""
        from comfy import model_management

        model_management.unload_all_models()
        model_management.soft_empty_cache()

    def attention(self) -> HostAttention:
        """ComfyUI's optimized attention, as its command line chose it."""
        from comfy.ldm.modules.attention import optimized_attention

        return lambda q, k, v: optimized_attention(q, k, v, q.shape[1], skip_reshape=True)


class _Held(nn.Module):
    """What ComfyUI manages: it writes attributes of its own, some of which models have as read-only properties."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def _held(module: nn.Module) -> _Held:
    """The module under its own name, which ComfyUI's log says when it loads it."""
    return type(type(module).__name__, (_Held,), {})(module)


class ComfyManaged:
    """Managed through a ModelPatcher that ComfyUI can evict."""

    def __init__(
        self, module: nn.Module, host: ComfyHost, place: Place | None, resident: Callable[[], int] | None
    ) -> None:
        self.module = module
        self._host = host
        self._patcher = whole_model_patcher()(_held(module), host.device(), host.offload_device())
        self._patcher.place = place or ModuleResidence(module)
        self._patcher.resident = resident

    def acquire(self, working: int = 0) -> torch.device:
        """Ask ComfyUI to load the model; it makes room first, for what it will compute too, and keeps its reserve."""
        from comfy import model_management

        model_management.load_models_gpu([self._patcher], memory_required=working, force_full_load=True)
        # Other packs let ComfyUI name another device from node to node; a model stays with the one it was loaded for.
        return self._patcher.load_device

    def release(self) -> None:
        """Leave the device and ComfyUI's list of loaded models."""
        from comfy import model_management

        for loaded in [m for m in model_management.current_loaded_models if m.model is self._patcher]:
            loaded.model_unload()
            model_management.current_loaded_models.remove(loaded)
        self._host.free_memory()


def whole_model_patcher() -> type[ModelPatcher]:
    """A ModelPatcher that moves a model as one piece through `place`, which may keep parts of it off the device."""
    from comfy.model_patcher import ModelPatcher

    class WholeModelPatcher(ModelPatcher):
        place: Place
        resident: Callable[[], int] | None = None

        def model_size(self) -> int:
            # Others are evicted for what will be on the device, and not for what waits in main memory.
            return super().model_size() if self.resident is None else self.resident()

        def partially_load(
            self, device_to: torch.device, extra_memory: int = 0, force_patch_weights: bool = False
        ) -> int:
            self.place(device_to)
            self.model.device = device_to
            self.model.model_loaded_weight_memory = self.model_size()
            return self.model_size()

        def partially_unload(self, device_to: torch.device, memory_to_free: int = 0) -> int:
            return 0

        def detach(self, unpatch_all: bool = True) -> nn.Module:
            if self.model.model_loaded_weight_memory:
                self.place(self.offload_device)
                self.model.device = self.offload_device
                self.model.model_loaded_weight_memory = 0
            return self.model

    return WholeModelPatcher
