"""GGUF files: found, unpacked once, loaded from there. Begin at `source.py` and `cache.py`."""
