"""Readers of other file formats, which know nothing of Stable Diffusion or of this project."""
