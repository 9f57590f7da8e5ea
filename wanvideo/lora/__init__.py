"""LoRA: changes of a model's weights that come in files of their own, merged into the weights or run beside them.

Source: Hu et al. 2021 (LoRA); Kalajdzievski 2023 (rank-stabilised factor); Liu et al. 2024 (DoRA); Yeh et al. 2024
(LyCORIS: LoHa, LoKr, LoCon). names.py reads keys, kinds.py says what a change is worth, reading.py fits a file to a
model and reports on every key, merging.py and beside.py apply it.
"""

from .beside import Beside, beside
from .file import LoraFile, lora_files
from .merging import MergedLoras
from .reading import LeftOut, Lora, open_lora, read_lora

__all__ = ["Beside", "LeftOut", "Lora", "LoraFile", "MergedLoras", "beside", "lora_files", "open_lora", "read_lora"]
