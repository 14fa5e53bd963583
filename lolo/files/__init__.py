"""Files: disk, rows of JSON, tensors and settings; written completely or not at all, checked when read, not pickled."""
