from contract import Case
from wanvideo_wrapper.slg.extension import SkipLayerGuidance, SkippedBlocks

CASES = {
    "slg": Case(SkipLayerGuidance(), SkippedBlocks((2,), unprompted=True), SkippedBlocks((2,))),
}
