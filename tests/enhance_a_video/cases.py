from contract import Case
from wanvideo_wrapper.enhance_a_video.extension import EnhanceArgs, EnhanceAVideo

CASES = {
    "enhance_a_video": Case(
        EnhanceAVideo(), EnhanceArgs(30.0), EnhanceArgs(0.0), changed=lambda step: EnhanceArgs(20.0 + step)
    ),
}
