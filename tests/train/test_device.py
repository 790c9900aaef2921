from dataclasses import replace

import pytest

from train.device import Device, for_packing

GPU = Device("cuda", "bf16", 4, "sdpa")


@pytest.mark.parametrize(
    ("device", "installed", "attention"),
    [
        (GPU, True, "flash_attention_2"),
        (replace(GPU, precision="fp16"), True, "flash_attention_2"),
        (replace(GPU, precision="fp32"), True, "sdpa"),
        (GPU, False, "sdpa"),
        (Device("cpu", "bf16", 4, "eager"), True, "eager"),
    ],
)
def test_packing_takes_flash_attention_where_it_can(
    device: Device, installed: bool, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.device.has_flash_attention", lambda: installed)
    assert for_packing(device) == replace(device, attention=attention)
