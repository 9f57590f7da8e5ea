from contract import Case
from wanvideo_wrapper.experimental.extension import SplitAttention, SplitSteps

CASES = {
    "split_attention": Case(SplitAttention(), SplitSteps(tuple(range(8)), 2), SplitSteps((9,), 2)),
}
