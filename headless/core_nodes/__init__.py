"""Stand-ins for nodes of ComfyUI and of other packs that Wan workflows use; their interfaces are the originals'."""

from __future__ import annotations

from . import (
    batches,
    calculation,
    cameras,
    choices,
    colors,
    labels,
    latents,
    loaders,
    masks,
    media_nodes,
    pictures,
    scaling,
    sounds,
    subjects,
    texts,
    values,
    vhs,
    videos,
)

NODE_CLASS_MAPPINGS: dict[str, type] = {
    **values.NODE_CLASS_MAPPINGS,
    **pictures.NODE_CLASS_MAPPINGS,
    **media_nodes.NODE_CLASS_MAPPINGS,
    **batches.NODE_CLASS_MAPPINGS,
    **masks.NODE_CLASS_MAPPINGS,
    **videos.NODE_CLASS_MAPPINGS,
    **calculation.NODE_CLASS_MAPPINGS,
    **loaders.NODE_CLASS_MAPPINGS,
    **cameras.NODE_CLASS_MAPPINGS,
    **choices.NODE_CLASS_MAPPINGS,
    **colors.NODE_CLASS_MAPPINGS,
    **latents.NODE_CLASS_MAPPINGS,
    **sounds.NODE_CLASS_MAPPINGS,
    **subjects.NODE_CLASS_MAPPINGS,
    **labels.NODE_CLASS_MAPPINGS,
    **texts.NODE_CLASS_MAPPINGS,
    **scaling.NODE_CLASS_MAPPINGS,
    **vhs.NODE_CLASS_MAPPINGS,
}
