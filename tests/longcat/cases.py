from contract import Case
from wanvideo_wrapper.longcat.extension import LongCat
from wanvideo_wrapper.longcat.given import GivenFrames

EXTENSION = LongCat(width=8)
CASES = {
    "longcat": Case(EXTENSION, GivenFrames(frames=1)),
    "longcat_reference": Case(EXTENSION, GivenFrames(frames=2, apart=1, position=4, unseeing=(2, 3))),
}
