"""Sampling: one token, the decode loop, the engine, files of prompts."""
