"""Linear layers whose weights are stored in FP8 or NVFP4: one class for each storage and kind of product."""
