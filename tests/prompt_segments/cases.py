import torch
from contract import Case
from wanvideo_wrapper.prompt_segments.extension import PromptSegments, PromptSegmentsExtension

CASES = {
    "prompt_segments": Case(PromptSegmentsExtension(), PromptSegments((torch.randn(3, 8), torch.randn(4, 8)))),
}
