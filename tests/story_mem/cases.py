from contract import Case
from wanvideo_wrapper.story_mem.extension import MemoryPositions, StoryMem

CASES = {"story_mem": Case(StoryMem(), MemoryPositions(2, 3))}
