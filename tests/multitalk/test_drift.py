"""Long talking videos with files that let them drift are warned of, whether a LoRA or the model itself."""

from pathlib import Path

import pytest
from sampler_stand_in import FakeModel
from wanvideo_wrapper.multitalk.drift import LONG, warn_of_drift
from wanvideo_wrapper.wanvideo.lora import LoraFile


@pytest.mark.parametrize("as_lora", [True, False])
def test_long_talking_video_with_fusionx_drifts(as_lora, caplog):
    path = Path("Wan2.1_I2V_14B_FusionX.safetensors")
    model = FakeModel(loras=(LoraFile(path=path, merge=False),) if as_lora else ())
    model.path = Path("plain.safetensors") if as_lora else path
    warn_of_drift(model, LONG)
    assert not caplog.text
    warn_of_drift(model, LONG + 1)
    assert path.name in caplog.text and "lets colours and the face drift" in caplog.text


def test_others_do_not(caplog):
    model = FakeModel()
    model.path = Path("Wan21_I2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors")
    warn_of_drift(model, 90_000)
    assert not caplog.text
