"""Runs saved ComfyUI workflows without ComfyUI."""
