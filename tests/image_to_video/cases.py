import torch
from contract import Case
from wanvideo_wrapper.image_to_video.extension import ImageCondition, ImageToVideo

PICTURE = ImageCondition(torch.randn(1, 16, 3, 4, 4), torch.rand(1, 4, 3, 4, 4))
CASES = {
    "image_to_video": Case(ImageToVideo(), PICTURE, joins=20),
    "image_to_video_fun": Case(ImageToVideo(), PICTURE, joins=16),
}
