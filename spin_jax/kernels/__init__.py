"""Attention by tiles: which tiles, and the kernel of each platform."""
